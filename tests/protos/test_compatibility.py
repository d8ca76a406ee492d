"""Clients of the promise as it was written down keep working; what would break them is seen before they see it."""

from collections.abc import Callable
from pathlib import Path

import pytest
from promise import PROMISE, PROTOS, breaks, declared

Change = Callable[[str, str, str], Path]


def test_no_client_breaks() -> None:
    assert breaks(PROTOS, PROMISE) == []


def test_all_that_is_promised_is_written_down() -> None:
    assert declared(PROTOS) == PROMISE.read_text(), "write it down: python tests/protos/promise.py"


@pytest.mark.parametrize(
    ("file", "old", "new"),
    [
        ("chat", "string tool_call_id = 5", "string tool_call_id = 7"),
        ("chat", "optional string reasoning = 3;", ""),
        ("chat", "optional string reasoning = 3;", "reserved 3;"),
        ("chat", "string reasoning = 3", "string thinking = 3"),
        ("chat", "string reasoning = 3", "bytes reasoning = 3"),
        ("load", "uint32 num_running", "int32 num_running"),
        ("load", "uint32 num_running", "repeated uint32 num_running"),
        ("load", "optional uint32 interval_ms", "uint32 interval_ms"),
        ("model", "map<string, double> quality", "map<string, float> quality"),
        ("errors", "ERROR_REASON_TOKEN = 19", "ERROR_REASON_TOKEN = 30"),
        ("errors", "ERROR_REASON_TOKEN = 19", "ERROR_REASON_UNKNOWN_TOKEN = 19"),
        ("score", "string text = 2;\n", "string body = 2;\n"),
        ("tokens", "// Ids to turn into text.\nmessage DetokenizeRequest", "// Ids.\nmessage DetokeniseRequest"),
        ("inference", "rpc Cancel(CancelRequest) returns (CancelResponse);", ""),
        ("inference", "rpc Generate(GenerateRequest)", "rpc Generate(CancelRequest)"),
        ("control", "returns (stream LoadInfo)", "returns (LoadInfo)"),
        ("control", "service Control", "service Controls"),
    ],
)
def test_what_breaks_a_client_is_seen(file: str, old: str, new: str, changed: Change) -> None:
    protos = changed(file, old, new)
    if file == "tokens":  # a message has a new name: so have its uses
        changed("inference", "DetokenizeRequest", "DetokeniseRequest")
    assert breaks(protos, PROMISE)


@pytest.mark.parametrize(
    ("file", "old", "new"),
    [
        ("load", "bool draining = 5;", "bool draining = 5;\n  // Steps.\n  uint64 num_steps = 6;"),
        ("errors", "ERROR_REASON_TOKEN = 19;", "ERROR_REASON_TOKEN = 19;\n  // More.\n  ERROR_REASON_MORE = 99;"),
        ("score", "// Text or tokens to score.", "// What to score."),
        (
            "inference",
            "service Inference {",
            "service Inference {\n  // Again.\n  rpc Score2(ScoreRequest) returns (ScoreResponse);",
        ),
    ],
)
def test_an_addition_breaks_nobody_and_is_not_written_down_yet(file: str, old: str, new: str, changed: Change) -> None:
    protos = changed(file, old, new)
    assert breaks(protos, PROMISE) == []
    assert (declared(protos) == PROMISE.read_text()) == (file == "score")
