"""Structured output through the whole engine: many constraints at once, bad ones among good ones, some put back."""

import importlib.util
import json
import random
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from pressd.runtime.artifact.tokenizer import load_tokenizer
from pressd.runtime.config import EngineConfig
from pressd.runtime.engine import Engine
from pressd.runtime.params import Constraint, SamplingParams, StoppingParams
from pressd.runtime.request import FinishReason, Request, RequestOutput

PYLM = Path(__file__).parents[2] / "examples" / "pylm"
KV_MEMORY = 220 * 4096  # bytes: 220 tokens of pylm in bfloat16
COMPLETE = (FinishReason.EOS, FinishReason.CONSTRAINT_COMPLETE)


@pytest.fixture(scope="module")
def generators() -> ModuleType:
    """The generators of schemas and expressions of another test."""
    spec = importlib.util.spec_from_file_location("texts", Path(__file__).with_name("test_constrained_texts.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def ask(name: str, constraint: Constraint, *, tokens: int = 200, temperature: float = 1.0, **sampling: Any) -> Request:
    return Request(
        request_id=name,
        prompt_token_ids=(11, 12, 13),
        constraint=constraint,
        sampling=SamplingParams(
            temperature=temperature, seed=sum(name.encode()) * 7919 + len(constraint.text), **sampling
        ),
        stopping=StoppingParams(max_new_tokens=tokens),
    )


def run(engine: Engine) -> dict[tuple[str, int], list[RequestOutput]]:
    answers: dict[tuple[str, int], list[RequestOutput]] = {}
    while engine.has_work:
        for output in engine.step().outputs:
            answers.setdefault((output.request_id, output.index), []).append(output)
    engine.check_integrity()
    return answers


def text_of(outputs: list[RequestOutput]) -> str:
    return str(load_tokenizer(PYLM).decode([token for output in outputs for token in output.token_ids]))


@pytest.mark.parametrize("overlap", [False, True])
def test_two_hundred_constraints_at_once_are_all_obeyed(generators: ModuleType, overlap: bool) -> None:
    """In a pool that is too small for them, so that some are put back in the middle of a text."""
    import jsonschema

    settings = EngineConfig(max_batch=24, max_step_tokens=64, overlap=overlap, block_size=2, kv_memory=KV_MEMORY)
    engine = Engine.from_pretrained(PYLM, settings)
    rng = random.Random(17)
    schemas: dict[str, Any] = {}
    while len(schemas) < 100:
        schema = {**generators.schema(rng), "$defs": {"small": {"maximum": 9}}}
        if '"number"' not in json.dumps(schema):  # a model may never end its digits
            schemas[f"s{len(schemas)}"] = schema
    expressions = {f"e{n}": generators.regular_expression(rng) for n in range(100)}
    for name, schema in schemas.items():
        engine.add(ask(name, Constraint(kind="json_schema", text=json.dumps(schema))))
    for name, expression in expressions.items():
        engine.add(ask(name, Constraint(kind="regex", text=expression)))
    answers = run(engine)
    assert engine.stats().preemptions > 0
    assert engine.stats().kv_blocks_used == 0
    assert len(answers) == 200
    for (name, _), outputs in answers.items():
        text = text_of(outputs)
        assert outputs[-1].finish_reason in COMPLETE, f"{name}: {outputs[-1]} {text!r}"
        if name in schemas:
            jsonschema.validate(
                json.loads(text), schemas[name], format_checker=jsonschema.Draft202012Validator.FORMAT_CHECKER
            )
        else:
            assert re.fullmatch(expressions[name], text), (expressions[name], text)


def test_what_is_impossible_or_wrong_ends_cleanly_beside_others() -> None:
    engine = Engine.from_pretrained(PYLM, EngineConfig(max_batch=4))
    good = Constraint(kind="choice", choices=("yes", "no", "yes and no"))
    engine.add(ask("good", good))
    engine.add(ask("false", Constraint(kind="json_schema", text="false")))
    engine.add(ask("wrong", Constraint(kind="json_schema", text='{"type": 3}')))
    engine.add(ask("unclosed", Constraint(kind="regex", text="(a")))
    # No digit is token 11 or 12: each alone is possible, both together are not.
    engine.add(ask("crossed", Constraint(kind="regex", text="[0-9]+"), allowed_token_ids=(11, 12)))
    engine.add(ask("empty", Constraint(kind="choice", choices=("",))))
    answers = {name: outputs for (name, _), outputs in run(engine).items()}
    assert text_of(answers["good"]) in good.choices
    ends = {name: (outputs[-1].finish_reason, outputs[-1].error) for name, outputs in answers.items()}
    impossible, invalid = FinishReason.CONSTRAINT_IMPOSSIBLE, FinishReason.CONSTRAINT_INVALID
    assert {name: reason for name, (reason, _) in ends.items() if name != "good"} == {
        "false": impossible,
        "wrong": invalid,
        "unclosed": invalid,
        "crossed": impossible,
        "empty": FinishReason.CONSTRAINT_COMPLETE,
    }
    assert text_of(answers["empty"]) == ""
    for name in ("false", "wrong", "unclosed", "crossed"):
        error = ends[name][1]
        assert error
        assert "\n" not in error
    assert engine.stats().kv_blocks_used == engine.stats().num_waiting == 0


def test_a_request_waits_for_its_grammar_and_keeps_nobody_waiting() -> None:
    engine = Engine.from_pretrained(PYLM, EngineConfig(max_batch=1))
    engine.add(ask("first", Constraint(kind="json_object")))
    engine.add(
        Request(
            request_id="plain",
            prompt_token_ids=(5,),
            sampling=SamplingParams(temperature=0.0),
            stopping=StoppingParams(max_new_tokens=3, ignore_eos=True),
        )
    )
    # The grammar is compiled by another thread, which has to read a tokenizer first.
    first = engine.step()
    assert [output.request_id for output in first.outputs] == ["plain"]
    engine.abort("plain")
    assert engine.abort("first"), "also while it is compiled"
    assert not engine.has_work
    engine.check_integrity()


def test_siblings_obey_one_grammar_each_for_itself() -> None:
    engine = Engine.from_pretrained(PYLM, EngineConfig(max_batch=8))
    choices = tuple(f"{word} {number}" for word in ("red", "green", "blue") for number in range(30))
    engine.add(ask("x", Constraint(kind="choice", choices=choices), n=6, temperature=3.0))
    texts = [text_of(outputs) for outputs in run(engine).values()]
    assert len(texts) == 6
    assert set(texts) <= set(choices)
    assert len(set(texts)) > 1
