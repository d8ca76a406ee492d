"""Measures an artifact against its source on the same held-out tokens, with the engine's own decoder.

Both models compute in float32 with the kernels that serve on this machine: so what is measured is what the scheme costs
(rounded weights, and the scheme's own rounding of activations), not what 16-bit arithmetic costs on top, and it is
measured on the code path that answers users.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from pressd.compress import divergence, tasks
from pressd.compress.cost import Clock
from pressd.compress.fidelity import PerToken, summarise
from pressd.compress.footprint import footprint
from pressd.compress.forwards import Head, Progress, check_context, compare_rows, final_hidden, load
from pressd.compress.measurement import keeps
from pressd.compress.protocol import SEQ_LEN, TOKENS
from pressd.compress.report import refresh_quality
from pressd.compress.robustness import perturbed_rows, summarise_robustness
from pressd.compress.spending import Factors, spent
from pressd.compress.token_rows import TokenRows, read_rows
from pressd.runtime.artifact.manifest import Manifest, read_manifest, write_manifest
from pressd.runtime.artifact.reader import Checkpoint
from pressd.runtime.models import Decoder

# Entries of a measurement that say where and how it was made, not what the artifact is.
_NOT_RECORDED = ("artifact", "cost")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Questions:
    """What both models are asked: rows to predict (the text as it is first), prompts to continue, tasks to solve."""

    rows: Mapping[str, Tensor]
    prompts_NT: Tensor | None
    tasks: tasks.Tasks | None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Answers:
    """What one model made of the prompts and the tasks."""

    continuations_NG: Tensor | None
    tasks: tasks.Scores | None


@torch.inference_mode()
def evaluate(
    artifact: str | Path,
    source: str | Path | None = None,
    *,
    data: str = "stdlib",
    tokens: int = TOKENS,
    seq_len: int = SEQ_LEN,
    robustness: bool = False,
    diverge: bool = False,
    task_names: Sequence[str] = (),
    factors: Factors | None = None,
    progress: Progress | None = None,
) -> dict[str, object]:
    """Return fidelity metrics of `artifact` against `source` (default: what its manifest says it was pressed from).

    `data` is what corpus.load knows. `robustness` repeats the measurement on perturbed text, `diverge` looks for the
    first token in which greedy continuations differ, `task_names` are what tasks.load_tasks knows; each is an entry
    more. Raises ValueError if there is no source, the two differ in vocabulary, rows or continuations are longer than a
    context, the text is too short, or the artifact was calibrated on it. `progress` is told (what, rows done, rows).
    """
    factors = factors or Factors()
    factors.check()
    clock = Clock()
    pressed = Checkpoint.open(artifact)
    dense = Checkpoint.open(_source_of(pressed) if source is None else source)
    _check_one_model(dense, pressed)
    rows = read_rows(data, dense, tokens=tokens, seq_len=seq_len)
    _check_held_out(pressed, rows)
    for checkpoint in (dense, pressed):
        check_context(checkpoint, rows.ids.size(1), "seq_len")
    questions = _questions(rows, data, (dense, pressed), tokens, robustness, diverge, task_names)

    def tell(what: str, done: int, total: int) -> None:
        clock.tick()
        (progress or _silent)(what, done, total)

    hidden, head, expected = _ask_source(dense, questions, tell)
    compared, given = _ask_artifact(pressed, questions, hidden, head, tell)
    clean = compared.pop("")
    # Resolved as in the manifest, so that one source has one name wherever the command was run.
    found: dict[str, object] = {"source": str(dense.path.resolve()), "artifact": str(pressed.path)}
    found |= {"data": rows.describe(), **summarise(clean)}
    found["footprint"] = _footprints(dense, pressed, rows.ids.size(1))
    if compared:
        found["robustness"] = summarise_robustness(clean, compared)
    found |= _further(questions, expected, given)
    cost = clock.cost()
    found["cost"] = spent(cost.wall_seconds, cost.joules, factors)
    return found


def record_quality(artifact: str | Path, quality: dict[str, object]) -> bool:
    """Write a measurement into the manifest of an artifact of ours; the id does not change, the file atomically does.

    Returns False, and writes nothing, for a foreign directory and for fewer tokens than the default.
    """
    path = Path(artifact)
    manifest = read_manifest(path)
    if manifest is None or _tokens(quality) < TOKENS:
        return False
    recorded = {name: value for name, value in quality.items() if name not in _NOT_RECORDED}
    measured = manifest.model_copy(update={"quality": recorded})
    write_manifest(path, measured)
    refresh_quality(path, measured)
    return True


def missed_gates(manifest: Manifest | None, quality: Mapping[str, object]) -> list[str]:
    """Return one line per gate of the artifact's recipe that the measurement misses."""
    lines = []
    for name, bound in sorted(manifest.gates.items()) if manifest else ():
        value = quality[name]
        assert isinstance(value, float)
        if not keeps(name, value, bound):
            lines.append(f"gate missed: {name} is {value:.6g}, the recipe asks for {bound:.6g}")
    return lines


def _silent(what: str, done: int, total: int) -> None:
    pass


def _tokens(quality: Mapping[str, object]) -> int:
    data = quality["data"]
    assert isinstance(data, dict)
    return int(data["tokens"])


def _source_of(artifact: Checkpoint) -> Path:
    if artifact.manifest is None:
        raise ValueError(f"{artifact.path} does not say what it was pressed from; give --against SOURCE")
    recorded = artifact.manifest.source
    path = Path(recorded.path)
    if not path.is_dir():
        raise ValueError(f"{artifact.path} was pressed from {path}, which is not here; give --against SOURCE")
    for name, stored in recorded.files.items():
        if not (path / name).is_file() or (path / name).stat().st_size != stored.bytes:
            raise ValueError(
                f"{path / name} has changed since {artifact.path} was pressed from it; give --against SOURCE"
            )
    return path


def _check_one_model(dense: Checkpoint, pressed: Checkpoint) -> None:
    vocabularies = [checkpoint.linear("lm_head").out_features for checkpoint in (dense, pressed)]
    if vocabularies[0] != vocabularies[1]:
        raise ValueError(
            f"{dense.path} has {vocabularies[0]} tokens and {pressed.path} {vocabularies[1]}: not one model"
        )


def _check_held_out(pressed: Checkpoint, rows: TokenRows) -> None:
    """What an artifact was fitted to says little about any other text."""
    calibration = {} if pressed.manifest is None else pressed.manifest.calibration
    if calibration.get("text_sha256") == rows.sha256:
        raise ValueError(
            f"data {rows.name}: {pressed.path} was calibrated on this very text; give --data other text to measure on"
        )


def _questions(
    rows: TokenRows,
    data: str,
    models: tuple[Checkpoint, Checkpoint],
    tokens: int,
    robustness: bool,
    diverge: bool,
    task_names: Sequence[str],
) -> _Questions:
    """Everything that both models will be asked, made before a weight is loaded."""
    asked = {"": rows.ids}
    if robustness:
        changed = perturbed_rows(data, models[0], tokens=tokens, seq_len=rows.ids.size(1))
        asked |= {kind: other.ids for kind, other in changed.items()}
    prompts = divergence.choose_prompts(rows.ids) if diverge else None
    if prompts is not None:
        for checkpoint in models:
            check_context(checkpoint, prompts.size(1) + divergence.NEW_TOKENS, "a prompt with its continuation")
    return _Questions(
        rows=asked,
        prompts_NT=prompts,
        tasks=tasks.load_tasks(task_names) if task_names else None,
    )


def _ask_source(
    checkpoint: Checkpoint, questions: _Questions, progress: Progress
) -> tuple[dict[str, Tensor], Head, _Answers]:
    """Return the source's hidden states of all rows, its head, and its answers; the rest of it is freed."""
    decoder = load(checkpoint)
    hidden = {
        kind: final_hidden(decoder, ids, _label("source", kind), progress) for kind, ids in questions.rows.items()
    }
    return hidden, decoder.head, _answers(checkpoint, decoder, questions)


def _ask_artifact(
    checkpoint: Checkpoint, questions: _Questions, hidden: dict[str, Tensor], head: Head, progress: Progress
) -> tuple[dict[str, PerToken], _Answers]:
    decoder = load(checkpoint)
    compared = {
        kind: compare_rows(decoder, ids, hidden.pop(kind), head, _label("artifact", kind), progress)
        for kind, ids in questions.rows.items()
    }
    return compared, _answers(checkpoint, decoder, questions)


def _answers(checkpoint: Checkpoint, decoder: Decoder, questions: _Questions) -> _Answers:
    prompts = questions.prompts_NT
    return _Answers(
        continuations_NG=None if prompts is None else divergence.continuations(decoder, prompts),
        tasks=None if questions.tasks is None else questions.tasks.run(decoder, checkpoint),
    )


def _footprints(dense: Checkpoint, pressed: Checkpoint, context: int) -> dict[str, object]:
    return {"source": asdict(footprint(dense, context)), "artifact": asdict(footprint(pressed, context))}


def _further(questions: _Questions, expected: _Answers, given: _Answers) -> dict[str, object]:
    """The entries of what was asked besides rows."""
    found: dict[str, object] = {}
    if expected.continuations_NG is not None and given.continuations_NG is not None:
        assert questions.prompts_NT is not None
        first = divergence.first_differences(given.continuations_NG, expected.continuations_NG)
        found["divergence"] = divergence.summarise_divergence(first, questions.prompts_NT.size(1))
    if expected.tasks is not None and given.tasks is not None:
        found["tasks"] = tasks.compare_scores(expected.tasks, given.tasks)
    return found


def _label(model: str, kind: str) -> str:
    return f"{model} ({kind})" if kind else model
