"""Tasks through lm-eval, against its own Hugging Face model on the same checkpoint, without a network."""

import contextlib
import importlib.util
import json
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from pressd.compress import compress
from pressd.compress.convert import convert_to_dense
from pressd.compress.evaluate import evaluate
from pressd.compress.forwards import load
from pressd.compress.quality_text import show_more
from pressd.compress.tasks import Scores, compare_scores, load_tasks
from pressd.runtime.artifact.reader import Checkpoint

# Its own model, the oracle, is in lm-eval's files but needs accelerate, which lm-eval alone does not bring.
MISSING = [name for name in ("lm_eval", "accelerate") if importlib.util.find_spec(name) is None]
NEEDS = f"not installed: {', '.join(MISSING)}; pip install 'pressd[tasks]' accelerate"

YAML = """
task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: {kind}
{rest}
"""
CHOICE = """doc_to_text: "Q: {{question}} A:"
doc_to_choice: "{{choices}}"
doc_to_target: "{{answer}}"
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
  - metric: acc_norm
    aggregation: mean
    higher_is_better: true
"""
ROLLING = """doc_to_text: ""
doc_to_target: "{{question}}"
metric_list:
  - metric: word_perplexity
  - metric: bits_per_byte
"""
ANSWER = """doc_to_text: "{{question}}"
doc_to_target: "{{choices[0]}}"
generation_kwargs:
  until: ["a"]
  max_gen_toks: 8
metric_list:
  - metric: exact_match
    aggregation: mean
    higher_is_better: true
"""


@contextlib.contextmanager
def foreign_warnings() -> Iterator[None]:
    """What lm-eval and its packages warn of is theirs; our own warnings are errors again afterwards."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A multiple-choice task of 24 questions, one that reads texts, and one that answers freely."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    data = tmp_path / "questions.jsonl"
    with data.open("w") as file:
        for number in range(24):
            choices = [f"{chr(97 + (number * step) % 26)}{step}" for step in (3, 5, 7)]
            document = {"question": f"what is {number * 7919} ", "choices": choices, "answer": number % 3}
            file.write(json.dumps(document) + "\n")
    paths = []
    for name, kind, rest in (
        ("choosing", "multiple_choice", CHOICE),
        ("reading", "loglikelihood_rolling", ROLLING),
        ("answering", "generate_until", ANSWER),
    ):
        path = tmp_path / f"{name}.yaml"
        path.write_text(YAML.format(name=name, data=data, kind=kind, rest=rest))
        paths.append(str(path))
    return paths


def their_scores(model: Path, files: list[str]) -> tuple[dict[str, Any], list[int], list[str]]:
    """What lm-eval's own model scores, which answers it finds most likely, and what it answers freely."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_defaults=False)  # without those that lm-eval brings, which take seconds to find
    oracle = HFLM(str(model), device="cpu", dtype="float32")
    found: Any = simple_evaluate(oracle, tasks=files, bootstrap_iters=1000, task_manager=manager)
    chosen = {sample["doc_id"]: sample["filtered_resps"] for sample in found["samples"]["choosing"]}
    choices = [max(range(3), key=lambda index: chosen[doc][index][0]) for doc in range(24)]
    return found["results"], choices, answers_of(found)


def answers_of(found: Any) -> list[str]:
    answers = {sample["doc_id"]: sample["filtered_resps"][0] for sample in found["samples"]["answering"]}
    return [answers[doc] for doc in range(24)]


@pytest.mark.slow
@pytest.mark.skipif(bool(MISSING), reason=NEEDS)
def test_scores_are_those_of_lm_evals_own_model(tiny_llama: Path, files: list[str], tmp_path: Path) -> None:
    compress(tiny_llama, "w3a16g32", tmp_path / "w3")
    convert_to_dense(tmp_path / "w3", tmp_path / "dense", dtype=torch.float32)
    data = tmp_path / "text.txt"
    data.write_text("import this\n" * 40)
    with foreign_warnings():
        theirs = [their_scores(path, files) for path in (tiny_llama, tmp_path / "dense")]
        found: Any = evaluate(
            tmp_path / "w3", tiny_llama, data=str(data), tokens=128, seq_len=64, task_names=tuple(files)
        )
    tasks = found["tasks"]
    assert set(tasks) == {"choosing", "reading", "answering"}
    for who, (results, _, _) in zip(("source", "artifact"), theirs, strict=True):
        for metric in ("acc", "acc_norm"):
            assert tasks["choosing"][metric][who] == results["choosing"][f"{metric},none"]
            assert tasks["choosing"][metric]["stderr"][who] == results["choosing"][f"{metric}_stderr,none"]
        for metric in ("word_perplexity", "bits_per_byte"):
            # Each log-probability is within 4e-3 (see test_scoring.py); words are a dozen characters, bytes one.
            expected = results["reading"][f"{metric},none"]
            assert tasks["reading"][metric][who] == pytest.approx(expected, rel=12 * 4e-3)
        assert tasks["answering"]["exact_match"][who] == results["answering"]["exact_match,none"]
    flips = sum(mine != other for mine, other in zip(theirs[0][1], theirs[1][1], strict=True))
    assert tasks["choosing"]["flips"] == flips > 0
    assert [tasks[name]["documents"] for name in sorted(tasks)] == [24, 24, 24]
    assert f"{flips} of 24" in show_more({"tasks": tasks})[0]


@pytest.mark.slow
@pytest.mark.skipif(bool(MISSING), reason=NEEDS)
def test_free_answers_are_those_of_lm_evals_own_model(tiny_llama: Path, files: list[str]) -> None:
    with foreign_warnings():
        from lm_eval import simple_evaluate
        from lm_eval.tasks import TaskManager

        from pressd.compress.task_model import DecoderLM

        _, _, expected = their_scores(tiny_llama, files)
        model = DecoderLM(load(Checkpoint.open(tiny_llama)), tiny_llama)
        manager = TaskManager(include_defaults=False)
        with torch.inference_mode():
            found = simple_evaluate(model, tasks=files[2:], bootstrap_iters=0, task_manager=manager)
    assert answers_of(found) == expected
    assert any(expected)


@pytest.mark.slow
@pytest.mark.skipif(bool(MISSING), reason=NEEDS)
def test_an_unknown_task_is_named() -> None:
    with foreign_warnings(), pytest.raises(ValueError, match="task 'no_such_task' cannot be loaded") as caught:
        load_tasks(["no_such_task"])
    assert "\n" not in str(caught.value)


def test_without_the_extra_the_command_is_told() -> None:
    program = (
        "import sys; sys.modules['lm_eval'] = None\n"
        "from pressd.compress.tasks import load_tasks\n"
        "try:\n    load_tasks(['arc_easy'])\n"
        "except ValueError as error:\n    assert \"pip install 'pressd[tasks]'\" in str(error), error\n"
        "else:\n    raise AssertionError\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_flips_count_documents_and_not_scores() -> None:
    """Two of four documents are answered otherwise, and as many rightly as before."""
    result = {"alias": "t", "acc,none": 0.5, "acc_stderr,none": 0.25, "f1,get": 0.75, "f1_stderr,get": "N/A"}
    sides = [
        Scores(results={"t": result}, choices={"t": chosen}, asked={"t": ["a", "b", "c", "d"]})
        for chosen in ([0, 1, 2, 0], [0, 2, 1, 0])
    ]
    assert compare_scores(*sides) == {
        "t": {
            "acc": {"source": 0.5, "artifact": 0.5, "stderr": {"source": 0.25, "artifact": 0.25}},
            "f1 (get)": {"source": 0.75, "artifact": 0.75, "stderr": {"source": None, "artifact": None}},
            "documents": 4,
            "flips": 2,
        }
    }
