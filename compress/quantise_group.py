"""Rounds the rows of one fused group together, by what the recipe says, and stores each member.

Members share their inputs, hence one Gram matrix and one sweep; each is stored under its own name.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from pressd.compress.encoding import encode
from pressd.compress.grid import Grid, fit, of_members, search
from pressd.compress.pass_options import Gptq
from pressd.compress.passes.descent import refine
from pressd.compress.passes.gptq import SingularError, gptq, match_source
from pressd.compress.passes.loss import output_error
from pressd.compress.statistics import Statistics
from pressd.runtime.artifact.specs import Packed
from pressd.runtime.kernels.fp8 import format as fp8
from pressd.runtime.kernels.registry import Tensors

_SINGULAR = "rtn: the Hessian is singular"


@dataclass(frozen=True, slots=True, kw_only=True)
class Quantised:
    """Codes [R, C] as float on a grid; what was used in the end, and what the manifest should say about it.

    `output_error` is how much the outputs change for the calibration's inputs, as a part of them (root mean square).
    """

    grid: Grid
    codes: Tensor
    output_error: float
    fallback: str | None = None
    notes: tuple[str, ...] = ()

    @property
    def values(self) -> Tensor:
        """The weights that the codes stand for, float32 [R, C]."""
        return self.grid.by_column().values(self.codes)


def quantise(
    weight: Tensor,
    specs: list[Packed],
    statistics: Statistics,
    options: Gptq | None,
    *,
    clip: bool,
    dtype: torch.dtype,
) -> Quantised:
    """Round weight float32 [R, C], the rows of members with `specs`, by GPTQ or (options None) to nearest.

    `clip` searches the ends of the grid, by what the outputs of each group lose where rounding is to nearest.
    """
    gram = statistics.gram
    assert gram is not None
    fallback: str | None = None
    if options is not None and statistics.cross is not None:
        try:
            weight = match_source(weight, gram, statistics.cross, statistics.lag, damp=options.damp)
        except SingularError:
            options, fallback = None, _SINGULAR
    if clip and specs[0].block_size is None:
        importance = None if options is not None else _importance(gram, specs[0])
        levels = of_members(weight, specs, lambda part, spec: search(part, spec, dtype, importance))
    else:
        levels = of_members(weight, specs, lambda part, spec: fit(part, spec, dtype))
    columns = levels.by_column()
    notes: tuple[str, ...] = ()
    if options is None:
        codes = columns.codes(weight)
    else:
        try:
            rounded = gptq(weight, gram, columns, damp=options.damp, act_order=options.act_order)
            sweeps = options.sweeps if specs[0].block_size is None else 0
            levels, codes = refine(weight, gram, levels, rounded.codes, sweeps=sweeps)
            if rounded.damp > options.damp:
                notes = (f"damped by {rounded.damp:g} of the mean diagonal",)
        except SingularError:
            codes, fallback = columns.codes(weight), _SINGULAR
    total = output_error(weight, gram)
    lost = output_error(levels.by_column().values(codes) - weight, gram)
    relative = math.sqrt(lost / total) if total else 0.0
    return Quantised(grid=levels, codes=codes, output_error=relative, fallback=fallback, notes=notes)


def encode_members(quantised: Quantised, specs: list[Packed], input_scale: Tensor | None) -> list[Tensors]:
    """Return the tensors to store for each member."""
    grid, stored, start = quantised.grid, [], 0
    for spec in specs:
        rows = slice(start, start + spec.out_features)
        start += spec.out_features
        codes = quantised.codes[rows].cpu().to(fp8.CODES if spec.storage == fp8.NAME else torch.int8)
        scale = grid.scale[rows].cpu()
        if spec.block_size is not None:
            scale = scale[:: spec.block_size]
        zero = None if grid.zero_point is None else grid.zero_point[rows].cpu().to(torch.int8)
        tensors = encode(codes, scale.to(grid.dtype).contiguous(), spec, zero_point=zero, input_scale=input_scale)
        stored.append(tensors)
    return stored


def _importance(gram: Tensor, spec: Packed) -> Tensor:
    """How errors count where each weight is rounded by itself: together within a group, by their columns in a row."""
    if spec.group_size is None:
        return gram.diagonal()
    blocks = gram.view(gram.size(0) // spec.group_size, spec.group_size, -1, spec.group_size)
    return blocks.diagonal(dim1=0, dim2=2).permute(2, 0, 1).contiguous()
