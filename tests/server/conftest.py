"""Servers as real processes, steered by files, awaited by health and metrics."""

import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from prometheus_client.parser import text_string_to_metric_families

from pressd.client import AsyncClient, CallError, Client

FOLDER = Path(__file__).parent
# Seconds that anything awaited may take on a busy machine before the test fails; nothing ever waits this long.
PATIENCE = 60.0
PAUSE = 0.01
EOS = "</s>"
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'robot' %}{{ raise_exception('robots do not talk') }}{% endif %}"
    "{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


def await_that(condition: Callable[[], bool], what: str) -> None:
    """Wait until a condition holds; fail with its description."""
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, f"still not so: {what}"
        time.sleep(PAUSE)


class Served:
    """A running server process and the ways to look at it."""

    def __init__(self, model: Path, folder: Path, *flags: str, scripted: bool = True) -> None:
        self.model = model
        self._log = folder / "stderr.txt"
        self._out = folder / "stdout.txt"
        program = [str(FOLDER / "scripted_serve.py")] if scripted else ["-m", "pressd.server.cli"]
        with self._log.open("wb") as log, self._out.open("wb") as out:
            self.process = subprocess.Popen(
                [sys.executable, *program, "serve", str(model), "--port", "0", "--metrics-port", "0", *flags],
                stdout=out,
                stderr=log,
                env=os.environ | {"PYTHONPATH": str(FOLDER)},
            )
        listening = self.await_event("listening")
        self.port, self.metrics_port = int(listening["port"]), int(listening["metrics_port"])
        self.target = f"127.0.0.1:{self.port}"

    def await_event(self, event: str) -> dict[str, Any]:
        """Wait for a line of the log and return it."""
        found: list[dict[str, Any]] = []

        def is_there() -> bool:
            found[:] = [line for line in self.log_lines() if line["event"] == event]
            assert found or self.process.poll() is None, f"the server ended: {self._log.read_text()}"
            return bool(found)

        await_that(is_there, f"the log has {event!r}")
        return found[0]

    def await_ready(self) -> "Served":
        """Wait until requests are taken."""

        def is_ready() -> bool:
            assert self.process.poll() is None, f"the server ended: {self.log_text()}"
            return client.is_serving()

        with self.client() as client:
            await_that(is_ready, "the server is ready")
        return self

    def await_metric(self, value: float, name: str, **labels: str) -> None:
        """Wait until a metric has a value."""
        await_that(lambda: self.metric(name, **labels) == value, f"{name}{labels} is {value}")

    def metric(self, name: str, **labels: str) -> float:
        """The sum of all samples of a name with these labels."""
        samples = (sample for family in self.families() for sample in family.samples)
        return sum(float(s.value) for s in samples if s.name == name and labels.items() <= s.labels.items())

    def families(self) -> list[Any]:
        """All metrics, parsed."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.metrics_port}/metrics", timeout=PATIENCE) as answer:
            return list(text_string_to_metric_families(answer.read().decode()))

    def log_text(self) -> str:
        return self._log.read_text()

    def log_lines(self) -> list[dict[str, Any]]:
        """The log's complete lines of JSON; what gRPC and the interpreter write beside them is left out."""
        whole = self.log_text().rpartition("\n")[0].splitlines()
        return [json.loads(line) for line in whole if line.startswith("{")]

    def stdout(self) -> str:
        return self._out.read_text()

    def client(self, timeout: float = PATIENCE) -> Client:
        return Client(self.target, timeout=timeout, retry=None)

    def async_client(self, timeout: float = PATIENCE) -> AsyncClient:
        return AsyncClient(self.target, timeout=timeout, retry=None)

    def engine_pid(self) -> int:
        """The engine's process."""
        (child,) = psutil.Process(self.process.pid).children()
        return child.pid

    def allow_steps(self, steps: int) -> None:
        """Let the scripted engine make this many steps in all."""
        draft = self.model / "steps.draft"
        draft.write_text(str(steps))
        draft.replace(self.model / "steps")

    def allow_all_steps(self) -> None:
        (self.model / "steps").unlink()

    def stop(self) -> int:
        """Tell the server to end and return its exit status."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(PATIENCE)


Serve = Callable[..., Served]


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Serve]:
    """Start servers, in the scripted engine's care unless `scripted=False`; whatever still runs is killed."""
    servers: list[Served] = []

    def start(model: Path, *flags: str, scripted: bool = True) -> Served:
        folder = tmp_path / f"server-{len(servers)}"
        folder.mkdir()
        servers.append(Served(model, folder, *flags, scripted=scripted))
        return servers[-1]

    yield start
    for server in servers:
        server.process.kill()
        server.process.wait()


def write_script(folder: Path, **script: int) -> Path:
    """A model for the scripted engine, without a tokenizer: 100 ids, of which 0 ends a sequence."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "script.json").write_text(json.dumps({"vocab_size": 100, "eos": 0} | script))
    return folder


def write_tokenizer(folder: Path) -> int:
    """A byte-level tokenizer and a chat template; returns the size of its vocabulary. Id 0 ends a sequence."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("t", "h"), ("th", "e"), ("Ġ", "the"), ("l", "o"), ("Ã", "¼")]  # the last: both bytes of u-umlaut
    tokens = [EOS, *alphabet, *(left + right for left, right in merges)]
    tokenizer = Tokenizer(models.BPE(vocab={token: n for n, token in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(EOS, special=True)])
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": EOS, "chat_template": CHAT_TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return len(tokens)


@pytest.fixture
def echo(tmp_path: Path) -> Path:
    """A scripted model of token ids only; it starts in a second."""
    return write_script(tmp_path / "echo")


@pytest.fixture
def scripted() -> Callable[..., Path]:
    """Makes scripted models of other sizes."""
    return write_script


@pytest.fixture(scope="session")
def echo_text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A scripted model with a tokenizer; its prompt is its answer."""
    folder = tmp_path_factory.mktemp("models") / "parrot"
    size = write_tokenizer(folder)
    (folder / "generation_config.json").write_text(
        json.dumps({"do_sample": True, "temperature": 0.5, "top_k": 7, "num_beams": 4})
    )
    return write_script(folder, vocab_size=size, max_context=4096, kv_blocks=4096)


@pytest.fixture(scope="session")
def tokenizer_of() -> Callable[[Path], int]:
    """Puts a tokenizer into a model directory."""
    return write_tokenizer


@pytest.fixture(scope="session")
def server_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Iterator[Served]]:
    """Starts a server that outlives one test; for fixtures to `yield from`."""

    def start(model: Path, *flags: str, scripted: bool = True) -> Iterator[Served]:
        server = Served(model, tmp_path_factory.mktemp("server"), *flags, scripted=scripted)
        try:
            yield server.await_ready()
        finally:
            server.process.kill()
            server.process.wait()

    return start


@pytest.fixture(scope="module")
def parrot(echo_text: Path, server_of: Callable[..., Iterator[Served]]) -> Iterator[Served]:
    """A server of `echo_text` for all tests of a module that leave it as it was."""
    yield from server_of(echo_text)


@pytest.fixture
def refused() -> Callable[..., CallError]:
    """Runs something that must end with a status, and returns it."""

    def run(action: Callable[[], Any], code: str, reason: str) -> CallError:
        with pytest.raises(CallError) as caught:
            action()
        assert (caught.value.code.name, caught.value.reason) == (code, reason), caught.value.message
        return caught.value

    return run


@pytest.fixture
def eventually() -> Callable[[Callable[[], bool], str], None]:
    """Waits until a condition holds."""
    return await_that
