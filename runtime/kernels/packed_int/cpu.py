"""W4A16 through PyTorch's packed int4 kernel, bfloat16 on any x86; many rows widen the same packed bytes to float32."""

import functools

import torch

from pressd.runtime.kernels.packed_int import format as disk
from pressd.runtime.kernels.registry import Device, LinearKernel, LinearProblem, Tensors
from pressd.runtime.kernels.widened import TILE_ELEMENTS

GROUP_SIZES = (32, 64, 128, 256)
# Rows up to which the packed kernel beats widening, on 2 Zen 3 cores at 2048 x 2048 (tests/bench/linears.py).
FEW_ROWS = 64
INNER_K_TILES = 1  # the CPU operator ignores it


def why_not(problem: LinearProblem, device: Device) -> str | None:
    if device.kind != "cpu":
        return f"runs on the CPU only, not on {device.kind}"
    if problem.bits != 4:
        return f"serves 4 bits, not {problem.bits}"
    if problem.dtype != torch.bfloat16:
        return f"is fast in bfloat16 only, not in {problem.dtype}"
    if problem.group_size not in GROUP_SIZES:
        return f"serves groups of {GROUP_SIZES}, not {problem.group_size}"
    if problem.out_features % 16:
        return f"needs a multiple of 16 output rows, not {problem.out_features}"
    return None


def pack(tensors: Tensors, problem: LinearProblem, device: Device) -> Tensors:
    codes = disk.unpack(tensors["weight_packed"], problem.bits, problem.in_features).to(torch.int32) + 8
    scale = tensors["weight_scale"].to(torch.bfloat16).T
    return {
        "packed": torch._convert_weight_to_int4pack_for_cpu(codes, INNER_K_TILES),
        "scales_and_zeros": torch.stack([scale, torch.zeros_like(scale)], dim=-1).contiguous(),
    }


def run(x: torch.Tensor, packed: Tensors, problem: LinearProblem) -> torch.Tensor:
    block, columns = _packed_columns()
    if x.size(0) == 0:
        return x.new_zeros(0, problem.out_features)
    if x.size(0) <= FEW_ROWS or problem.out_features % block:
        result: torch.Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(
            x, packed["packed"], problem.group_size, packed["scales_and_zeros"]
        )
        return result
    return _run_widened(x, packed, problem, block, columns)


def _run_widened(
    x: torch.Tensor, packed: Tensors, problem: LinearProblem, block: int, columns: torch.Tensor
) -> torch.Tensor:
    """Multiply in float32, a few blocks of output columns at a time, straight from the packed bytes."""
    assert problem.group_size is not None
    in_features, num_blocks = problem.in_features, problem.out_features // block
    nibbles = packed["packed"].view(num_blocks, in_features, block // 2)
    scale = packed["scales_and_zeros"][..., 0].view(-1, num_blocks, block)[..., columns].transpose(0, 1).float()
    wide = x.float()
    output = torch.empty(x.size(0), num_blocks, block, dtype=torch.float32)
    step = max(1, TILE_ELEMENTS // (in_features * block))
    for start in range(0, num_blocks, step):
        part = nibbles[start : start + step]
        tile = torch.empty(part.size(0), in_features, block, dtype=torch.float32)
        tile[..., : block // 2] = part & 15
        tile[..., block // 2 :] = part >> 4
        tile.sub_(8).view(part.size(0), -1, problem.group_size, block).mul_(scale[start : start + step].unsqueeze(2))
        output[:, start : start + step, columns] = (wide @ tile).transpose(0, 1)
    return output.flatten(1).to(problem.dtype)


@functools.cache
def _packed_columns() -> tuple[int, torch.Tensor]:
    """Ask the operator how it lays a block out: (rows per block, their order with all low nibbles before the high).

    The layout differs between instruction sets and is documented nowhere: a weight that spells its own row numbers is
    packed, and what comes out is read.
    """
    rows, in_features = 128, 2
    numbers = torch.arange(rows, dtype=torch.int32)[:, None].expand(rows, in_features)
    digits = [
        torch._convert_weight_to_int4pack_for_cpu((numbers >> shift & 15).contiguous(), INNER_K_TILES)
        for shift in (0, 4)
    ]
    low = ((digits[0] & 15) + (digits[1] & 15) * 16).flatten().long()
    high = ((digits[0] >> 4) + (digits[1] >> 4) * 16).flatten().long()
    for block in (16, 32, 64, 128):
        half = block // 2
        columns = torch.cat([low[:half], high[:half]])
        if sorted(columns.tolist()) == list(range(block)):
            return block, columns
    raise RuntimeError(
        "PyTorch packs int4 weights in a layout this build does not know; serve with --kernels reference"
    )


KERNEL = LinearKernel(name="cpu-int4", storage=disk.NAME, why_not=why_not, pack=pack, run=run)
