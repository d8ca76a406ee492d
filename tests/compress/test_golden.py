"""The bytes of an artifact, written a second time with numpy alone from what the formats' descriptions say."""

import json
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from pressd.compress import compress

HIDDEN, HEAD_DIM, FFN, VOCAB = 64, 32, 96, 5
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "dtype": "float32",
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": HEAD_DIM,
    "intermediate_size": FFN,
    "max_position_embeddings": 16,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
}
LAYER = "model.layers.0."
# In the order of the plan: the embedding, each group of the layer with its members, its norms, the final norm.
SHAPES: dict[str, tuple[int, ...]] = {
    "model.embed_tokens": (VOCAB, HIDDEN),
    f"{LAYER}self_attn.q_proj": (2 * HEAD_DIM, HIDDEN),
    f"{LAYER}self_attn.k_proj": (HEAD_DIM, HIDDEN),
    f"{LAYER}self_attn.v_proj": (HEAD_DIM, HIDDEN),
    f"{LAYER}self_attn.o_proj": (HIDDEN, 2 * HEAD_DIM),
    f"{LAYER}mlp.gate_proj": (FFN, HIDDEN),
    f"{LAYER}mlp.up_proj": (FFN, HIDDEN),
    f"{LAYER}mlp.down_proj": (HIDDEN, FFN),
    f"{LAYER}input_layernorm": (HIDDEN,),
    f"{LAYER}post_attention_layernorm": (HIDDEN,),
    "model.norm": (HIDDEN,),
}
DTYPES = {"float32": "F32", "int8": "I8", "int32": "I32", "int64": "I64"}


def source_weights() -> dict[str, np.ndarray]:
    """Numbers that any machine makes alike: a congruential sequence of 24 bits, scaled by a power of two."""
    state, weights = 12345, {}
    for name, shape in SHAPES.items():
        values = np.empty(int(np.prod(shape)), dtype=np.float32)
        for index in range(len(values)):
            state = (1140671485 * state + 12820163) % 2**24
            values[index] = (state - 2**23) / 2**24
        weights[name] = values.reshape(shape)
    return weights


def round_to_nearest(weight: np.ndarray, bits: int, group_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Codes and scales as compressed-tensors defines them: max / ((2^bits - 1) / 2), nearest even, clamped."""
    groups = weight.reshape(len(weight), -1, group_size)
    scale = np.abs(groups).max(-1) / np.float32((2**bits - 1) / 2)
    codes = np.rint(np.clip(groups / scale[..., None], -(2 ** (bits - 1)), 2 ** (bits - 1) - 1))
    return codes.astype(np.int8).reshape(weight.shape), scale


def stored(name: str, weight: np.ndarray, scheme: str) -> dict[str, np.ndarray]:
    if not name.endswith("_proj"):
        return {f"{name}.weight": weight}
    if scheme == "w8a8":
        codes, scale = round_to_nearest(weight, 8, weight.shape[1])
        return {f"{name}.weight": codes, f"{name}.weight_scale": scale}
    bits, group_size = int(scheme[1]), 32
    codes, scale = round_to_nearest(weight, bits, group_size)
    unsigned = (codes.astype(np.int16) + 2 ** (bits - 1)).astype(np.uint8)
    stream = np.unpackbits(unsigned[..., None], axis=-1, bitorder="little", count=bits).reshape(len(codes), -1)
    padded = np.pad(stream, ((0, 0), (0, -stream.shape[1] % 32)))
    return {
        f"{name}.weight_packed": np.packbits(padded, axis=1, bitorder="little").view("<i4"),
        f"{name}.weight_scale": scale,
        f"{name}.weight_shape": np.array(weight.shape, dtype=np.int64),
    }


def safetensors_bytes(tensors: dict[str, np.ndarray]) -> bytes:
    """The file: header length, header padded with blanks to eight bytes, then wide types before narrow ones."""
    ordered = sorted(tensors.items(), key=lambda item: -item[1].itemsize)
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, tensor in ordered:
        end = offset + tensor.nbytes
        header[name] = {"dtype": DTYPES[tensor.dtype.name], "shape": tensor.shape, "data_offsets": [offset, end]}
        offset = end
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    return struct.pack("<Q", len(raw)) + raw + b"".join(tensor.tobytes() for _, tensor in ordered)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("golden") / "source"
    path.mkdir()
    (path / "config.json").write_text(json.dumps(CONFIG))
    save_file({f"{name}.weight": weight for name, weight in source_weights().items()}, path / "model.safetensors")
    return path


@pytest.mark.parametrize("scheme", ["w8a8", "w4a16g32", "w4a8g32", "w3a16g32", "w2a16g32", "w7a16g32"])
def test_every_byte_of_the_weights_is_as_described(source: Path, scheme: str, tmp_path: Path) -> None:
    compress(source, scheme, tmp_path / "out")
    expected: dict[str, np.ndarray] = {}
    for name, weight in source_weights().items():
        expected |= stored(name, weight, scheme)
    assert (tmp_path / "out/model.safetensors").read_bytes() == safetensors_bytes(expected)


@pytest.mark.parametrize(
    "scheme", ["w4a16g32", "sparse24:w8a16+residual4", "lowrank16:bf16", "lowrank24:w8a8+residual2"]
)
def test_the_id_depends_on_source_and_recipe_alone(source: Path, scheme: str, tmp_path: Path) -> None:
    """However many threads work, and whatever was computed before."""
    threads, ids = torch.get_num_threads(), set()
    try:
        for number in (1, 2, 3):
            torch.set_num_threads(number)
            ids.add(compress(source, scheme, tmp_path / f"out{number}").id)
    finally:
        torch.set_num_threads(threads)
    assert len(ids) == 1
    assert compress(source, "w5a16g32", tmp_path / "other").id not in ids
