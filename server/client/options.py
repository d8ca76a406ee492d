"""What can be asked of a completion, by the names that the promise has for it."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypedDict


class GenerateOptions(TypedDict, total=False):
    """What is left out takes the model's default; protos/pressd/v1 says what each does and its bounds.

    At most one of the five constraints may be given, and the last three for messages only.
    """

    model: str
    request_id: str

    temperature: float
    top_p: float
    top_k: int
    min_p: float
    typical_p: float
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    seed: int
    num_sequences: int
    logit_bias: Mapping[int, float]
    allowed_token_ids: Sequence[int]
    bad_words: Sequence[str]

    max_new_tokens: int
    min_new_tokens: int
    stop: Sequence[str]
    stop_token_ids: Sequence[int]
    include_stop: bool
    ignore_eos: bool

    text: bool
    token_ids: bool
    logprobs: bool
    top_logprobs: int
    prompt_logprobs: bool
    echo_prompt: bool
    skip_special_tokens: bool
    stream_min_tokens: int
    stream_max_delay_ms: int

    json_schema: str | Mapping[str, Any]
    json_object: bool
    regex: str
    ebnf: str
    choice: Sequence[str]

    exactness: Literal["lossless", "batch_invariant"]
    bypass_prefix_cache: bool
    cache_salt: str

    priority: int
    queue_timeout_ms: int
    time_budget_ms: int
    max_prompt_tokens: int

    tools: Sequence[Mapping[str, Any]]
    add_generation_prompt: bool
    template_arguments: Mapping[str, Any]
