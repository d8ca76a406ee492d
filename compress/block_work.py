"""One block while it is pressed: its weights as they are now, in float32, and what has been stored of it already.

It is a source of weights for the runtime's own loader, so that what a forward pass computes is at every moment what
would be served: dense weights where nothing has been decided yet, stored tensors where a group is final.
"""

import torch
from torch import Tensor

from pressd.compress.group_plan import GroupPlan
from pressd.compress.plan import BlockPlan
from pressd.compress.press_block import dense_tensor
from pressd.runtime.artifact.kv_scales import scale_names
from pressd.runtime.artifact.reader import Checkpoint
from pressd.runtime.artifact.specs import LinearSpec, Packed
from pressd.runtime.kernels.registry import Tensors

WORK = torch.float32


class BlockWork:
    """The weights of one block, by prefix, and its other tensors, by name."""

    def __init__(self, plan: BlockPlan, weights: dict[str, Tensor], others: dict[str, Tensor]) -> None:
        """Begin with `weights` and `others` as the source has them, in the artifact's precision."""
        self.plan = plan
        self.others = others
        self.notes: dict[str, list[str]] = {group.group.name: [] for group in plan.groups}
        self._weights = weights
        self._stored: dict[str, Tensors] = {}
        self._divisors: dict[str, Tensor] = {}

    def divide_inputs(self, group: GroupPlan, scales: Tensor) -> None:
        """Note that the inputs of a group are now those of the source divided by scales [C]."""
        before = self._divisors.get(group.group.name)
        self._divisors[group.group.name] = scales.cpu() if before is None else before * scales.cpu()

    def divisor(self, group: GroupPlan) -> Tensor | None:
        """Return by what the inputs of a group were divided [C], None if they were not."""
        return self._divisors.get(group.group.name)

    @classmethod
    def begun(cls, source: Checkpoint, plan: BlockPlan, dtype: torch.dtype) -> "BlockWork":
        """Return the work of a block of which nothing is decided; raises ValueError for numbers that are not finite."""
        weights = {
            prefix: dense_tensor(source, f"{prefix}.weight", dtype) for group in plan.groups for prefix in group.specs
        }
        return cls(plan, weights, {name: dense_tensor(source, name, dtype) for name in plan.block.others})

    @classmethod
    def finished(cls, plan: BlockPlan, tensors: Tensors) -> "BlockWork":
        """Return the work of a block whose every tensor is stored already."""
        others = {name: tensors[name] for name in (*plan.block.others, *plan.kv_scales)}
        work = cls(plan, {}, others)
        for group in plan.groups:
            for prefix, spec in group.specs.items():
                work._stored[prefix] = {suffix: tensors[f"{prefix}.{suffix}"] for suffix in spec.layout(WORK)}
        return work

    def group(self, kind: str) -> GroupPlan:
        """Return the fused group of this kind."""
        return next(group for group in self.plan.groups if group.group.kind == kind)

    def weight(self, group: GroupPlan) -> Tensor:
        """Return the rows of all members as they are now, float32 [R, C]."""
        return torch.cat([self._weights[prefix].to(WORK) for prefix in group.specs])

    def replace(self, group: GroupPlan, weight: Tensor) -> None:
        """Put other rows [R, C] in the place of a group's."""
        rows = [spec.out_features for spec in group.specs.values()]
        for prefix, part in zip(group.specs, torch.split(weight, rows), strict=True):
            self._weights[prefix] = part.cpu().contiguous()

    def scale_rows(self, prefix: str, factors: Tensor) -> None:
        """Multiply the outputs [out] of one linear, its bias among them."""
        factors = factors.cpu().to(WORK)
        self._weights[prefix] = self._weights[prefix].to(WORK) * factors[:, None]
        bias = f"{prefix}.bias"
        if bias in self.others:
            self.others[bias] = (self.others[bias].to(WORK) * factors).to(self.others[bias].dtype)

    def member(self, prefix: str) -> Tensor:
        """Return one member's weight [out, in], in the artifact's precision if it is the source's, else float32."""
        return self._weights[prefix]

    def store(self, prefix: str, tensors: Tensors) -> None:
        """Take the stored tensors of a weight as final; the weight itself is let go."""
        self._stored[prefix] = tensors
        self._weights.pop(prefix, None)

    def stored(self, prefix: str) -> Tensors:
        """Return the stored tensors of a weight that is final."""
        return self._stored[prefix]

    def tensor(self, name: str) -> Tensor:
        """Return a tensor that is no linear's weight."""
        return self.others[name]

    def kv_scales(self, layer: int) -> tuple[Tensor, Tensor]:
        """Return the scales of a layer's keys and values, once they have been measured."""
        keys, values = (self.others[name].to(WORK) for name in scale_names(layer))
        return keys, values

    def linear(self, prefix: str) -> LinearSpec:
        """Return how the weight at `prefix` is stored now."""
        spec = next(group.specs[prefix] for group in self.plan.groups if prefix in group.specs)
        return spec if prefix in self._stored else Packed.dense((spec.out_features, spec.in_features), WORK)

    def linear_tensors(self, prefix: str) -> Tensors:
        """Return the tensors of the weight at `prefix` as they are now."""
        return self._stored.get(prefix) or {"weight": self._weights[prefix]}
