"""What the manifest says of a group that has just been pressed."""

import math
from dataclasses import dataclass

import torch

from pressd.compress.group_plan import GroupPlan
from pressd.runtime.artifact.manifest import PlannedGroup


@dataclass(frozen=True, slots=True, kw_only=True)
class Loss:
    """Squared norms of what the weights lost and of the weights; and how much the outputs changed, as a part of them.

    `output_error` is None where no text was read.
    """

    lost: float
    total: float
    output_error: float | None = None


def planned_group(
    group: GroupPlan,
    dtype: torch.dtype,
    loss: Loss,
    *,
    passes: tuple[str, ...] = (),
    fallback: str | None = None,
    notes: tuple[str, ...] = (),
) -> PlannedGroup:
    """Return the manifest's entry for a group; `dtype` is the artifact's precision."""
    stored = group.stored_bytes(dtype)
    return PlannedGroup(
        name=group.group.name,
        members=tuple(group.specs),
        scheme=group.scheme,
        shape=group.group.shape,
        bits=8 * stored / math.prod(group.group.shape),
        error=_six_digits(math.sqrt(loss.lost / loss.total)) if loss.total else 0.0,
        output_error=None if loss.output_error is None else _six_digits(loss.output_error),
        passes=passes,
        notes=notes,
        fallback=fallback,
        bytes=stored,
    )


def _six_digits(value: float) -> float:
    """The last digits depend on how many threads summed up."""
    return float(f"{value:.6g}")
