"""Footprints, against a census of the stored tensors and torch's own counter of operations."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from pressd.compress import compress
from pressd.compress.footprint import footprint
from pressd.runtime.artifact.reader import Checkpoint


def stored(path: Path, *, without: str = " ") -> int:
    """Bytes of all tensors in the files but those of one prefix."""
    total = 0
    for file in path.glob("*.safetensors"):
        tensors = load_file(file)
        total += sum(tensor.nbytes for name, tensor in tensors.items() if not name.startswith(without))
    return total


@pytest.mark.parametrize("tied", [False, True])
def test_flops_of_a_dense_model_are_those_torch_counts(tiny_llama: Path, tiny_llama_tied: Path, tied: bool) -> None:
    from torch.utils.flop_counter import FlopCounterMode
    from transformers import AutoModelForCausalLM

    path = tiny_llama_tied if tied else tiny_llama
    model: Any = AutoModelForCausalLM.from_pretrained(path, attn_implementation="eager").eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(1, 1, dtype=torch.int64))
    found = footprint(Checkpoint.open(path), 1)
    # It counts products of matrices: the linears, and scores and values of the one token that is seen.
    assert found.flops_per_token == counter.get_total_flops()
    assert found.effective_flops_per_token == found.flops_per_token
    further = footprint(Checkpoint.open(path), 33)
    # Scores and values: 2 layers of 4 heads of 16, a multiplication and an addition each.
    assert further.flops_per_token - found.flops_per_token == 32 * 2 * 2 * 2 * 4 * 16


def test_bytes_are_those_of_the_stored_tensors(tiny_llama: Path, tiny_llama_tied: Path, tmp_path: Path) -> None:
    untied = footprint(Checkpoint.open(tiny_llama), 64)
    row = 64 * 4
    assert untied.read_bytes_per_token == stored(tiny_llama, without="model.embed_tokens.") + row
    assert untied.kv_bytes_per_token == 2 * 2 * 2 * 16 * 4
    assert footprint(Checkpoint.open(tiny_llama_tied), 64).read_bytes_per_token == stored(tiny_llama_tied) + row
    files = [path for path in tiny_llama.iterdir() if path.is_file()]
    assert untied.transfer_bytes == sum(path.stat().st_size for path in files)
    compress(tiny_llama, "w4a16g32", tmp_path / "w4")
    pressed = footprint(Checkpoint.open(tmp_path / "w4"), 64)
    embedding = stored(tmp_path / "w4") - stored(tmp_path / "w4", without="model.embed_tokens.")
    expected = stored(tmp_path / "w4", without="model.embed_tokens.") + embedding // 97
    assert pressed.read_bytes_per_token == expected < untied.read_bytes_per_token / 4
    assert pressed.transfer_bytes == sum(p.stat().st_size for p in (tmp_path / "w4").iterdir() if p.is_file())
    assert pressed.effective_flops_per_token == pressed.flops_per_token == untied.flops_per_token


def test_masks_halve_and_factors_replace_what_is_multiplied(tiny_llama: Path, tmp_path: Path) -> None:
    dense = footprint(Checkpoint.open(tiny_llama), 1)
    shapes = [m.shape for m in Checkpoint.open(tiny_llama).model.linears() if "layers" in m.prefix]
    weights = sum(rows * columns for rows, columns in shapes)
    thin = sum(8 * (rows + columns) for rows, columns in shapes)
    expected = {
        "sparse24:bf16": -weights // 2,
        "lowrank8:bf16": thin - weights,
        "w4a16g32+residual8": thin,
        "sparse24:w4a16+residual8": thin - weights // 2,
    }
    for number, (scheme, difference) in enumerate(expected.items()):
        recipe = tmp_path / f"{number}.toml"
        kinds = "".join(f'"{kind}" = "{scheme}"\n' for kind in ("qkv", "o", "gate_up", "down"))
        recipe.write_text(f"[scheme]\n{kinds}")
        compress(tiny_llama, recipe, tmp_path / f"out{number}")
        found = footprint(Checkpoint.open(tmp_path / f"out{number}"), 1)
        assert found.flops_per_token == dense.flops_per_token
        assert found.effective_flops_per_token - dense.flops_per_token == 2 * difference, scheme


def test_a_window_bounds_what_is_attended_to(tmp_path: Path) -> None:
    from transformers import MistralConfig, MistralForCausalLM

    config = MistralConfig(
        vocab_size=97,
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=64,
        sliding_window=16,
    )
    MistralForCausalLM(config).save_pretrained(tmp_path)
    found = [footprint(Checkpoint.open(tmp_path), context).attention_flops_per_token for context in (9, 16, 500)]
    assert found == [4 * 3 * seen * 2 * 16 for seen in (9, 16, 16)]
