"""Rescales channels of one layer before its groups are rounded: SmoothQuant's rule, AWQ's search, or both in turn."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from pressd.compress.block_work import BlockWork
from pressd.compress.grid import fit, of_members
from pressd.compress.pass_options import Awq, Smooth
from pressd.compress.passes.equalize import search_scales, smooth_scales
from pressd.compress.plan import Plan
from pressd.compress.statistics import Wanted, gather
from pressd.compress.streams import LayerPass
from pressd.compress.transforms import NORMS, fold_into_norm, fold_into_rows, shared_by_heads
from pressd.runtime.artifact.specs import Packed

# What must be rescaled while the group that makes its inputs is not final yet.
_AHEAD = {"qkv": "o", "gate_up": "down"}


def equalise(layer: LayerPass, work: BlockWork, kind: str, plan: Plan) -> None:
    """Rescale the inputs of the group of this kind, and of the one that it makes the inputs of."""
    smooth, awq = plan.recipe.pass_of(Smooth), plan.recipe.pass_of(Awq)
    if kind not in NORMS:
        return
    if smooth is not None and work.group(kind).is_rounded_with_text:
        _smooth(layer, work, kind, smooth)
    if awq is not None:
        for reader in (kind, _AHEAD[kind]):
            if work.group(reader).is_rounded_with_text:
                _search(layer, work, reader, plan, awq)


def _smooth(layer: LayerPass, work: BlockWork, kind: str, options: Smooth) -> None:
    group = work.group(kind)
    statistics = gather(layer.inputs(kind), layer.num_lanes, Wanted(channels=True), group.group.name)
    assert statistics.largest is not None
    scales = smooth_scales(statistics.largest.cpu(), work.weight(group), options.alpha)
    fold_into_norm(work, group, scales)
    layer.reload()


def _search(layer: LayerPass, work: BlockWork, kind: str, plan: Plan, options: Awq) -> None:
    group, attention = work.group(kind), plan.model.attention
    statistics = gather(layer.inputs(kind), layer.num_lanes, Wanted(gram=True, channels=True), group.group.name)
    assert statistics.gram is not None
    assert statistics.mean is not None
    heads = (attention.num_kv_heads, attention.num_heads)
    mean = shared_by_heads(statistics.mean.clamp_min(1e-9), *heads) if kind == "o" else statistics.mean
    weight = work.weight(group).to(mean.device)
    scales, without, with_it = search_scales(
        mean, statistics.gram, weight, rounding(group.packed(), plan.dtype), steps=options.steps
    )
    work.notes[group.group.name].append(f"awq: {(with_it / without if without else 1.0):.3f} of the loss")
    if kind in NORMS:
        fold_into_norm(work, group, scales.cpu())
    else:
        fold_into_rows(work, group, scales.cpu(), *heads)
    layer.reload()


def rounding(specs: Sequence[Packed], dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    """Return what rounds rows [R, C] of members with `specs` to nearest, as they would be stored."""

    def nearest(weight: Tensor) -> Tensor:
        return of_members(weight, specs, lambda part, spec: fit(part, spec, dtype)).by_column().nearest(weight)

    return nearest
