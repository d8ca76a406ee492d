"""What becomes of one fused group."""

from dataclasses import dataclass

import torch

from pressd.runtime.artifact.families import EMBED, FusedGroup
from pressd.runtime.artifact.specs import LinearSpec, Packed


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupPlan:
    """What becomes of one fused group; `specs` has one entry per member, by its prefix."""

    group: FusedGroup
    scheme: str
    specs: dict[str, LinearSpec]

    @property
    def is_pressed(self) -> bool:
        """Whether the group is stored as anything but dense weights."""
        return not all(spec.is_dense for spec in self.specs.values())

    @property
    def is_rounded_with_text(self) -> bool:
        """Whether passes that look at text have a say in it: single weights in few bits, with inputs to look at."""
        plain = all(isinstance(spec, Packed) and not spec.is_dense for spec in self.specs.values())
        return plain and self.group.name != EMBED

    def packed(self) -> list[Packed]:
        """Return the specs of a group of single weights."""
        return [spec for spec in self.specs.values() if isinstance(spec, Packed)]

    @property
    def has_static_activations(self) -> bool:
        """Whether a scale of its inputs is stored, which only text can tell."""
        return any(leaf.static_activations for spec in self.specs.values() for _, leaf in spec.leaves())

    def stored_bytes(self, dtype: torch.dtype) -> int:
        """Bytes of everything stored for this group."""
        return sum(spec.stored_bytes(dtype) for spec in self.specs.values())
