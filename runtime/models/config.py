"""What a decoder computes, in numbers; which weights it has is said in artifact/families.py."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pressd.runtime.artifact.errors import ArtifactError
from pressd.runtime.layers.rotary import RopeConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class DecoderConfig:
    """Numbers of one decoder-only transformer; norm names have a {} for the layer's index."""

    architecture: str
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    max_context: int
    norm_epsilon: float
    rope: RopeConfig
    eos_token_ids: tuple[int, ...]
    input_norm: str
    post_attention_norm: str
    final_norm: str


def require(config: Mapping[str, Any], key: str, kind: type[int] | type[float]) -> Any:
    """Return a positive number of config.json, or say which key is missing or wrong."""
    value = config.get(key)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or value <= 0 or kind(value) != value:
        raise ArtifactError(f"config.json: {key} is {value!r}; a positive {kind.__name__} is needed")
    return kind(value)


def token_ids(value: Any) -> tuple[int, ...]:
    """Return eos_token_id as a tuple: config.json holds a number, a list, or nothing."""
    if value is None:
        return ()
    values = value if isinstance(value, list) else [value]
    if not all(isinstance(item, int) and not isinstance(item, bool) for item in values):
        raise ArtifactError(f"config.json: eos_token_id is {value!r}; a number or a list of numbers is needed")
    return tuple(values)
