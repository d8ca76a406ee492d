"""Coordinate descent on codes and scales, from where a pass has left them: the loss cannot grow.

R rows, C columns, G groups. The loss is the mean squared change of the outputs, known from the inputs' gram [C, C].
"""

import dataclasses

import torch
from torch import Tensor

from pressd.compress.grid import Columns, Grid

_BLOCK = 128


def refine(weight: Tensor, gram: Tensor, grid: Grid, codes: Tensor, *, sweeps: int) -> tuple[Grid, Tensor]:
    """Return grid and codes [R, C] that suit weight [R, C] better: `sweeps` times all scales, then all codes."""
    for _ in range(sweeps):
        grid = rescale(weight, gram, grid, codes)
        codes = descend(weight, gram, grid.by_column(), codes)
    return grid, codes


def descend(weight: Tensor, gram: Tensor, levels: Columns, codes: Tensor) -> Tensor:
    """Return codes [R, C] after each in turn went where it fits best, given all others.

    GPTQ never looks back at a column, this does (Behdin et al. 2023, https://arxiv.org/abs/2309.01885).
    """
    # Transposed, so that a column is one piece of memory.
    levels, moving = levels.transposed(), codes.T.contiguous()
    values = levels.values(moving)
    pull = gram @ (values - weight.T)
    energy = gram.diagonal()
    order = energy.argsort(descending=True, stable=True)
    columns = order[energy[order] > 0].tolist()
    for start in range(0, len(columns), _BLOCK):
        block = columns[start : start + _BLOCK]
        own, inner = pull[block], gram[block][:, block]
        moved = torch.empty_like(own)
        for index, column in enumerate(block):
            part = levels[column]
            moving[column] = part.codes(values[column] - own[index] / energy[column])
            torch.sub(part.values(moving[column]), values[column], out=moved[index])
            values[column] += moved[index]
            own[index + 1 :].addr_(inner[index, index + 1 :], moved[index])
        pull += gram[:, block] @ moved
    return moving.T.contiguous()


def rescale(weight: Tensor, gram: Tensor, grid: Grid, codes: Tensor) -> Grid:
    """Return the grid whose every scale, group after group, fits best to codes [R, C] that stay as they are.

    A scale that would become zero or negative, or lose by being rounded to its stored type, stays.
    """
    size = grid.group_size
    steps = codes if grid.zero_point is None else codes - grid.zero_point.repeat_interleave(size, dim=1)
    scale = grid.scale.clone()
    pull = (steps * scale.repeat_interleave(size, dim=1) - weight) @ gram
    for group in range(scale.size(1)):
        part = slice(group * size, (group + 1) * size)
        own = steps[:, part]
        curvature = ((own @ gram[part, part]) * own).sum(1)
        slope = (own * pull[:, part]).sum(1)
        wanted = scale[:, group] - slope / curvature.clamp_min(torch.finfo(gram.dtype).tiny)
        wanted = wanted.to(grid.dtype).to(scale.dtype)
        change = wanted - scale[:, group]
        gain = -change * (2 * slope + change * curvature)
        usable = (curvature > 0) & (wanted > 0) & torch.isfinite(wanted) & (gain > 0)
        change = torch.where(usable, change, 0.0)
        scale[:, group] += change
        pull += (change[:, None] * own) @ gram[part]
    return dataclasses.replace(grid, scale=scale)
