"""What loading does with fused groups, tied heads and memory."""

from pathlib import Path

import pytest
import torch

from pressd.compress import compress
from pressd.compress.recipe import parse_recipe
from pressd.runtime.artifact.reader import Checkpoint
from pressd.runtime.layers.linear import Linear, UnfusedLinear
from pressd.runtime.models import load_decoder

CPU = torch.device("cpu")


def test_groups_are_fused_and_the_tied_head_is_the_embedding(tiny_llama_tied: Path) -> None:
    checkpoint = Checkpoint.open(tiny_llama_tied)
    decoder = load_decoder(checkpoint, device=CPU, dtype=torch.float32)
    assert decoder.unfused_groups == 0
    assert isinstance(decoder.head, Linear)
    assert decoder.head.packed["weight"].data_ptr() == decoder.embedding.data_ptr()
    qkv = decoder.blocks[0].attention.qkv
    assert isinstance(qkv, Linear)
    assert (qkv.problem.out_features, qkv.problem.in_features) == (128, 64)
    # Nothing is held twice: what is in memory is what is on disk.
    assert decoder.weights_bytes == checkpoint.dense_bytes


def test_members_that_disagree_run_apart_and_agree_with_the_whole(tiny_llama: Path, tmp_path: Path) -> None:
    """A foreign file whose gate is stored otherwise than its up: counted, and computed all the same."""
    compress(tiny_llama, parse_recipe('[scheme]\n"*" = "w8a16"\n', "recipe"), tmp_path / "pressed")
    pressed = Checkpoint.open(tmp_path / "pressed")
    split = _Disagreeing(pressed, Checkpoint.open(tiny_llama))
    decoder = load_decoder(split, device=CPU, dtype=torch.float64)
    assert decoder.unfused_groups == 2
    gate_up = decoder.blocks[1].mlp.gate_up
    assert isinstance(gate_up, UnfusedLinear)
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    fused = load_decoder(pressed, device=CPU, dtype=torch.float64).blocks[1].mlp.gate_up
    dense = split.tensor("model.layers.1.mlp.gate_proj.weight").double()
    torch.testing.assert_close(gate_up(x)[:, :160], x @ dense.T)
    torch.testing.assert_close(gate_up(x)[:, 160:], fused(x)[:, 160:])


class _Disagreeing(Checkpoint):
    """`pressed` with the gate of every block taken from `dense`."""

    def __init__(self, pressed: Checkpoint, dense: Checkpoint) -> None:
        self.__dict__.update(pressed.__dict__)
        self._dense = dense

    def linear(self, prefix: str):  # type: ignore[no-untyped-def]
        return self._dense.linear(prefix) if "gate_proj" in prefix else super().linear(prefix)

    def linear_tensors(self, prefix: str) -> dict[str, torch.Tensor]:
        return self._dense.linear_tensors(prefix) if "gate_proj" in prefix else super().linear_tensors(prefix)

    def tensor(self, name: str) -> torch.Tensor:
        return self._dense.tensor(name) if "gate_proj" in name else super().tensor(name)


@pytest.mark.parametrize(("scheme", "bits"), [("w4a16g32", 4.5), ("w8a16", 8.0)])
def test_pressed_weights_stay_pressed_in_memory(
    tiny_llama_tied: Path, tmp_path: Path, scheme: str, bits: float
) -> None:
    compress(tiny_llama_tied, scheme, tmp_path / "out")
    checkpoint = Checkpoint.open(tmp_path / "out")
    decoder = load_decoder(checkpoint, device=CPU, dtype=torch.bfloat16)
    linears = 2 * (128 * 64 + 64 * 64 + 320 * 64 + 64 * 160)
    # Scales of the source's float32 count 32 bits, or 16 where the kernel keeps bfloat16; besides, at most a
    # sixteenth for what kernels note by row.
    kept_dense = 97 * 64 * 2 + 5 * 64 * 2
    assert kept_dense < decoder.weights_bytes <= kept_dense + linears * (bits + 0.5) / 8 * (1 + 1 / 16) + 4 * 1376
