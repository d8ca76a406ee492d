"""Presses the blocks of a plan, one after the other; this presser looks at weights alone, a tensor at a time."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from pressd.compress.cost import Clock
from pressd.compress.group_plan import GroupPlan
from pressd.compress.plan import BlockPlan, Plan
from pressd.compress.planned_group import Loss, planned_group
from pressd.compress.press_linear import press_linear
from pressd.runtime.artifact.manifest import PlannedGroup
from pressd.runtime.artifact.reader import Checkpoint
from pressd.runtime.kernels.registry import Tensors


@dataclass(frozen=True, slots=True, kw_only=True)
class Pressed:
    """Tensors that are final, by name, and share a file; `is_pressed` if they are a linear's in fewer bits."""

    tensors: Tensors
    is_pressed: bool = False


class Presser(Protocol):
    """Makes what is stored of each block, in the order of the plan, each block once: by `press` or by `replay`."""

    def press(self, block: BlockPlan, done: list[PlannedGroup]) -> Iterator[Pressed]:
        """Yield all of a block's tensors, and put an entry for each of its groups into `done`."""
        ...

    def replay(self, block: BlockPlan, tensors: Tensors) -> None:
        """Go past a block whose tensors were stored before."""
        ...


class RoundingPresser:
    """Presses without text: every weight by itself."""

    def __init__(self, source: Checkpoint, plan: Plan, clock: Clock) -> None:
        self._source = source
        self._plan = plan
        self._clock = clock

    def press(self, block: BlockPlan, done: list[PlannedGroup]) -> Iterator[Pressed]:
        """Yield all of a block's tensors, and put an entry for each of its groups into `done`."""
        for group in block.groups:
            with self._clock.scheme(group.scheme):
                yield from self._press_group(group, done)
        for name in block.block.others:
            yield Pressed(tensors={name: dense_tensor(self._source, name, self._plan.dtype)})
        self._source.close()  # the pages of this block are not wanted again

    def replay(self, block: BlockPlan, tensors: Tensors) -> None:
        """Nothing is carried from one block to the next."""

    def _press_group(self, group: GroupPlan, done: list[PlannedGroup]) -> Iterator[Pressed]:
        lost = total = 0.0
        for prefix, spec in group.specs.items():
            name = f"{prefix}.weight"
            weight = dense_tensor(self._source, name, self._plan.dtype)
            tensors, norms = press_linear(self._source.tensor(name), weight, spec)
            lost, total = lost + norms[0], total + norms[1]
            yield Pressed(tensors=named(prefix, tensors), is_pressed=not spec.is_dense)
        passes = self._plan.passes_of(group)
        done.append(planned_group(group, self._plan.dtype, Loss(lost=lost, total=total), passes=passes))


def named(prefix: str, tensors: Tensors) -> Tensors:
    """Return a linear's tensors by their whole names."""
    return {f"{prefix}.{suffix}": tensor for suffix, tensor in tensors.items()}


def dense_tensor(source: Checkpoint, name: str, dtype: torch.dtype) -> Tensor:
    """Return a source tensor in `dtype`; raises ValueError if it is not finite there."""
    stored = source.tensor(name)
    tensor = stored.to(dtype)
    if not _is_finite(tensor):
        if _is_finite(stored):
            raise ValueError(
                f"{source.path}: {name} has values that do not fit {dtype}; keep its precision or use bf16"
            )
        raise ValueError(f"{source.path}: {name} holds NaN or infinity; repair the checkpoint")
    return tensor


def _is_finite(tensor: Tensor) -> bool:
    return all(math.isfinite(extreme) for extreme in tensor.aminmax())  # both are NaN if anything is
