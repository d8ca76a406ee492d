"""Scales of keys and values that travel in an artifact: compressed-tensors' `kv_cache_scheme`. No torch.

One scale for the keys of a layer and one for its values, measured when the artifact was made, each a tensor [1] beside
the layer's attention. A number x is stored as x / scale, rounded. Whether they are used is the server's choice.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from pressd.runtime.artifact.errors import ArtifactError

KVKind = Literal["int8", "fp8"]
TYPES: dict[KVKind, str] = {"int8": "int", "fp8": "float"}
KEY = "kv_cache_scheme"
# Keys of compressed-tensors that change nothing about finished scales.
_INERT = {"observer", "observer_kwargs", "scale_dtype", "zp_dtype"}


@dataclass(frozen=True, slots=True, kw_only=True)
class KVScheme:
    """What the scales of an artifact were measured for: codes of int8, or of fp8 (e4m3)."""

    kind: KVKind

    def to_config(self) -> dict[str, object]:
        """Return the scheme as `quantization_config` has it under `KEY`."""
        return {"num_bits": 8, "type": TYPES[self.kind], "strategy": "tensor", "symmetric": True, "dynamic": False}


def scale_names(layer: int) -> tuple[str, str]:
    """Return the names of the scales of a layer's keys and values."""
    attention = f"model.layers.{layer}.self_attn"
    return f"{attention}.k_scale", f"{attention}.v_scale"


def scale_shapes(scheme: KVScheme | None, num_layers: int) -> dict[str, tuple[int, ...]]:
    """Return name and shape of every scale that an artifact of this scheme must hold; none without a scheme."""
    if scheme is None:
        return {}
    return {name: (1,) for layer in range(num_layers) for name in scale_names(layer)}


def read_kv_scheme(config: Mapping[str, object]) -> KVScheme | None:
    """Return what config.json says of keys and values, None for nothing; raises ArtifactError for what is not known."""
    quantization = config.get("quantization_config")
    raw = quantization.get(KEY) if isinstance(quantization, dict) else None
    if raw is None:
        return None
    where = f"config.json: quantization_config.{KEY}"
    if not isinstance(raw, dict):
        raise ArtifactError(f"{where}: needs an object")
    for kind in TYPES:
        wanted = KVScheme(kind=kind).to_config()
        others = raw.keys() - wanted.keys() - _INERT
        if {key: raw.get(key) for key in wanted} == wanted and all(raw[key] is None for key in others):
            return KVScheme(kind=kind)
    raise ArtifactError(
        f"{where}: only 8 bits, int or float, symmetric, static, one scale a tensor are supported; "
        "serve a checkpoint without it"
    )
