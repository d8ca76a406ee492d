"""From a recipe and a checkpoint's headers to a plan; every mistake of configuration is found here, before any work."""

from dataclasses import dataclass

import torch

from pressd.compress.group_plan import GroupPlan
from pressd.compress.pass_options import Gptq, Round, Static
from pressd.compress.planned_passes import check_passes, passes_of
from pressd.compress.recipe import KEEP, Recipe, Rule
from pressd.runtime.artifact.families import EMBED, LM_HEAD, Block, FusedGroup, ModelMap, describe
from pressd.runtime.artifact.kv_scales import KVScheme, scale_names
from pressd.runtime.artifact.quantization import check_group
from pressd.runtime.artifact.reader import Checkpoint
from pressd.runtime.artifact.schemes import CASTS, parse_scheme
from pressd.runtime.artifact.specs import LinearSpec, Packed
from pressd.runtime.models import decoder_config

_LAYER = "layers."


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockPlan:
    """One block's groups, the tensors that are only copied, and the scales of keys and values that will be measured."""

    block: Block
    groups: tuple[GroupPlan, ...]
    kv_scales: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What to do with every tensor of the source. `dtype` is that of scales and of everything that stays dense.

    `unties` says that the source's head is its embedding and that the two are stored apart. With a `kv_scheme` the
    artifact holds scales for the keys and values of every layer.
    """

    model: ModelMap
    dtype: torch.dtype
    blocks: tuple[BlockPlan, ...]
    recipe: Recipe
    unties: bool = False
    kv_scheme: KVScheme | None = None

    @property
    def reads_text(self) -> bool:
        """Whether any pass needs to see what runs through the model."""
        return self.recipe.reads_text

    @property
    def runs_source(self) -> bool:
        """Whether the source runs beside what is pressed, for passes that compare with it."""
        return self.matches_source or self.recipe.pass_of(Round) is not None

    @property
    def matches_source(self) -> bool:
        """Whether weights are fitted to the source's outputs for the source's inputs."""
        gptq = self.recipe.pass_of(Gptq)
        return gptq is not None and gptq.correct

    def passes_of(self, group: GroupPlan) -> tuple[str, ...]:
        """Return the names of the passes that a group goes through, in their order."""
        return passes_of(group, self.recipe)

    def groups(self) -> tuple[GroupPlan, ...]:
        """Every fused group, in file order."""
        return tuple(group for block in self.blocks for group in block.groups)


def make_plan(source: Checkpoint, recipe: Recipe) -> Plan:
    """Decide what becomes of every tensor, from names and shapes alone.

    Raises ValueError for a source that is pressed already or that the engine cannot compute, an unknown scheme, a rule
    that decides nothing, groups that do not divide a weight, and two precisions in one artifact.
    """
    if source.config.get("quantization_config") is not None:
        raise ValueError(f"{source.path} is pressed already; press the dense checkpoint it was made from")
    decoder_config(source)  # refuses what could be pressed but never served
    for rule in recipe.rules:
        if rule.scheme != KEEP:
            _check_scheme(rule)
    model = _untied(source, recipe)
    decisions = _decide(model, recipe)
    dtype = _dense_dtype(source.torch_dtype, [rule.scheme for rule in decisions.values()])
    if model.tied:
        _check_tied_head(recipe, dtype)
    # Where the rest is cast, a group that no rule names is cast with it: that is not "keep".
    default = KEEP if dtype == source.torch_dtype else next(name for name, cast in CASTS.items() if cast == dtype)
    kv_scheme = _kv_scheme(recipe)
    blocks = tuple(
        BlockPlan(
            block=block,
            groups=tuple(_plan_group(group, decisions, default, dtype) for group in block.groups),
            kv_scales=() if kv_scheme is None or not block.name.startswith(_LAYER) else _kv_scales(block),
        )
        for block in model.blocks
    )
    plan = Plan(
        model=model,
        dtype=dtype,
        blocks=blocks,
        recipe=recipe,
        unties=source.model.tied and not model.tied,
        kv_scheme=kv_scheme,
    )
    check_passes(recipe, plan.groups())
    return plan


def _kv_scheme(recipe: Recipe) -> KVScheme | None:
    """For which type of keys and values scales are wanted."""
    static = recipe.pass_of(Static)
    return None if static is None or static.kv is None else KVScheme(kind=static.kv)


def _kv_scales(block: Block) -> tuple[str, ...]:
    return scale_names(int(block.name.removeprefix(_LAYER)))


def _untied(source: Checkpoint, recipe: Recipe) -> ModelMap:
    """The map of what will be stored: a tied head becomes a group of its own if the recipe treats it otherwise."""
    if not source.model.tied:
        return source.model
    chosen = {
        rule.pattern: KEEP if rule.scheme == KEEP or parse_scheme(rule.scheme).is_dense else rule.scheme
        for rule in recipe.rules
        if rule.pattern in (EMBED, LM_HEAD)
    }
    if chosen.get(LM_HEAD) in (None, chosen.get(EMBED, KEEP)):
        return source.model
    return describe(source.config | {"tie_word_embeddings": False})


def _check_tied_head(recipe: Recipe, dtype: torch.dtype) -> None:
    """Refuse a rule for a tied head that asks for another precision than the one of all dense tensors."""
    for rule in recipe.rules:
        cast = None if rule.pattern != LM_HEAD or rule.scheme == KEEP else parse_scheme(rule.scheme).cast
        if cast not in (None, dtype):
            raise ValueError(
                f"recipe: scheme.{LM_HEAD!r}: {rule.scheme!r} is not what the embedding, which it is tied to, is "
                f"stored in; give {EMBED!r} the same scheme"
            )


def _decide(model: ModelMap, recipe: Recipe) -> dict[str, Rule]:
    """Return the rule of each group that has one."""
    decisions: dict[str, Rule] = {}
    for group in model.groups():
        matching = [rule for rule in recipe.rules if rule.matches(group)]
        if matching:
            decisions[group.name] = matching[-1]
    used = {rule.pattern for rule in decisions.values()}
    for rule in recipe.rules:
        # A tied head is the embedding: a rule that keeps it says something true.
        if rule.pattern not in used and not (rule.pattern == LM_HEAD and model.tied):
            why = "no group has that name, or later rules match the same groups"
            raise ValueError(f"recipe: scheme.{rule.pattern!r} decides nothing: {why}")
    return decisions


def _check_scheme(rule: Rule) -> None:
    try:
        check_group(rule.pattern, parse_scheme(rule.scheme))
    except ValueError as error:
        raise ValueError(f"recipe: scheme.{rule.pattern!r}: {error}, or {KEEP}") from None


def _dense_dtype(source: torch.dtype, schemes: list[str]) -> torch.dtype:
    """The one precision of scales and dense tensors: loaders read a whole model in one."""
    casts = {parse_scheme(name).cast for name in schemes if name != KEEP}
    wanted = {dtype for dtype in casts if dtype is not None} | ({source} if KEEP in schemes else set())
    if len(wanted) > 1:
        names = " and ".join(sorted(str(dtype).removeprefix("torch.") for dtype in wanted))
        raise ValueError(f"recipe: dense tensors would be {names}; an artifact has one precision for all of them")
    return wanted.pop() if wanted else source


def _plan_group(group: FusedGroup, decisions: dict[str, Rule], default: str, dtype: torch.dtype) -> GroupPlan:
    rule = decisions.get(group.name)
    name = default if rule is None else rule.scheme
    specs: dict[str, LinearSpec] = {}
    for member in group.members:
        if name == KEEP:
            specs[member.prefix] = Packed.dense(member.shape, dtype)
            continue
        try:
            specs[member.prefix] = parse_scheme(name).spec(member.shape)
        except ValueError as error:
            raise ValueError(f"recipe: {group.name}: {error}; choose a smaller group, none or another scheme") from None
    return GroupPlan(group=group, scheme=name, specs=specs)
