"""The layout of 2- to 8-bit codes in memory: what goes in comes out, as PyTorch's product reads it."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pressd.runtime.kernels.packed_int import cpu, nibbles
from pressd.runtime.kernels.packed_int import format as packed_int
from pressd.runtime.kernels.registry import LinearProblem, Tensors, describe_device

CPU = describe_device(torch.device("cpu"))
PROBLEM = LinearProblem(
    storage=packed_int.NAME,
    bits=3,
    group_size=32,
    activation_bits=16,
    out_features=16,
    in_features=64,
    dtype=torch.float32,
)


def pack(codes: torch.Tensor, bits: int, block: int, max_rows: int) -> Tensors:
    parts = [nibbles.pack(codes[tile.rows], bits, tile) for tile in nibbles.tiles(codes.size(0), max_rows, block)]
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


@given(
    bits=st.integers(2, 8),
    rows=st.integers(1, 14),
    columns=st.integers(1, 4),
    block=st.sampled_from([32, 64]),
    max_rows=st.tuples(st.integers(1, 300), st.integers(1, 300)),
    seed=st.integers(0, 2**32 - 1),
)
def test_codes_come_back_by_tile_and_by_row(
    bits: int, rows: int, columns: int, block: int, max_rows: tuple[int, int], seed: int
) -> None:
    """With either block that PyTorch uses, whatever tiles it was packed in and is read in, in `bits` bits a code."""
    generator = torch.Generator().manual_seed(seed)
    shape = (16 * rows, 32 * columns)
    codes = torch.randint(-(1 << (bits - 1)), 1 << (bits - 1), shape, generator=generator).to(torch.int8)
    packed = pack(codes, bits, block, max_rows[0])
    assert sum(plane.nbytes for plane in packed.values()) * 8 == codes.numel() * bits

    found = torch.zeros(shape, dtype=torch.int16)
    for tile in nibbles.tiles(shape[0], max_rows[1], block):
        low, high = nibbles.signed_bytes(nibbles.expand(packed, bits, shape[1], tile))
        # [blocks, columns, bytes] of each half: one after the other, or in turn.
        pairs = torch.stack([low, high], dim=3 if tile.is_remainder else 2).flatten(2)
        found[tile.rows] = pairs.transpose(1, 2).reshape(tile.num_rows, -1).to(torch.int16)
    assert torch.equal(found, codes.to(torch.int16) << (8 - bits))

    ids = torch.randint(0, shape[0], (7,), generator=generator)
    gathered = nibbles.gather(ids, packed, bits, *shape, block)
    assert torch.equal(gathered.to(torch.int16), codes[ids].to(torch.int16) << (8 - bits))


@pytest.mark.skipif(nibbles.block_rows() is None, reason="PyTorch packs in another way here")
@pytest.mark.parametrize("rows", [16, 32, 48, 64, 80, 128, 176])
def test_four_bits_lie_as_pytorch_packs_them(rows: int) -> None:
    block = nibbles.block_rows()
    assert block is not None
    codes = torch.randint(-8, 8, (rows, 96), generator=torch.Generator().manual_seed(rows)).to(torch.int8)
    theirs = torch._convert_weight_to_int4pack_for_cpu(codes.int() + 8, 1)
    (ours,) = pack(codes, 4, block, 1 << 20).values()
    assert torch.equal(ours, theirs.flatten())


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"out_features": 24}, "needs multiples of 16 x 32, not 24 x 64"),
        ({"in_features": 80}, "needs multiples of 16 x 32, not 16 x 80"),
        ({"group_size": 16}, "serves groups of [32, 64, 128, 256] or whole rows, not of 16"),
        ({"dtype": torch.float64}, "computes in float32 at most, not in torch.float64"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(change: dict[str, object], reason: str) -> None:
    assert cpu.why_not(PROBLEM, CPU) is None
    assert cpu.why_not(replace(PROBLEM, **change), CPU) == reason  # type: ignore[arg-type]


def test_another_layout_of_pytorchs_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Packed bytes that differ from ours in one place: no block fits."""

    def shuffled(codes: torch.Tensor, tiles: int) -> torch.Tensor:
        return torch.zeros(codes.size(0), codes.size(1) // 2, dtype=torch.uint8)

    monkeypatch.setattr(torch, "_convert_weight_to_int4pack_for_cpu", shuffled)
    nibbles.block_rows.cache_clear()
    try:
        assert cpu.why_not(PROBLEM, CPU) == "PyTorch packs int4 weights in a layout that it does not know"
    finally:
        nibbles.block_rows.cache_clear()
