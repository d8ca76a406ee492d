"""Benchmarks that lm-eval knows, asked of source and artifact alike, and how often the two choose differently.

lm-eval is an extra, `pip install 'pressd[tasks]'`: it brings half a gigabyte of packages.
"""

import contextlib
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pressd.runtime.artifact.reader import Checkpoint
from pressd.runtime.models import Decoder

# Resamplings for standard errors of what is no mean over documents, such as F1.
_BOOTSTRAPS = 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class Scores:
    """What one model scored: lm-eval's `results` by task, and of multiple-choice tasks what it chose by document.

    `asked` are digests of all prompts by task.
    """

    results: Mapping[str, Mapping[str, Any]]
    choices: Mapping[str, Sequence[int]]
    asked: Mapping[str, Sequence[str]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Tasks:
    """Tasks that can be loaded."""

    names: tuple[str, ...]
    manager: Any

    def run(self, decoder: Decoder, checkpoint: Checkpoint) -> Scores:
        """Ask the decoder of a checkpoint; every model gets the same requests in the same order."""
        from lm_eval import simple_evaluate

        from pressd.compress.task_model import DecoderLM

        model = DecoderLM(decoder, checkpoint.tokenizer_path)
        with contextlib.redirect_stdout(sys.stderr):
            # Seeds of its own, so that both models see the same examples before a question.
            found = simple_evaluate(
                model, tasks=list(self.names), task_manager=self.manager, bootstrap_iters=_BOOTSTRAPS
            )
        samples = {task: sorted(found["samples"][task], key=_place) for task in found["samples"]}
        choosing = [task for task in samples if found["configs"][task]["output_type"] == "multiple_choice"]
        return Scores(
            results=found["results"],
            choices={task: [_choice(sample) for sample in samples[task]] for task in choosing},
            asked={task: [sample["prompt_hash"] for sample in samples[task]] for task in samples},
        )


def load_tasks(names: Sequence[str]) -> Tasks:
    """Find tasks by lm-eval's names or as .yaml files of its format.

    Raises ValueError if lm-eval is not installed, or a task or its documents cannot be loaded.
    """
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise ValueError(f"tasks need lm-eval ({error}); pip install 'pressd[tasks]'") from None
    with contextlib.redirect_stdout(sys.stderr):
        manager = TaskManager()
        for name in names:
            try:
                manager.load([name])
            except (KeyError, ValueError, TypeError, OSError) as error:
                reason = " ".join(str(error).split())
                raise ValueError(
                    f"task {name!r} cannot be loaded ({reason}); give a name of `lm_eval ls tasks`, or a .yaml file"
                ) from None
    return Tasks(names=tuple(names), manager=manager)


def compare_scores(source: Scores, artifact: Scores) -> dict[str, object]:
    """Return the `tasks` entry of a measurement.

    By task and metric: what both scored and lm-eval's standard errors. `flips` are the documents for which the two
    choose differently, of `documents`: accuracies can be equal while many answers change (arXiv 2407.09141).
    """
    assert source.asked == artifact.asked, "the two models were asked different things"
    return {task: _compare_task(task, source, artifact) for task in artifact.results}


def _compare_task(task: str, source: Scores, artifact: Scores) -> dict[str, object]:
    theirs, ours = source.results[task], artifact.results[task]
    found: dict[str, object] = {}
    for key, value in ours.items():
        metric, _, kept = key.partition(",")
        if not kept or metric.endswith("_stderr") or not isinstance(value, int | float):
            continue
        errors = [_number(scores.get(f"{metric}_stderr,{kept}")) for scores in (theirs, ours)]
        name = metric if kept == "none" else f"{metric} ({kept})"
        found[name] = {
            "source": theirs[key],
            "artifact": value,
            "stderr": {"source": errors[0], "artifact": errors[1]},
        }
    if task in artifact.asked:
        found["documents"] = len(artifact.asked[task])
    if task in artifact.choices:
        pairs = zip(source.choices[task], artifact.choices[task], strict=True)
        found["flips"] = sum(theirs != ours for theirs, ours in pairs)
    return found


def _place(sample: Mapping[str, Any]) -> int:
    return int(sample["doc_id"])


def _choice(sample: Mapping[str, Any]) -> int:
    """The most likely answer, as accuracy takes it; after the answers may come their likelihoods without a question."""
    scores = [float(response[0]) for response in sample["filtered_resps"]]
    if "acc_mutual_info" in sample["metrics"]:
        scores = scores[: len(scores) // 2]
    return max(range(len(scores)), key=scores.__getitem__)


def _number(value: object) -> float | None:
    """lm-eval writes "N/A" where a metric has no standard error."""
    return float(value) if isinstance(value, int | float) else None
