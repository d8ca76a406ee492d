"""What `pressd generate` asks for, and how it prints what comes. tests/server/test_cli.py runs it as users do."""

import contextlib
import io
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pressd.client.messages import generate_request
from pressd.server import cli, generate_verb
from pressd.v1 import generate_pb2


def test_generate_asks_what_its_flags_say(tmp_path: Path) -> None:
    (schema := tmp_path / "schema.json").write_text('{"type": "object"}')
    line = "generate x --max-new-tokens 1 --temperature 0 --top-p 0.5 --top-k 3 --min-p 0.25 --repetition-penalty 2"
    more = [
        "--n",
        "2",
        "--stop",
        "a",
        "--stop",
        "b",
        "--json-schema",
        str(schema),
        "--logprobs",
        "--time-budget",
        "1.5",
    ]
    args = cli.make_parser().parse_args([*line.split(), "--seed", "7", *more])
    expected = generate_pb2.GenerateRequest(
        prompt="x",
        sampling={
            "temperature": 0,
            "top_p": 0.5,
            "top_k": 3,
            "min_p": 0.25,
            "repetition_penalty": 2,
            "seed": 7,
            "num_sequences": 2,
        },
        stopping={"max_new_tokens": 1, "stop": ["a", "b"]},
        output={"logprobs": True},
        constraint={"json_schema": '{"type": "object"}'},
        scheduling={"time_budget_ms": 1500},
    )
    assert generate_request("x", generate_verb._options(args)) == expected


@pytest.mark.parametrize(
    ("flags", "constraint"),
    [
        (["--json-schema", ' {"a": 1}'], {"json_schema": ' {"a": 1}'}),
        (["--regex", "a+"], {"regex": "a+"}),
        (["--choice", "yes", "--choice", "no"], {"choice": {"texts": ["yes", "no"]}}),
        ([], None),
    ],
)
def test_generate_asks_for_a_form(flags: list[str], constraint: Any) -> None:
    args = cli.make_parser().parse_args(["generate", "x", *flags])
    expected = generate_pb2.GenerateRequest(prompt="x", constraint=constraint)
    assert generate_request("x", generate_verb._options(args)) == expected


def event(kind: str, index: int, text: str = "") -> generate_pb2.GenerateEvent:
    if kind == "delta":
        return generate_pb2.GenerateEvent(delta=generate_pb2.Delta(index=index, text=text))
    return generate_pb2.GenerateEvent(finished=generate_pb2.Finished(index=index, reason="FINISH_REASON_EOS"))


@given(st.data())
def test_completions_that_come_mixed_are_printed_apart(data: st.DataObject) -> None:
    """Whatever order sequences interleave in, stdout has each whole, in order, and nothing is held back for long."""
    texts = data.draw(st.lists(st.lists(st.text("ab"), max_size=4), min_size=1, max_size=4))
    queues = [[event("delta", n, text) for text in own] + [event("finished", n)] for n, own in enumerate(texts)]
    order = data.draw(st.permutations([n for n, queue in enumerate(queues) for _ in queue]))
    args = Namespace(num_sequences=len(texts), json=False, logprobs=False)
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        answers = generate_verb._show((queues[number].pop(0) for number in order), args)
    assert ["".join(answer.texts) for answer in answers] == ["".join(own) for own in texts]
    heads = [f"--- {n + 1} of {len(texts)}\n" if len(texts) > 1 else "" for n in range(len(texts))]
    assert out.getvalue() == "".join(f"{head}{''.join(own)}\n" for head, own in zip(heads, texts, strict=True))
