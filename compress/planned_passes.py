"""Which passes a group goes through, and whether all that a recipe names have something to do."""

from collections.abc import Sequence

from pressd.compress.group_plan import GroupPlan
from pressd.compress.pass_options import Awq, Gptq, Round, Rtn, Smooth, Static
from pressd.compress.passes.round import can_be_learnt
from pressd.compress.recipe import Recipe
from pressd.runtime.artifact.families import LM_HEAD
from pressd.runtime.artifact.schemes import Scheme
from pressd.runtime.artifact.specs import Packed

# What smooth can move size into: groups behind a norm.
_BEHIND_NORMS = ("qkv", "gate_up")


def default_passes(scheme: Scheme) -> tuple[str, ...]:
    """Return the names of the passes that suit a scheme which comes without any.

    GPTQ for single weights in few bits, the measuring of activations where these are static; nothing for the rest.
    """
    rounding = ("gptq",) if scheme.is_plain and not scheme.is_dense else ()
    return (*rounding, "static") if scheme.static_activations else rounding


def passes_of(group: GroupPlan, recipe: Recipe) -> tuple[str, ...]:
    """Return the names of the passes that a group goes through, in their order."""
    if not group.is_pressed:
        return ()
    static = ("static",) if group.has_static_activations else ()
    if not group.is_rounded_with_text:
        return ("rtn", *static)
    in_layer = group.group.name != LM_HEAD
    names = []
    if recipe.pass_of(Smooth) and group.group.kind in _BEHIND_NORMS:
        names.append("smooth")
    if recipe.pass_of(Awq) and in_layer:
        names.append("awq")
    names.append("gptq" if recipe.pass_of(Gptq) else "rtn")
    learnt = all(isinstance(spec, Packed) and can_be_learnt(spec) for spec in group.specs.values())
    if recipe.pass_of(Round) and in_layer and learnt:
        names.append("round")
    return (*names, *static)


def check_passes(recipe: Recipe, groups: Sequence[GroupPlan]) -> None:
    """Refuse passes that nothing is left to do for, and static activations without the pass that measures them."""
    used = {name for group in groups for name in passes_of(group, recipe)}
    static = recipe.pass_of(Static)
    if static is not None and static.kv is not None:
        used.add("static")
    for options in recipe.passes:
        if options.use not in used and not isinstance(options, Rtn):
            raise ValueError(f"recipe: pass {options.use!r} has nothing to do: {_why_idle(options.use)}")
    for group in groups:
        if static is None and group.has_static_activations:
            raise ValueError(
                f"recipe: {group.group.name}: {group.scheme} has static activations, which the pass 'static' measures; "
                f"add it, or choose {group.scheme.removesuffix('-static')}"
            )


def _why_idle(name: str) -> str:
    if name == "static":
        return "no group has a scheme with static activations, and kv is not set"
    if name == "round":
        return "no group of the layers is stored as plain integers"
    return "no group is stored as plain integers or 8-bit floats"
