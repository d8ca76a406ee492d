"""Int8 products on the CPU: exact where they are used, and refused where the hardware's would not be."""

from dataclasses import replace

import pytest
import torch

from pressd.runtime.kernels.int8 import cpu
from pressd.runtime.kernels.int8 import format as int8
from pressd.runtime.kernels.registry import LinearProblem, describe_device

CPU = describe_device(torch.device("cpu"))
VNNI = replace(CPU, features=frozenset({"avx512", "vnni"}))
PROBLEM = LinearProblem(
    storage=int8.NAME,
    bits=8,
    group_size=None,
    activation_bits=8,
    out_features=1024,
    in_features=2048,
    dtype=torch.float32,
)
needs_vnni = pytest.mark.skipif("vnni" not in CPU.features, reason="this CPU has no VNNI")


@needs_vnni
@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (97, 160), (31, 4099)], ids=lambda shape: "x".join(map(str, shape)))
def test_products_are_exact_at_full_range(shape: tuple[int, int]) -> None:
    """Where saturation to 16 bits would show: all codes at an end of their range, and anything between."""
    problem = replace(PROBLEM, out_features=shape[0], in_features=shape[1])
    generator = torch.Generator().manual_seed(shape[1])
    ones = torch.ones(shape[0], 1, dtype=torch.bfloat16)
    for lowest, highest in ((-128, -128), (127, 127), (-128, 127)):
        codes = torch.randint(lowest, highest + 1, shape, generator=generator).to(torch.int8)
        for kernel in (cpu.PREPACKED, cpu.BYTES):
            packed = kernel.pack(int8.encode(codes, ones), problem, CPU)
            for rows, sign in ((1, 1), (2, -1), (17, 1), (70, -1)):
                x = torch.randint(-127, 128, (rows, shape[1]), generator=generator).double()
                # 127.5 scales a row to steps of one and becomes the last code.
                x[:, :: max(1, rows % 3)] = sign * 127.5
                seen = x.round().clamp(-127, 127)
                # Whole numbers below 2^31: float32 rounds them once, here and there.
                assert torch.equal(kernel.run(x.float(), packed, problem), (seen @ codes.double().T).float())


@needs_vnni
@pytest.mark.parametrize("shape", [(64, 64), (65, 64), (1000, 704), (130, 7)], ids=lambda s: "x".join(map(str, s)))
def test_onednn_keeps_what_is_claimed_of_it(shape: tuple[int, int]) -> None:
    problem = replace(PROBLEM, out_features=shape[0], in_features=shape[1])
    tensors = int8.encode(torch.zeros(shape, dtype=torch.int8), torch.ones(shape[0], 1))
    prepacked = cpu.PREPACKED.pack(tensors, problem, CPU)["prepacked"]
    assert torch.ops.mkldnn._nbytes(prepacked) <= cpu.prepacked_bytes(problem)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"in_features": 65_794}, "sums up to 65793 columns in 32 bits, not 65794"),
        ({"activation_bits": 16}, "serves int8 activations"),
        ({"group_size": 32}, "serves 8 bits and one scale per output row"),
        ({"out_features": 272}, "would keep more than a tenth beyond 272 x 2048: blocks of 64"),
        ({"in_features": 960}, "takes longer to start than 1024 x 960 take to multiply"),
        ({"dtype": torch.float64}, "computes in float32 at most, not in torch.float64"),
    ],
)
def test_onednn_refuses_by_name(change: dict[str, object], reason: str) -> None:
    assert cpu.PREPACKED.why_not(PROBLEM, VNNI) is None
    assert cpu.PREPACKED.why_not(replace(PROBLEM, **change), VNNI) == reason  # type: ignore[arg-type]


def test_the_longest_row_is_the_longest_that_32_bits_hold() -> None:
    """Unsigned activations reach 255 and weights -128."""
    assert 65_793 * 255 * 128 < 2**31 <= 65_794 * 255 * 128
    assert cpu.PREPACKED.why_not(replace(PROBLEM, in_features=65_793), VNNI) is None


def test_without_vnni_floating_point_takes_over() -> None:
    plain = replace(CPU, features=frozenset({"avx2"}))
    assert cpu.PREPACKED.why_not(PROBLEM, plain) == "this CPU has no VNNI: its int8 products saturate at 16 bits"
    assert cpu.BYTES.why_not(PROBLEM, plain) is None


@pytest.mark.parametrize("in_features", [7, 24, 32, 40, 160])
def test_pytorchs_product_gets_what_it_can_read(in_features: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """It reads whole vectors: past the end of codes in rows that 16 does not divide, and from multiples of 16 bytes.

    Both are the end of a process, but only if nothing is mapped there: so what it is given is looked at instead.
    """
    given = []

    def look(x: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        given.append((codes.data_ptr() % 16, codes.size(1) % 16))
        return product(x, codes, scale)

    product = torch._weight_int8pack_mm
    monkeypatch.setattr(torch, "_weight_int8pack_mm", look)
    problem = replace(PROBLEM, out_features=64, in_features=in_features, dtype=torch.bfloat16)
    buffer = torch.randint(-127, 128, (64 * in_features + 64,), generator=torch.Generator().manual_seed(0))
    buffer = buffer.to(torch.int8)
    start = -buffer.data_ptr() % 16 + 8  # as a file's tensors may lie when they are mapped
    codes = buffer[start : start + 64 * in_features].view(64, in_features)
    packed = cpu.BYTES.pack(int8.encode(codes, torch.ones(64, 1)), problem, CPU)
    for rows in (1, 4, 5, 8):
        x = torch.randint(-127, 128, (rows, in_features)).bfloat16()
        x[:, 0] = 127
        expected = x.double() @ codes.double().T
        # Activations are rounded by a scale of 127 / 127.5, half a code each; the result to bfloat16.
        bound = 0.5 * codes.double().abs().sum(1) + 2**-8 * expected.abs()
        assert bool(((cpu.BYTES.run(x, packed, problem).double() - expected).abs() <= bound).all())
    assert set(given) == (set() if in_features % 16 else {(0, 0)})
