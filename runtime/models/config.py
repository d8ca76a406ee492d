"""What a decoder computes, in numbers; which weights it has is said in artifact/families.py."""

from dataclasses import dataclass
from typing import Any

from pressd.runtime.artifact.errors import ArtifactError
from pressd.runtime.layers.rotary import RopeConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class DecoderConfig:
    """Numbers of one decoder-only transformer; norm names have a {} for the layer's index.

    `windows` has an entry per layer: how many positions a token sees, its own included, or None for all. `query_norm`
    and `key_norm` normalise each head before it is rotated, or are None together.
    """

    architecture: str
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    windows: tuple[int | None, ...]
    vocab_size: int
    max_context: int
    norm_epsilon: float
    rope: RopeConfig
    eos_token_ids: tuple[int, ...]
    input_norm: str
    post_attention_norm: str
    final_norm: str
    query_norm: str | None = None
    key_norm: str | None = None


def token_ids(value: Any) -> tuple[int, ...]:
    """Return eos_token_id as a tuple: config.json holds a number, a list, or nothing."""
    if value is None:
        return ()
    values = value if isinstance(value, list) else [value]
    if not all(isinstance(item, int) and not isinstance(item, bool) for item in values):
        raise ArtifactError(f"config.json: eos_token_id is {value!r}; a number or a list of numbers is needed")
    return tuple(values)
