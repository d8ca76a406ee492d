"""What is the same in every step of a batch of the same rows: who is drawn how, and the tensors that this takes.

Steps of decoding mostly repeat the rows of the step before, so a plan is kept until they change.
Legend: B rows of a batch, G rows of a group, N entries.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from pressd.runtime.params import SamplingParams
from pressd.runtime.sampling.masks import Bans, BatchBans
from pressd.runtime.sampling.penalties import Penalties
from pressd.runtime.sampling.scratch import upload


@dataclass(frozen=True, slots=True, kw_only=True)
class Filters:
    """Which filters a drawn row uses; rows that use the same ones are drawn together."""

    top_k: bool
    top_p: bool
    typical_p: bool
    min_p: bool

    @property
    def any(self) -> bool:
        return self.top_k or self.top_p or self.typical_p or self.min_p

    @classmethod
    def of(cls, sampling: SamplingParams, vocab_size: int) -> "Filters":
        """Return those that may remove a token."""
        return cls(
            top_k=sampling.top_k is not None and sampling.top_k < vocab_size,
            top_p=sampling.top_p < 1.0,
            typical_p=sampling.typical_p < 1.0,
            min_p=sampling.min_p > 0.0,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Admitted:
    """What is known of a sequence from its request. `filters` is None if it is greedy; `biases` are ids and addends."""

    sampling: SamplingParams
    sequence_key: int
    filters: Filters | None
    bans: Bans | None
    biases: tuple[torch.Tensor, torch.Tensor] | None


class Group:
    """Rows of a batch that use the same filters, with their settings, each a tensor [G].

    `places` int64 [G] is None if the group is the batch; `max_k` is the largest top_k.
    """

    def __init__(
        self,
        filters: Filters,
        places: Sequence[int],
        members: Sequence[Admitted],
        device: torch.device,
        *,
        is_batch: bool,
    ) -> None:
        self.filters = filters
        self.num_rows = len(places)
        self.places = None if is_batch else upload(places, torch.int64, device)
        self.sequence_keys = upload([member.sequence_key for member in members], torch.int64, device)
        chosen = [member.sampling for member in members]
        self.temperature = upload([sampling.temperature for sampling in chosen], torch.float64, device)
        top_k = [sampling.top_k or 0 for sampling in chosen] if filters.top_k else []
        self.max_k = max(top_k, default=0)
        self.top_k = upload(top_k, torch.int64, device)
        self.top_p = upload([sampling.top_p for sampling in chosen], torch.float64, device)
        self.typical_p = upload([sampling.typical_p for sampling in chosen], torch.float64, device)
        self.min_p = upload([sampling.min_p for sampling in chosen], torch.float64, device)


class Plan:
    """How the rows of a batch are sampled; what none of them needs is None."""

    def __init__(
        self, rows: Sequence[int], members: Sequence[Admitted], penalties: Penalties, device: torch.device
    ) -> None:
        self.any_greedy = any(member.filters is None for member in members)
        self.groups = _groups(members, device)
        # Of all rows, for a kernel that draws those that nothing filters; the others are greedy to it.
        self.sequence_keys = upload([member.sequence_key for member in members], torch.int64, device)
        unfiltered = [member.filters is not None and not member.filters.any for member in members]
        temperatures = [m.sampling.temperature if free else 0.0 for m, free in zip(members, unfiltered, strict=True)]
        self.temperatures = upload(temperatures, torch.float64, device)
        banned = [place for place, member in enumerate(members) if member.bans is not None]
        bans = [ban for member in members if (ban := member.bans) is not None]
        self.bans = BatchBans(banned, [rows[place] for place in banned], bans, device) if banned else None
        self.biases = _biases(members, device)
        penalised = [place for place, row in enumerate(rows) if row in penalties]
        assert len({rows[place] for place in penalised}) == len(penalised), "a row with penalties comes twice"
        self.penalised = upload(penalised, torch.int64, device) if penalised else None
        self.slots = penalties.slots([rows[place] for place in penalised]) if penalised else None
        asked = [place for place, member in enumerate(members) if member.sampling.logprobs]
        self.asked = tuple(asked)
        self.num_top = tuple(members[place].sampling.top_logprobs for place in asked)
        self.asked_places = upload(asked, torch.int64, device) if asked else None

    @property
    def changes_logits(self) -> bool:
        return self.bans is not None or self.biases is not None or self.penalised is not None


def _groups(members: Sequence[Admitted], device: torch.device) -> list[Group]:
    places: dict[Filters, list[int]] = {}
    for place, member in enumerate(members):
        if member.filters is not None:
            places.setdefault(member.filters, []).append(place)
    return [
        Group(filters, at, [members[place] for place in at], device, is_batch=len(at) == len(members))
        for filters, at in places.items()
    ]


def _biases(
    members: Sequence[Admitted], device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None:
    """Return place, token id and addend of every bias, [N] each."""
    found = [(place, member.biases) for place, member in enumerate(members) if member.biases is not None]
    if not found:
        return None
    places = upload([place for place, (tokens, _) in found for _ in range(tokens.shape[0])], torch.int64, device)
    return places, torch.cat([tokens for _, (tokens, _) in found]), torch.cat([biases for _, (_, biases) in found])
