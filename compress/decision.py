"""What was decided for one fused group that is stored as plain codes: until it is described, it may still change."""

import dataclasses
from dataclasses import dataclass

from torch import Tensor

from pressd.compress.block_work import BlockWork
from pressd.compress.grid import Grid
from pressd.compress.group_plan import GroupPlan
from pressd.compress.plan import Plan
from pressd.compress.planned_group import Loss, planned_group
from pressd.compress.quantise_group import Quantised, encode_members
from pressd.compress.rows import squared_norms
from pressd.runtime.artifact.manifest import PlannedGroup


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """A group's rows float32 [R, C] as they were before rounding, what they became, and its inputs' static scale."""

    group: GroupPlan
    weight: Tensor
    quantised: Quantised
    input_scale: Tensor | None = None

    def moved_to(self, grid: Grid, codes: Tensor) -> "Decision":
        """Return the decision for other codes [R, C] on another grid."""
        return dataclasses.replace(self, quantised=dataclasses.replace(self.quantised, grid=grid, codes=codes))

    def store(self, work: BlockWork) -> None:
        """Hand the members' tensors to the work, in place of what it may have of them."""
        stored = encode_members(self.quantised, self.group.packed(), self.input_scale)
        for prefix, tensors in zip(self.group.specs, stored, strict=True):
            work.store(prefix, tensors)

    def describe(self, plan: Plan, notes: tuple[str, ...]) -> PlannedGroup:
        """Return the manifest's entry."""
        values = self.quantised.values.cpu()
        lost, total = squared_norms(self.weight, lambda rows, wide: values[rows].to(wide))
        return planned_group(
            self.group,
            plan.dtype,
            Loss(lost=lost, total=total, output_error=self.quantised.output_error),
            passes=plan.passes_of(self.group),
            fallback=self.quantised.fallback,
            notes=(*notes, *self.quantised.notes),
        )
