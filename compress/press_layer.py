"""Presses one layer of the decoder with statistics of its inputs, group by group in the order in which they run."""

from collections.abc import Iterator

import torch
from torch import Tensor

from pressd.compress.block_work import BlockWork
from pressd.compress.cost import Clock
from pressd.compress.decision import Decision
from pressd.compress.equalise_layer import equalise
from pressd.compress.histogram import Histogram
from pressd.compress.pass_options import Awq, Gptq, Round, Smooth, Static
from pressd.compress.plan import Plan
from pressd.compress.press_group import collect, describe, press_group, static_scale
from pressd.compress.statistics import SourceInputs
from pressd.compress.streams import LayerPass
from pressd.compress.tune_layer import tune
from pressd.runtime.artifact.manifest import PlannedGroup
from pressd.runtime.models.loading import GROUP_KINDS

# Groups whose outputs are added to the residual stream.
_WRITES = ("o", "down")


def press_layer(
    layer: LayerPass, source: LayerPass | None, work: BlockWork, plan: Plan, clock: Clock, seed: int
) -> list[PlannedGroup]:
    """Press every group of a layer; `layer` is at its end afterwards, and `work` holds what is to be stored.

    `source` is the same layer as it was, over streams of its own, if passes compare with it. `seed` is for what is
    random about tuning. Raises ValueError if inputs are not finite.
    """
    pressed: dict[str, Decision | PlannedGroup] = {}
    options = plan.recipe.pass_of(Round)
    begun = [] if options is None else [stream.x for stream in layer.streams]
    gptq = plan.recipe.pass_of(Gptq)
    compared = source if gptq is not None and gptq.correct else None
    for kind in GROUP_KINDS:
        group = work.group(kind)
        with clock.scheme(group.scheme):
            if plan.recipe.pass_of(Smooth) or plan.recipe.pass_of(Awq):
                with clock.step("equalise"):
                    equalise(layer, work, kind, plan)
            theirs = None if compared is None else _beside(layer, compared, kind, work.divisor(group))
            statistics = collect(layer.inputs(kind), layer.num_lanes, group, clock, theirs)
            decided = press_group(work, group, statistics, plan, clock)
            # What nobody will change any more need not be held.
            pressed[kind] = describe(decided, work, plan) if options is None else decided
            layer.settle(kind)
        if kind == "qkv" and work.plan.kv_scales:
            with clock.step("static"):
                _measure_kv(layer, work, plan)
        with clock.step("forward"):
            layer.advance(kind)
            if source is not None:
                source.advance(kind)
    if options is not None and source is not None:
        with clock.step("round"):
            pressed |= _tune(layer, source, begun, pressed, work, options, seed, leans=gptq is None)
    return [describe(one, work, plan) for one in pressed.values()]


def _tune(
    layer: LayerPass,
    source: LayerPass,
    begun: list[Tensor],
    pressed: dict[str, Decision | PlannedGroup],
    work: BlockWork,
    options: Round,
    seed: int,
    *,
    leans: bool,
) -> dict[str, Decision]:
    """Tune what can be, and go through the layer once more with what came out."""
    decisions = {kind: one for kind, one in pressed.items() if isinstance(one, Decision)}
    tuned, part = tune(layer, begun, source.streams, decisions, options, seed, leans=leans)
    for decision in tuned.values():
        work.notes[decision.group.group.name].append(f"round: {part:.3f} of the layer's squared error")
    if part < 1:
        for kind, decision in tuned.items():
            decision.store(work)
            layer.settle(kind)
        for stream, x in zip(layer.streams, begun, strict=True):
            stream.x = x
        for kind in GROUP_KINDS:
            layer.advance(kind)
    return tuned


def _beside(layer: LayerPass, source: LayerPass, kind: str, divisor: Tensor | None) -> Iterator[SourceInputs]:
    """What the source has for every stream; its inputs as they would be if they had been rescaled like ours."""
    pairs = zip(source.inputs(kind), source.streams, layer.streams, strict=True)
    for (_, x), theirs, ours in pairs:
        lag = theirs.x - ours.x if kind in _WRITES else None
        yield SourceInputs(inputs_TC=x if divisor is None else x / divisor.to(x.device), lag_TR=lag)


def _measure_kv(layer: LayerPass, work: BlockWork, plan: Plan) -> None:
    """Measure the scales of keys and values, which the pressed group makes."""
    options = plan.recipe.pass_of(Static)
    assert options is not None
    assert options.kv is not None
    histograms: list[Histogram] = []
    for pair in layer.keys_and_values():
        counted = [Histogram.of(one).to(torch.device("cpu")) for one in pair]  # streams may be on several devices
        histograms = counted if not histograms else [a.merged(b) for a, b in zip(histograms, counted, strict=True)]
    for name, histogram in zip(work.plan.kv_scales, histograms, strict=True):
        if not bool(torch.isfinite(histogram.top)):
            raise ValueError(f"{name}: keys or values are not finite on the calibration text; the source overflows")
        work.others[name] = static_scale(histogram, options, options.kv, plan.dtype)
