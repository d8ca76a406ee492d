"""The protos pass buf's standard rules, save for names that were chosen; and where they do not, it is seen."""

import json
import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from promise import BUF, PROTOS

# What buf's standard rules say against the promise: names that were chosen all the same.
CHOSEN = {
    ("SERVICE_SUFFIX", "Control"),
    ("SERVICE_SUFFIX", "Inference"),
    # What is described has one name, in an answer of its own and inside another one.
    ("RPC_RESPONSE_STANDARD_NAME", "ServerInfo"),
    ("RPC_RESPONSE_STANDARD_NAME", "Model"),
    ("RPC_RESPONSE_STANDARD_NAME", "LoadInfo"),
    # A stream's message is no response but a part of one.
    ("RPC_RESPONSE_STANDARD_NAME", "GenerateEvent"),
    ("RPC_RESPONSE_STANDARD_NAME", "LoadModelProgress"),
    # Once or as a stream: one message.
    ("RPC_REQUEST_STANDARD_NAME", "GenerateRequest"),
    ("RPC_REQUEST_RESPONSE_UNIQUE", "pressd.v1.GenerateRequest"),
    ("RPC_REQUEST_RESPONSE_UNIQUE", "pressd.v1.LoadInfo"),
}
ALIAS = "  option allow_alias = true;\n  // Nothing.\n  ERROR_REASON_NOTHING = 0;\n  // Never sent.\n"
STANDARD = '{"version": "v2", "lint": {"use": ["STANDARD", "COMMENTS"]}}'


def findings(protos: Path, *flags: str) -> set[tuple[str, str]]:
    """(rule, name that it is about) of all that buf has to say."""
    run = [str(BUF), "lint", str(protos), "--error-format", "json", *flags]
    done = subprocess.run(run, capture_output=True, text=True)
    assert done.returncode in (0, 100), done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert bool(found) == (done.returncode == 100)
    names = [re.search(r'"([^"]*)"', one["message"]) for one in found]
    return {(one["type"], name[1] if name else "") for one, name in zip(found, names, strict=True)}


def test_the_protos_pass() -> None:
    assert findings(PROTOS) == set()


def test_exceptions_are_those_listed() -> None:
    assert findings(PROTOS, "--config", STANDARD) == CHOSEN


@pytest.mark.parametrize(
    ("file", "old", "new", "rule"),
    [
        ("errors", "package pressd.v1;", "package pressd.v2;", "PACKAGE_DIRECTORY_MATCH"),
        (
            "load",
            "message LoadInfo",
            "// More.\nmessage load_info {}\n// Load.\nmessage LoadInfo",
            "MESSAGE_PASCAL_CASE",
        ),
        ("load", "num_running", "numRunning", "FIELD_LOWER_SNAKE_CASE"),
        ("load", "  // Requests waiting. Always set.\n", "", "COMMENT_FIELD"),
        ("load", "// How busy a model is, for routers.\n", "", "COMMENT_MESSAGE"),
        ("load", "package pressd.v1;", 'package pressd.v1;\nimport "pressd/v1/tokens.proto";', "IMPORT_USED"),
        ("chat", 'import "google', 'import public "google', "IMPORT_NO_PUBLIC"),
        ("errors", "ERROR_REASON_UNSPECIFIED", "ERROR_REASON_NONE", "ENUM_ZERO_VALUE_SUFFIX"),
        ("errors", "ERROR_REASON_TOKEN", "REASON_TOKEN", "ENUM_VALUE_PREFIX"),
        ("errors", "ERROR_REASON_TOKEN", "ERROR_REASON_Token", "ENUM_VALUE_UPPER_SNAKE_CASE"),
        ("errors", "  // Never sent.\n", "", "COMMENT_ENUM_VALUE"),
        ("errors", "  // Never sent.\n", ALIAS, "ENUM_NO_ALLOW_ALIAS"),
        ("score", "  // Exactly one is required.\n", "", "COMMENT_ONEOF"),
        ("inference", "  // Turns token ids into text.\n", "", "COMMENT_RPC"),
        ("inference", "rpc Detokenize(", "rpc detokenize(", "RPC_PASCAL_CASE"),
    ],
)
def test_a_broken_rule_is_seen(
    file: str, old: str, new: str, rule: str, changed: Callable[[str, str, str], Path]
) -> None:
    assert rule in {found for found, _ in findings(changed(file, old, new))}
