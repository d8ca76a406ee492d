"""What a request asks for: how tokens are drawn, when it ends, what its text must look like. No torch, no protocol."""

import math
from dataclasses import dataclass
from typing import Literal

MAX_SEQUENCES = 64
MAX_TOP_LOGPROBS = 64
MAX_BIAS = 1024
MAX_BAD_WORDS = 256
MAX_BAD_WORD_TOKENS = 32
MAX_STOP_TOKENS = 1024
MAX_TOKENS = 2**31 - 1

ConstraintKind = Literal["json_schema", "json_object", "regex", "ebnf", "choice"]
CONSTRAINT_KINDS: tuple[ConstraintKind, ...] = ("json_schema", "json_object", "regex", "ebnf", "choice")


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How the next token is drawn, in this order.

    `bad_words` (sequences of ids that must not appear), `allowed_token_ids` (None: all) and the constraint forbid
    tokens; `logit_bias` ((id, addend) pairs) is added; `repetition_penalty` divides positive logits of the tokens of
    prompt and output and multiplies negative ones (Keskar et al. 2019, arXiv 1909.05858); `frequency_penalty` times the
    number of times and `presence_penalty` once are subtracted for tokens of the output; logits are divided by
    `temperature` (0 is greedy: the rest does not apply); then `top_k` (None: all), `top_p` (Holtzman et al. 2019, arXiv
    1904.09751), `typical_p` (Meister et al. 2022, arXiv 2202.00666) and `min_p` (Nguyen et al. 2024, arXiv 2407.01082)
    each keep a part of what the one before it left, renormalised.

    `seed` fixes the noise; `n` sequences are drawn, each with noise of its own. `logprobs` reports the log-probability
    of each drawn token under the raw model, `top_logprobs` that many of the likeliest beside it, and `prompt_logprobs`
    the same for the prompt.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0
    min_p: float = 0.0
    typical_p: float = 1.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    allowed_token_ids: tuple[int, ...] | None = None
    bad_words: tuple[tuple[int, ...], ...] = ()
    seed: int = 0
    n: int = 1
    logprobs: bool = False
    top_logprobs: int = 0
    prompt_logprobs: bool = False

    def __post_init__(self) -> None:
        _within("temperature", self.temperature, 0.0, 100.0, "between 0 (greedy) and 100")
        if self.top_k is not None:
            _whole("top_k", self.top_k)
            if self.top_k < 1:
                raise ValueError(f"top_k is {self.top_k}; it must be at least 1, or left out")
        for name in ("seed", "n", "top_logprobs"):
            _whole(name, getattr(self, name))
        if not 0.0 < self.top_p <= 1.0:
            raise ValueError(f"top_p is {self.top_p}; it must be above 0 and at most 1")
        _within("min_p", self.min_p, 0.0, 1.0, "between 0 and 1")
        if not 0.0 < self.typical_p <= 1.0:
            raise ValueError(f"typical_p is {self.typical_p}; it must be above 0 and at most 1")
        _within("repetition_penalty", self.repetition_penalty, 0.01, 100.0, "between 0.01 and 100")
        _within("presence_penalty", self.presence_penalty, -100.0, 100.0, "between -100 and 100")
        _within("frequency_penalty", self.frequency_penalty, -100.0, 100.0, "between -100 and 100")
        _within("seed", self.seed, 0, 2**64 - 1, "a whole number that fits in 64 unsigned bits")
        _within("n", self.n, 1, MAX_SEQUENCES, f"between 1 and {MAX_SEQUENCES}")
        _within("top_logprobs", self.top_logprobs, 0, MAX_TOP_LOGPROBS, f"between 0 and {MAX_TOP_LOGPROBS}")
        self._check_lists()

    def _check_lists(self) -> None:
        if len(self.logit_bias) > MAX_BIAS:
            raise ValueError(f"logit_bias has {len(self.logit_bias)} entries; at most {MAX_BIAS} are taken")
        for token, bias in self.logit_bias:
            _whole("a token of logit_bias", token)
            _within(f"logit_bias of token {token}", bias, -100.0, 100.0, "between -100 and 100")
        if len({token for token, _ in self.logit_bias}) < len(self.logit_bias):
            raise ValueError("logit_bias names a token twice")
        if self.allowed_token_ids is not None and not self.allowed_token_ids:
            raise ValueError("allowed_token_ids is empty; name at least one token, or leave it out")
        _all_whole("allowed_token_ids", self.allowed_token_ids or ())
        if len(set(self.allowed_token_ids or ())) < len(self.allowed_token_ids or ()):
            raise ValueError("allowed_token_ids names a token twice")
        if len(self.bad_words) > MAX_BAD_WORDS:
            raise ValueError(f"bad_words has {len(self.bad_words)} entries; at most {MAX_BAD_WORDS} are taken")
        for index, word in enumerate(self.bad_words):
            _all_whole(f"bad_words[{index}]", word)
            if not 1 <= len(word) <= MAX_BAD_WORD_TOKENS:
                raise ValueError(f"bad_words[{index}] has {len(word)} tokens; it must have 1 to {MAX_BAD_WORD_TOKENS}")


@dataclass(frozen=True, slots=True, kw_only=True)
class StoppingParams:
    """When a request ends by itself. None for max_new_tokens means: up to the context limit.

    Before `min_new_tokens` no end-of-sequence or stop token is drawn. `include_stop` keeps the stop token that ended
    it.
    """

    max_new_tokens: int | None = None
    min_new_tokens: int = 0
    stop_token_ids: tuple[int, ...] = ()
    include_stop: bool = False
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        if self.max_new_tokens is not None:
            _whole("max_new_tokens", self.max_new_tokens)
            if self.max_new_tokens < 1:
                raise ValueError(f"max_new_tokens is {self.max_new_tokens}; it must be at least 1")
        _whole("min_new_tokens", self.min_new_tokens)
        _within("min_new_tokens", self.min_new_tokens, 0, MAX_TOKENS, f"between 0 and {MAX_TOKENS}")
        if self.max_new_tokens is not None and self.min_new_tokens > self.max_new_tokens:
            raise ValueError(
                f"min_new_tokens ({self.min_new_tokens}) is above max_new_tokens ({self.max_new_tokens}); lower it"
            )
        if len(self.stop_token_ids) > MAX_STOP_TOKENS:
            raise ValueError(f"stop_token_ids has {len(self.stop_token_ids)} ids; at most {MAX_STOP_TOKENS} are taken")
        _all_whole("stop_token_ids", self.stop_token_ids)


@dataclass(frozen=True, slots=True, kw_only=True)
class Constraint:
    """What the text must look like, as a whole.

    `text` is a JSON schema, a regular expression or a grammar (Lark or GBNF notation) by `kind`; `choices` are the
    texts of kind `choice`; `json_object` needs neither.
    """

    kind: ConstraintKind
    text: str = ""
    choices: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.kind not in CONSTRAINT_KINDS:
            raise ValueError(f"constraint {self.kind!r} is not known; choose one of {', '.join(CONSTRAINT_KINDS)}")
        if not isinstance(self.text, str) or not isinstance(self.choices, tuple):
            raise ValueError(f"{self.kind}: text must be a text, and choices a tuple of texts")
        if not all(isinstance(choice, str) for choice in self.choices):
            raise ValueError("choice: each of choices must be a text")
        if self.kind == "choice" and not self.choices:
            raise ValueError("choice: there is no text to choose from; give at least one")
        if self.kind in ("json_schema", "regex", "ebnf") and not self.text:
            raise ValueError(f"{self.kind} is empty")


def _within(name: str, value: float, low: float, high: float, words: str) -> None:
    if not (math.isfinite(value) and low <= value <= high):
        raise ValueError(f"{name} is {value}; it must be {words}")


def _whole(name: str, value: object) -> None:
    if type(value) is not int:
        raise ValueError(f"{name} is {value!r}; it must be a whole number")


def _all_whole(name: str, values: tuple[int, ...]) -> None:
    if not isinstance(values, tuple) or not set(map(type, values)) <= {int}:
        raise ValueError(f"{name} must be a tuple of whole numbers")
