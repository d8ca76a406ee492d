"""What pressing will give and take, from a checkpoint's headers and a recipe: sizes exactly, memory and time estimated.

Sizes are those of the files that pressing would write, to the byte. No weights are read.
"""

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pressd.compress.calibration import num_rows
from pressd.compress.group_plan import GroupPlan
from pressd.compress.memory import peak_bytes
from pressd.compress.plan import Plan
from pressd.compress.press import planned_tensors
from pressd.compress.rates import Rates, work
from pressd.compress.record import totals
from pressd.compress.text_memory import TextMemory
from pressd.compress.text_rates import TextRates, text_seconds
from pressd.compress.weights_writer import SHARD_BYTES, WeightsWriter
from pressd.runtime.artifact.families import LM_HEAD
from pressd.runtime.artifact.manifest import Totals
from pressd.runtime.artifact.reader import HASH_BELOW_BYTES, Checkpoint
from pressd.runtime.models import decoder_config

# What is freed stays on the heap for the next piece: as much again as was held, up to where glibc gives memory back
# (twice its largest mmap threshold of 32 MiB).
ALLOCATOR_KEEPS = 64 << 20
# What the libraries that run text through a model bring along, kernels made for this processor among them: 100 MiB were
# measured without a tokenizer.
TEXT_LIBRARY_BYTES = 200 << 20
# Rounding to nearest at so few bits has been seen to ruin models: OPT-175B at 3 bits (perplexity 7,300: Frantar et al.
# 2022, https://arxiv.org/abs/2210.17323), Llama-3-70B at 4 bits per channel (1e5: Liu et al. 2024,
# https://arxiv.org/abs/2405.16406).
# GPTQ makes up for about one of these.
_RISKY_BITS = 3
_RISKY_BITS_WITH_GPTQ = 2
_RISKY_BITS_PER_CHANNEL = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupForecast:
    """One fused group as it will be stored; `bits` are stored bits per weight."""

    name: str
    members: tuple[str, ...]
    scheme: str
    passes: tuple[str, ...]
    shape: tuple[int, int]
    bits: float
    bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class TextForecast:
    """The text that passes will read, `rows` of `seq_len` tokens of `data`; no plan reads it."""

    data: str
    tokens: int
    rows: int
    seq_len: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """Bytes: the process before pressing (measured), what pressing holds at most, what the allocator keeps for reuse.

    `library_bytes` are what code takes that is loaded for text alone. On top of these, pages of the source that are
    mapped; the system takes them back when it needs them.
    """

    process_bytes: int
    working_bytes: int
    allocator_bytes: int
    mapped_bytes: int
    library_bytes: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Duration:
    """Seconds of computing at `rates`, which were measured now; the disk's time comes on top."""

    compute_seconds: float
    read_bytes: int
    written_bytes: int
    rates: Rates
    text_rates: TextRates | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Forecast:
    """What `pressd plan` says. `untied_bytes` is what storing a tied head apart from the embedding adds.

    `calibration` is None where no text is read.
    """

    source: str
    groups: tuple[GroupForecast, ...]
    totals: Totals
    untied_bytes: int
    memory: Memory
    time: Duration
    warnings: tuple[str, ...]
    calibration: TextForecast | None = None


def make_forecast(
    source: Checkpoint, plan: Plan, rates: Rates, process_bytes: int, text_rates: TextRates | None = None
) -> Forecast:
    """Return what pressing `source` by `plan` will give and take on one CPU.

    `text_rates` are needed by a plan that reads text; raises ValueError for text that would not fit the model.
    """
    writer = WeightsWriter(Path(), list(planned_tensors(plan)), SHARD_BYTES)
    written = sum(writer.file_bytes.values())
    memory = Memory(
        process_bytes=process_bytes,
        working_bytes=(working := peak_bytes(plan, source.torch_dtype, writer.file_of)),
        allocator_bytes=min(working, ALLOCATOR_KEEPS),
        mapped_bytes=source.artifact_bytes,
    )
    alone = (group for group in plan.groups() if not (plan.reads_text and group.is_rounded_with_text))
    linears = ((group.scheme, spec) for group in alone for spec in group.specs.values())
    computing = sum(rates.seconds_per_work[scheme] * work(spec) for scheme, spec in linears)
    text = _text(source, plan)
    if text is not None:
        assert text_rates is not None
        memory = _with_text(memory, _text_memory(source, plan, text))
        computing += text_seconds(plan, decoder_config(source), text_rates, text.rows * text.seq_len, text.seq_len)
    # Every file is digested for the manifest; a small artifact once more when it is opened to prove that it can be.
    hashed = source.artifact_bytes + written * (2 if written < HASH_BELOW_BYTES else 1)
    return Forecast(
        source=str(source.path),
        groups=tuple(_group(group, plan) for group in plan.groups()),
        totals=totals(source, plan, written),
        untied_bytes=_untied_bytes(plan),
        memory=memory,
        time=Duration(
            compute_seconds=computing + hashed * rates.seconds_per_hashed_byte,
            read_bytes=source.artifact_bytes,
            written_bytes=written,
            rates=rates,
            text_rates=text_rates,
        ),
        warnings=tuple(_warnings(plan)),
        calibration=text,
    )


def _text(source: Checkpoint, plan: Plan) -> TextForecast | None:
    if not plan.reads_text:
        return None
    options = plan.recipe.calibration
    rows = num_rows(options, source, decoder_config(source).max_context)
    return TextForecast(data=options.data, tokens=rows * options.seq_len, rows=rows, seq_len=options.seq_len)


def _text_memory(source: Checkpoint, plan: Plan, text: TextForecast) -> TextMemory:
    return TextMemory(
        plan=plan,
        config=decoder_config(source),
        source=source.torch_dtype,
        rows=text.rows,
        seq_len=text.seq_len,
    )


def _with_text(memory: Memory, text: TextMemory) -> Memory:
    """What pressing alone holds at most comes at other times than what text takes; the larger counts."""
    return dataclasses.replace(
        memory,
        working_bytes=max(memory.working_bytes, text.peak_bytes()),
        allocator_bytes=max(memory.allocator_bytes, text.kept_bytes()),
        library_bytes=TEXT_LIBRARY_BYTES,
    )


def _group(group: GroupPlan, plan: Plan) -> GroupForecast:
    stored = group.stored_bytes(plan.dtype)
    return GroupForecast(
        name=group.group.name,
        members=tuple(group.specs),
        scheme=group.scheme,
        passes=plan.passes_of(group),
        shape=group.group.shape,
        bits=8 * stored / math.prod(group.group.shape),
        bytes=stored,
    )


def _untied_bytes(plan: Plan) -> int:
    heads = (group.stored_bytes(plan.dtype) for group in plan.groups() if group.group.name == LM_HEAD)
    return sum(heads) if plan.unties else 0


def _warnings(plan: Plan) -> Iterator[str]:
    """One line per scheme that has been seen to ruin models, and what to do."""
    for scheme, group in {group.scheme: group for group in plan.groups()}.items():
        spec = next(iter(group.specs.values()))
        with_gptq = "gptq" in plan.passes_of(group)
        leaves = [leaf for _, leaf in spec.leaves() if not leaf.is_dense]
        bits = min((leaf.bits for leaf in leaves), default=16)
        per_channel = any(leaf.group_size is None and leaf.bits <= _RISKY_BITS_PER_CHANNEL for leaf in leaves)
        if with_gptq and bits <= _RISKY_BITS_WITH_GPTQ:
            yield f"{scheme}: {bits} bits can ruin a model whatever rounds to them; measure it with `pressd eval`"
        elif not with_gptq and (bits <= _RISKY_BITS or per_channel):
            what = f"{bits} bits" + (" per channel" if per_channel else "")
            yield (
                f"{scheme}: weights rounded to nearest at {what} can ruin a model; measure it with `pressd eval`, set "
                f"[gates] in a recipe, or take 4 bits in groups"
            )
