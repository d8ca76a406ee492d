"""The command line as a user meets it."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pressd.server import cli

PATIENCE = 60
# Runs the command line in a fresh interpreter and fails if it has loaded what only serving and pressing need.
LIGHT = (
    "import sys; from pressd.server.cli import main\n"
    "try: status = main(sys.argv[1:])\n"
    "except SystemExit as end: status = end.code\n"
    "heavy = {'torch', 'transformers', 'tokenizers', 'zmq', 'uvloop', 'prometheus_client'} & set(sys.modules)\n"
    "assert not heavy, heavy\n"
    "sys.exit(status)"
)


def pressd(*arguments: str, program: tuple[str, ...] = ("-m", "pressd.server.cli"), text: str | None = None) -> Any:
    """Run the command and return how it ended."""
    command = [sys.executable, *program, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, input=text)


def test_version_is_the_packages() -> None:
    from importlib.metadata import version

    ended = pressd("--version")
    assert (ended.returncode, ended.stdout) == (0, f"pressd {version('pressd')}\n")


@pytest.mark.parametrize(
    "arguments",
    [
        ("--help",),
        *((verb, "--help") for verb in ("serve", "generate", "health", "models", "bench")),
        *((verb, "--help") for verb in ("compress", "eval", "inspect", "verify")),
    ],
    ids=" ".join,
)
def test_help_is_light(arguments: tuple[str, ...]) -> None:
    ended = pressd(*arguments, program=("-c", LIGHT))
    assert (ended.returncode, ended.stderr) == (0, "")
    assert "usage: " in ended.stdout


@pytest.mark.parametrize(
    "arguments",
    [
        *((), ("fly",), ("generate",), ("generate", "x", "--max-new-tokens", "many")),
        *(("health", "--target", "localhost"), ("models", "--target", "http://localhost:1")),
        *(("generate", "x", "--regex", "a", "--choice", "b"), ("generate", "x", "--json-schema", "nowhere.json")),
    ],
    ids=" ".join,
)
def test_wrong_usage_is_status_2(arguments: tuple[str, ...]) -> None:
    ended = pressd(*arguments)
    assert (ended.returncode, ended.stdout) == (2, "")
    assert "usage: pressd" in ended.stderr


@pytest.mark.parametrize("arguments", [("health",), ("models",), ("generate", "x")], ids=" ".join)
def test_server_that_is_not_there_is_one_line(arguments: tuple[str, ...]) -> None:
    ended = pressd(*arguments, "--target", "127.0.0.1:1", program=("-c", LIGHT))
    assert (ended.returncode, ended.stdout) == (1, "")
    assert ended.stderr == f"pressd {arguments[0]}: 127.0.0.1:1 does not answer; is `pressd serve` running there?\n"


def test_trace_is_shown_when_asked_for() -> None:
    ended = pressd("health", "--target", "127.0.0.1:1", "--debug")
    assert ended.returncode == 1
    assert "Traceback" in ended.stderr


@pytest.mark.system
def test_generate_streams_text_and_tells_statistics_apart(parrot: Any) -> None:
    ended = pressd("generate", "the ü 漢", "--target", parrot.target, program=("-c", LIGHT))
    assert (ended.returncode, ended.stdout) == (0, "the ü 漢\n")
    assert "tokens in" in ended.stderr
    assert "ended by eos" in ended.stderr
    assert len(ended.stderr.splitlines()) == 1


@pytest.mark.system
@pytest.mark.parametrize("stream", [(), ("--no-stream",)], ids=["stream", "whole"])
def test_generate_takes_options_and_writes_json(parrot: Any, stream: tuple[str, ...]) -> None:
    options = ("--max-new-tokens", "50", "--temperature", "0", "--top-p", "0.5", "--seed", "3", "--stop", "!")
    ended = pressd("generate", "abc! def", "--target", parrot.target, "--json", *options, *stream)
    assert (ended.returncode, ended.stderr) == (0, "")
    answer = json.loads(ended.stdout)
    assert answer["completions"] == [{"text": "abc", "finish_reason": "stop", "matched_stop": "!"}]
    assert (answer["seed"], answer["prompt_tokens"], answer["completion_tokens"]) == (3, 8, 3)
    assert answer["timings"]["total_seconds"] > 0


@pytest.mark.system
@pytest.mark.parametrize("stream", [(), ("--no-stream",)], ids=["stream", "whole"])
def test_generate_prints_several_completions_one_after_the_other(parrot: Any, stream: tuple[str, ...]) -> None:
    asked = ("generate", "ab", "--target", parrot.target, "--n", "3", *stream)
    ended = pressd(*asked)
    assert (ended.returncode, ended.stdout) == (0, "--- 1 of 3\nab\n--- 2 of 3\nab\n--- 3 of 3\nab\n")
    answer = json.loads(pressd(*asked, "--json").stdout)
    assert [completion["text"] for completion in answer["completions"]] == ["ab"] * 3
    assert (answer["prompt_tokens"], answer["completion_tokens"]) == (2, 6)


@pytest.mark.system
def test_generate_shows_log_probabilities(parrot: Any) -> None:
    """The scripted engine says -(id + 1) / 8 of a token, and that its rank is id + 1."""
    with parrot.client() as client:
        ids = client.tokenize("ab!")
    asked = ("generate", "ab!", "--target", parrot.target, "--logprobs")
    ended = pressd(*asked)
    assert ended.returncode == 0
    rows = [[repr(letter), f"{-(token + 1) / 8:.4f}", str(token + 1)] for letter, token in zip("ab!", ids, strict=True)]
    text, *table = ended.stdout.splitlines()
    assert (text, [line.split() for line in table]) == ("ab!", [["token", "logprob", "rank"], *rows])
    (completion,) = json.loads(pressd(*asked, "--json").stdout)["completions"]
    assert completion["tokens"] == [
        {"id": token, "text": letter, "logprob": -(token + 1) / 8, "rank": token + 1}
        for letter, token in zip("ab!", ids, strict=True)
    ]


@pytest.mark.system
def test_generate_follows_a_system_message(parrot: Any) -> None:
    ended = pressd("generate", "you", "--system", "be brief", "--target", parrot.target)
    assert ended.stdout == "system: be brief\nuser: you\nassistant:\n"


@pytest.mark.system
def test_token_file_opens_a_locked_server(serve: Callable[..., Any], echo: Path, tmp_path: Path) -> None:
    (file := tmp_path / "tokens").write_text("# ours\n\n  a-token-of-the-tests admin # and\nanother-token-of-tests\n")
    server = serve(echo, "--token-file", str(file)).await_ready()
    ended = pressd("models", "--target", server.target)
    assert (ended.returncode, ended.stderr.startswith("pressd models: UNAUTHENTICATED: ")) == (1, True)
    ended = pressd("models", "--target", server.target, "--token-file", str(file))
    assert (ended.returncode, ended.stderr) == (0, "")


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (("--token-file", "{folder}/none"), "--token-file {folder}/none: No such file or directory; give a file that"),
        (("--token-file", "{folder}/empty"), "--token-file {folder}/empty has no token; write one a line"),
        (("--tls-cert", "x"), "a certificate and its key go together; give key too"),
        (("--tls-ca", "{folder}/none"), "TLS ca {folder}/none: No such file or directory; give a PEM file"),
        (("--target", "pressd.example:1", "--token-file", "{folder}/tokens"), "a token for pressd.example:1 would be "),
    ],
)
def test_connection_that_cannot_be_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], complaint: str
) -> None:
    (tmp_path / "empty").write_text("# nothing\n")
    (tmp_path / "tokens").write_text("secret")
    for verb in (("health",), ("models",), ("generate", "x")):
        status = cli.main([*verb, *(argument.format(folder=tmp_path) for argument in arguments)])
        out, err = capsys.readouterr()
        assert (status, out, len(err.splitlines())) == (1, "", 1)
        assert err.startswith(f"pressd {verb[0]}: {complaint.format(folder=tmp_path)}")
        assert "secret" not in err


@pytest.mark.system
def test_generate_reads_standard_input_and_chats(parrot: Any) -> None:
    ended = pressd("generate", "-", "--chat", "--target", parrot.target, text="hello\nyou")
    assert ended.stdout == "user: hello\nyou\nassistant:\n"


@pytest.mark.system
def test_generate_tells_why_it_was_refused(parrot: Any) -> None:
    ended = pressd("generate", "x", "--target", parrot.target, "--temperature", "-1")
    assert (ended.returncode, ended.stdout) == (1, "")
    assert ended.stderr.startswith("pressd generate: INVALID_ARGUMENT: sampling.temperature: ")
    assert len(ended.stderr.splitlines()) == 1


@pytest.mark.system
def test_health_and_models(parrot: Any) -> None:
    ended = pressd("health", "--target", parrot.target, program=("-c", LIGHT))
    assert (ended.returncode, ended.stdout) == (0, "ready\n")
    assert json.loads(pressd("health", "--target", parrot.target, "--json").stdout) == {"ready": True}
    ended = pressd("models", "--target", parrot.target, program=("-c", LIGHT))
    head, row = ended.stdout.splitlines()
    assert head.split() == [
        *("name", "state", "architecture", "context", "weights", "scheme", "bits", "ratio", "KL", "top-1", "version")
    ]
    assert row.split() == ["parrot", "ready", "Echo", "4,096", "3.0", "MiB", *("-" * 5), "echo-1"]
    (model,) = json.loads(pressd("models", "--target", parrot.target, "--json").stdout)["models"]
    assert (model["name"], model["version"]) == ("parrot", "echo-1")


@pytest.mark.system
def test_health_of_a_server_that_loads_is_status_1(serve: Callable[..., Any], echo: Path) -> None:
    (echo / "hold").touch()
    ended = pressd("health", "--target", serve(echo).target)
    assert (ended.returncode, ended.stdout, ended.stderr) == (1, "not ready\n", "")


@pytest.fixture
def slow(serve: Callable[..., Any], echo_text: Path, tmp_path: Path) -> Any:
    """A server that says its first tokens and then nothing until it is allowed to."""
    model = tmp_path / "slow"
    model.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json", "script.json"):
        (model / name).write_bytes((echo_text / name).read_bytes())
    (model / "steps").write_text("3")
    return serve(model).await_ready()


def generating(server: Any, prompt: str, *options: str) -> subprocess.Popen[bytes]:
    """Start `pressd generate` and return it once it has shown its first text."""
    command = [sys.executable, "-m", "pressd.server.cli", "generate", prompt, "--target", server.target, *options]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.read(1) == prompt[:1].encode()
    return process


@pytest.mark.system
def test_health_tells_what_changes(serve: Callable[..., Any], echo: Path) -> None:
    server = serve(echo).await_ready()
    command = [sys.executable, "-m", "pressd.server.cli", "health", "--watch", "--target", server.target]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        server.process.send_signal(signal.SIGTERM)
        assert process.stdout.readline() == "not ready\n"
        _, complaint = process.communicate(timeout=PATIENCE)
    assert process.returncode == 1
    assert len(complaint.splitlines()) == 1


@pytest.mark.system
def test_ctrl_c_cancels_and_is_status_130(slow: Any) -> None:
    process = generating(slow, "abcdef")
    process.send_signal(signal.SIGINT)
    _, complaint = process.communicate(timeout=PATIENCE)
    assert (process.returncode, complaint) == (130, b"")
    slow.await_metric(0, "pressd_requests_running")
    assert slow.metric("pressd_requests_cancelled_total", phase="decode") == 1
    slow.allow_steps(6)
    command = [sys.executable, "-m", "pressd.server.cli", "generate", "abcdef", "--no-stream", "--target", slow.target]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        slow.await_metric(3 + 3, "pressd_generated_tokens_total")
        process.send_signal(signal.SIGINT)
        assert process.communicate(timeout=PATIENCE) == (b"", b"")
    assert process.returncode == 130
    slow.await_metric(2, "pressd_requests_cancelled_total", phase="decode")


@pytest.mark.system
def test_reader_that_has_enough_is_no_failure(slow: Any) -> None:
    process = generating(slow, "abcdef")
    assert process.stdout is not None
    process.stdout.close()
    slow.allow_all_steps()
    assert process.wait(PATIENCE) == 128 + signal.SIGPIPE
    assert process.stderr is not None
    assert process.stderr.read() == b""
    process.stderr.close()


def test_environment_of_the_tests_has_no_settings() -> None:
    assert not [name for name in os.environ if name.startswith("PRESSD_")]
