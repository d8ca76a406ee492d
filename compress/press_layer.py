"""Presses one layer of the decoder with statistics of its inputs, group by group in the order in which they run."""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from pressd.compress.block_work import WORK, BlockWork
from pressd.compress.cost import Clock
from pressd.compress.equalise_layer import equalise
from pressd.compress.group_plan import GroupPlan
from pressd.compress.histogram import Histogram
from pressd.compress.observers import OBSERVERS
from pressd.compress.pass_options import Awq, Gptq, Smooth, Static
from pressd.compress.plan import Plan
from pressd.compress.planned_group import Loss, planned_group
from pressd.compress.press_linear import press_linear
from pressd.compress.quantise_group import encode_members, quantise
from pressd.compress.rows import squared_norms
from pressd.compress.statistics import Statistics, Wanted, gather
from pressd.compress.streams import LayerPass
from pressd.runtime.artifact.manifest import PlannedGroup
from pressd.runtime.artifact.specs import Packed
from pressd.runtime.kernels.fp8 import format as fp8
from pressd.runtime.models.loading import GROUP_KINDS

# Where a static scale's largest value goes, by the type of the codes.
_ENDS = {"int8": 127.5, fp8.NAME: fp8.LARGEST}


def press_layer(
    layer: LayerPass, source: LayerPass | None, work: BlockWork, plan: Plan, clock: Clock
) -> list[PlannedGroup]:
    """Press every group of a layer; `layer` is at its end afterwards, and `work` holds what is to be stored.

    `source` is the same layer as it was, over streams of its own, if passes compare with it. Raises ValueError if
    inputs are not finite.
    """
    done = []
    for kind in GROUP_KINDS:
        group = work.group(kind)
        with clock.scheme(group.scheme):
            if plan.recipe.pass_of(Smooth) or plan.recipe.pass_of(Awq):
                with clock.step("equalise"):
                    equalise(layer, work, kind, plan)
            theirs = None if source is None else _divided(source.inputs(kind), work.divisor(group))
            statistics = collect(layer.inputs(kind), layer.num_lanes, group, plan, clock, theirs)
            done.append(press_group(work, group, statistics, plan, clock))
        if kind == "qkv" and work.plan.kv_scales:
            with clock.step("static"):
                _measure_kv(layer, work, plan)
        with clock.step("forward"):
            layer.advance(kind)
            if source is not None:
                source.advance(kind)
    return done


def _divided(inputs: Iterable[tuple[int, Tensor]], divisor: Tensor | None) -> Iterator[Tensor]:
    """The source's inputs as they would be if they had been rescaled like ours."""
    for _, x in inputs:
        yield x if divisor is None else x / divisor.to(x.device)


def collect(
    inputs: Iterable[tuple[int, Tensor]],
    num_lanes: int,
    group: GroupPlan,
    plan: Plan,
    clock: Clock,
    source: Iterable[Tensor] | None = None,
) -> Statistics | None:
    """Return what pressing this group needs to know of its inputs, None if that is nothing."""
    wanted = _wanted(group, plan)
    if wanted.nothing:
        return None
    with clock.step("statistics"):
        return gather(inputs, num_lanes, wanted, group.group.name, source)


def press_group(
    work: BlockWork, group: GroupPlan, statistics: Statistics | None, plan: Plan, clock: Clock
) -> PlannedGroup:
    """Decide how every member of a group is stored and hand that to `work`."""
    input_scale = None
    if statistics is not None and group.has_static_activations:
        input_scale = _input_scale(group, statistics, plan)
    if statistics is None or not group.is_rounded_with_text:
        return _press_alone(work, group, input_scale, plan)
    packed = [spec for spec in group.specs.values() if isinstance(spec, Packed)]
    weight = work.weight(group)
    gptq = plan.recipe.pass_of(Gptq)
    assert statistics.gram is not None
    with clock.step("gptq" if gptq else "rtn"):
        found = quantise(
            weight.to(statistics.gram.device), packed, statistics, gptq, clip=_clips(plan), dtype=plan.dtype
        )
        stored = encode_members(found, packed, input_scale)
    values = found.values.cpu()
    norms = squared_norms(weight, lambda rows, wide: values[rows].to(wide))
    for prefix, tensors in zip(group.specs, stored, strict=True):
        work.store(prefix, tensors)
    return planned_group(
        group,
        plan.dtype,
        Loss(lost=norms[0], total=norms[1], output_error=found.output_error),
        passes=plan.passes_of(group),
        fallback=found.fallback,
        notes=(*work.notes[group.group.name], *found.notes),
    )


def _press_alone(work: BlockWork, group: GroupPlan, input_scale: Tensor | None, plan: Plan) -> PlannedGroup:
    """Press every member by its weight alone."""
    lost = total = 0.0
    for prefix, spec in group.specs.items():
        weight = work.member(prefix)
        tensors, norms = press_linear(weight, weight.to(plan.dtype), spec, input_scale=input_scale)
        work.store(prefix, tensors)
        lost, total = lost + norms[0], total + norms[1]
    return planned_group(
        group,
        plan.dtype,
        Loss(lost=lost, total=total),
        passes=plan.passes_of(group),
        notes=tuple(work.notes[group.group.name]),
    )


def _wanted(group: GroupPlan, plan: Plan) -> Wanted:
    return Wanted(gram=group.is_rounded_with_text, histogram=group.has_static_activations)


def _clips(plan: Plan) -> bool:
    """Whether the ends of grids are searched; a pass that says nothing of it leaves them at the largest weight."""
    return any(options.clip for options in (plan.recipe.pass_of(Gptq), plan.recipe.pass_of(Awq)) if options)


def _measure_kv(layer: LayerPass, work: BlockWork, plan: Plan) -> None:
    """Measure the scales of keys and values, which the pressed group makes."""
    options = plan.recipe.pass_of(Static)
    assert options is not None
    assert options.kv is not None
    layer.settle("qkv")
    histograms: list[Histogram] = []
    for pair in layer.keys_and_values():
        counted = [Histogram.of(one) for one in pair]
        histograms = counted if not histograms else [a.merged(b) for a, b in zip(histograms, counted, strict=True)]
    for name, histogram in zip(work.plan.kv_scales, histograms, strict=True):
        if not bool(torch.isfinite(histogram.top)):
            raise ValueError(f"{name}: keys or values are not finite on the calibration text; the source overflows")
        work.others[name] = _scale(histogram, options, options.kv, plan.dtype)


def _scale(histogram: Histogram, options: Static, kind: str, dtype: torch.dtype) -> Tensor:
    """The static scale [1] that ends where the observer says."""
    threshold = OBSERVERS[options.observer](histogram, options.percentile)
    scale = torch.tensor([threshold / _ENDS[kind]], dtype=WORK).to(dtype)
    return scale.clamp_min(torch.finfo(dtype).tiny)


def _input_scale(group: GroupPlan, statistics: Statistics, plan: Plan) -> Tensor:
    """The scale of a group's inputs, whose codes are of the type that its weights have."""
    options = plan.recipe.pass_of(Static)
    assert options is not None, "the plan asks for the pass that static activations need"
    assert statistics.histogram is not None
    storage = next(
        leaf.storage for spec in group.specs.values() for _, leaf in spec.leaves() if leaf.static_activations
    )
    return _scale(statistics.histogram, options, storage, plan.dtype)
