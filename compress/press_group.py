"""Presses one fused group, given statistics of its inputs or none."""

from collections.abc import Iterable

import torch
from torch import Tensor

from pressd.compress.block_work import WORK, BlockWork
from pressd.compress.cost import Clock
from pressd.compress.decision import Decision
from pressd.compress.group_plan import GroupPlan
from pressd.compress.histogram import Histogram
from pressd.compress.observers import ENDS, OBSERVERS
from pressd.compress.pass_options import Awq, Gptq, Static
from pressd.compress.plan import Plan
from pressd.compress.planned_group import Loss, planned_group
from pressd.compress.press_linear import press_linear
from pressd.compress.quantise_group import quantise
from pressd.compress.statistics import SourceInputs, Statistics, Wanted, gather
from pressd.runtime.artifact.manifest import PlannedGroup


def collect(
    inputs: Iterable[tuple[int, Tensor]],
    num_lanes: int,
    group: GroupPlan,
    clock: Clock,
    source: Iterable[SourceInputs] | None = None,
) -> Statistics | None:
    """Return what pressing this group needs to know of its inputs, None if that is nothing."""
    wanted = Wanted(gram=group.is_rounded_with_text, histogram=group.has_static_activations)
    if wanted.nothing:
        return None
    with clock.step("statistics"):
        return gather(inputs, num_lanes, wanted, group.group.name, source)


def press_group(
    work: BlockWork, group: GroupPlan, statistics: Statistics | None, plan: Plan, clock: Clock
) -> Decision | PlannedGroup:
    """Decide how a group is stored and hand that to `work`; what may still be tuned is returned as a decision."""
    input_scale = None
    if statistics is not None and group.has_static_activations:
        input_scale = _input_scale(group, statistics, plan)
    if statistics is None or not group.is_rounded_with_text:
        return _press_alone(work, group, input_scale, plan)
    specs = group.packed()
    weight = work.weight(group)
    gptq = plan.recipe.pass_of(Gptq)
    assert statistics.gram is not None
    with clock.step("gptq" if gptq else "rtn"):
        device = statistics.gram.device
        found = quantise(weight.to(device), specs, statistics, gptq, clip=clips(plan), dtype=plan.dtype)
        decision = Decision(group=group, weight=weight, quantised=found, input_scale=input_scale)
        decision.store(work)
    return decision


def describe(pressed: Decision | PlannedGroup, work: BlockWork, plan: Plan) -> PlannedGroup:
    """Return the manifest's entry of a group."""
    if isinstance(pressed, PlannedGroup):
        return pressed
    return pressed.describe(plan, tuple(work.notes[pressed.group.group.name]))


def static_scale(histogram: Histogram, options: Static, kind: str, dtype: torch.dtype) -> Tensor:
    """Return the scale [1] of codes of `kind`, int8 or fp8, that end where the observer says."""
    threshold = OBSERVERS[options.observer](histogram, kind, options.percentile)
    scale = torch.tensor([threshold / ENDS[kind]], dtype=WORK).to(dtype)
    return scale.clamp_min(torch.finfo(dtype).tiny)


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


def clips(plan: Plan) -> bool:
    """Whether the ends of grids are searched; a pass that says nothing of it leaves them at the largest weight."""
    return any(options.clip for options in (plan.recipe.pass_of(Gptq), plan.recipe.pass_of(Awq)) if options)


def _input_scale(group: GroupPlan, statistics: Statistics, plan: Plan) -> Tensor:
    """The scale of a group's inputs, whose codes are of the type that its weights have."""
    options = plan.recipe.pass_of(Static)
    assert options is not None, "the plan asks for the pass that static activations need"
    assert statistics.histogram is not None
    leaves = (leaf for spec in group.specs.values() for _, leaf in spec.leaves())
    storage = next(leaf.storage for leaf in leaves if leaf.static_activations)
    return static_scale(statistics.histogram, options, storage, plan.dtype)
