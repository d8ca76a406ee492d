"""Press the example model, measure what that cost, serve it, stream from it, crowd it, stop. Every number is measured.

python examples/demo.py   # what `make demo` runs
"""

import argparse
import asyncio
import contextlib
import itertools
import json
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families

from pressd.client import AsyncClient, CallError, Client
from pressd.compress import compress
from pressd.compress.recipe import recipe_of_scheme

ROOT = Path(__file__).resolve().parent.parent
SOURCE = ROOT / "examples" / "pylm"
OUT = ROOT / "build" / "demo"
PRESSD = Path(sys.executable).with_name("pressd")
DENSE, SCHEMES, STREAMED = "bf16", ("w8a8", "w4a16g128"), "w4a16g128"
# As `pressd compress -s` does, on an eighth of the text: enough for a model of this size.
PASSES, CALIBRATION_TOKENS = ("gptq",), 8192
PROMPTS = {"A": "def read_config(path):", "B": "class Queue:\n    def __init__(self, maxsize=0):"}
# One seed draws one noise whatever the model: texts part where a model's own preference changes, not by chance.
NEW_TOKENS, TEMPERATURE, SEED = 64, 0.6, 1
# A crowd for the live metrics: so many clients at once. They are read at growing intervals, seldom where it is slow.
CROWD, CROWD_TOKENS, GLANCE_SECONDS, GLANCE_GROWTH = 16, 48, 0.2, 1.4
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 12}, "size": {"enum": [1, 2, 4]}},
    "required": ["name", "size"],
    "additionalProperties": False,
}
# Not in the model's training text; what a model makes of it is asked over the wire.
SCORED = "for line in reversed(lines):\n    total += len(line)\n"
RAW_METRICS = tuple(f"pressd_{name}" for name in ("requests_total", "generated_tokens_total", "model_weights_bytes"))
START_SECONDS, CALL_SECONDS, STOP_SECONDS = 120.0, 60.0, 40.0
MIB = 1 << 20


class DemoError(Exception):
    """A step did not do what it should; the message is one line."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pressed:
    """A model on disk and its measured fidelity; the defaults are the source's own."""

    scheme: str
    path: Path
    weight_bytes: int
    ratio: float = 1.0
    bits_per_weight: float = 16.0
    perplexity: float
    kl: float | None = None
    top1: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """One streamed answer, with the server's own time to its first token."""

    text: str
    num_tokens: int
    ttft_seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Served:
    """What a model did with both prompts at once and with a crowd, and what its server exported.

    `logprob` is what it gives each token of SCORED in the mean, `answer` what it says under SCHEMA.
    """

    completions: dict[str, Completion]
    tokens_per_second: float
    crowd_tokens_per_second: float
    logprob: float
    answer: str
    metrics: str

    @property
    def weights_bytes(self) -> float:
        """Memory of the weights, as exported."""
        families = text_string_to_metric_families(self.metrics)
        samples = (sample for family in families for sample in family.samples)
        return next(sample.value for sample in samples if sample.name == "pressd_model_weights_bytes")


def press(scheme: str, tokens: int) -> tuple[Pressed, float]:
    """Press the source, then measure the result with `pressd eval`; returns the source's perplexity as well."""
    began = time.monotonic()
    path = OUT / scheme
    recipe = recipe_of_scheme(scheme, PASSES, {"tokens": CALIBRATION_TOKENS})
    totals = compress(SOURCE, recipe, path).totals
    assert totals.bpw is not None
    print(
        f"  {totals.dense_bytes / MIB:.1f} MiB -> {totals.bytes / MIB:.1f} MiB in {time.monotonic() - began:.1f} s; "
        f"measuring on {tokens:,} held-out tokens"
    )
    began = time.monotonic()
    command: list[str | Path] = [PRESSD, "eval", path, "--against", SOURCE, f"--tokens={tokens}", "--json"]
    answer = subprocess.run(command, capture_output=True, text=True)
    if answer.returncode != 0:
        raise DemoError(f"pressd eval: {last_line(answer.stderr)}")
    quality = json.loads(answer.stdout)
    print(
        f"  perplexity {quality['ppl_source']:.3f} -> {quality['ppl']:.3f}, KL {quality['kl_mean']:.5f} nats, "
        f"same first choice {quality['top1_agreement']:.1%}; {time.monotonic() - began:.1f} s"
    )
    pressed = Pressed(
        scheme=scheme,
        path=path,
        weight_bytes=totals.bytes,
        ratio=totals.ratio,
        bits_per_weight=totals.bpw,
        perplexity=quality["ppl"],
        kl=quality["kl_mean"],
        top1=quality["top1_agreement"],
    )
    return pressed, quality["ppl_source"]


def serve(model: Pressed) -> Served:
    """Start `pressd serve` on free ports, stream both prompts from it at once, read its metrics, and end it."""
    port, metrics_port = free_ports(2)
    with running(model, port, metrics_port):
        target = f"127.0.0.1:{port}"
        completions, seconds = asyncio.run(stream_all(target, aloud=model.scheme == STREAMED))
        crowd_rate = asyncio.run(crowd(target, metrics_port))
        with Client(target, timeout=CALL_SECONDS) as client:
            score = client.score(SCORED)
            answer = client.generate("# settings\n", json_schema=SCHEMA, temperature=0.0, max_new_tokens=NEW_TOKENS)
        metrics = read_metrics(metrics_port)
    num_tokens = sum(completion.num_tokens for completion in completions.values())
    return Served(
        completions=completions,
        tokens_per_second=num_tokens / seconds,
        crowd_tokens_per_second=crowd_rate,
        logprob=score.total_logprob / len(score.logprobs),
        answer=answer.completions[0].text,
        metrics=metrics,
    )


async def crowd(target: str, metrics_port: int) -> float:
    """Have many clients ask at once and show the server's metrics meanwhile; returns tokens a second of all."""
    async with AsyncClient(target, timeout=CALL_SECONDS) as client:
        began = time.monotonic()
        asked = {"temperature": TEMPERATURE, "max_new_tokens": CROWD_TOKENS, "ignore_eos": True}
        answers = asyncio.gather(*(client.generate(f"# {number}\n", **asked) for number in range(CROWD)))
        pause = GLANCE_SECONDS
        while not (await asyncio.wait({answers}, timeout=pause))[0]:
            pause *= GLANCE_GROWTH
            metrics = await asyncio.to_thread(read_metrics, metrics_port)
            print(f"  {time.monotonic() - began:4.1f} s  {glance(metrics)}", flush=True)
        await answers
        return CROWD * CROWD_TOKENS / (time.monotonic() - began)


def read_metrics(port: int) -> str:
    """What a server exports now."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=CALL_SECONDS) as response:
        text: str = response.read().decode()
    return text


def glance(metrics: str) -> str:
    """A line of what matters while a server is busy."""
    samples = (sample for family in text_string_to_metric_families(metrics) for sample in family.samples)
    values = {sample.name: sample.value for sample in samples}
    names = ("requests_running", "requests_waiting", "kv_cache_usage_ratio", "generated_tokens_total")
    running, waiting, usage, tokens = (values.get(f"pressd_{name}", 0.0) for name in names)
    return f"running {running:.0f}  waiting {waiting:.0f}  KV {usage:.1%}  tokens so far {tokens:.0f}"


@contextlib.contextmanager
def running(model: Pressed, port: int, metrics_port: int) -> Iterator[None]:
    """A server for the length of a block. It says its one line on stdout when it is ready; its log is a file."""
    log = OUT / f"serve-{model.scheme}.log"
    command: list[str | Path] = [PRESSD, "serve", model.path, f"--port={port}", f"--metrics-port={metrics_port}"]
    with log.open("w") as file:
        # A session of its own: Ctrl-C reaches the demonstration alone, which then ends the server as it should be.
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=file, start_new_session=True)
    assert process.stdout is not None
    try:
        began = time.monotonic()
        readable, _, _ = select.select([process.stdout], [], [], START_SECONDS)
        line = process.stdout.readline().decode().strip() if readable else ""
        if not line:
            raise DemoError(f"pressd serve {model.path.name}: {last_line(log.read_text()) or 'not ready in time'}")
        print(f"  {line}\n  ready after {time.monotonic() - began:.1f} s")
        yield
        process.terminate()
        code = process.wait(STOP_SECONDS)
        print(f"  SIGTERM -> exit code {code}")
        if code != 0:
            raise DemoError(f"pressd serve ended with {code}: {last_line(log.read_text())}")
    finally:  # whatever happened, the server and its engine are gone afterwards
        process.stdout.close()
        process.terminate()
        try:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(STOP_SECONDS)
        finally:  # also for those who press Ctrl-C twice
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


async def stream_all(target: str, *, aloud: bool) -> tuple[dict[str, Completion], float]:
    """Stream both prompts at once; returns the answers and the seconds until both were there."""
    async with AsyncClient(target, timeout=CALL_SECONDS) as client:
        began = time.monotonic()
        answers = await asyncio.gather(*(stream(client, *prompt, aloud=aloud) for prompt in PROMPTS.items()))
        return dict(zip(PROMPTS, answers, strict=True)), time.monotonic() - began


async def stream(client: AsyncClient, label: str, prompt: str, *, aloud: bool) -> Completion:
    """Stream one completion, printing each line that is not blank as soon as it is whole."""
    text, unprinted, finished = "", prompt, None
    async for event in client.stream(prompt, temperature=TEMPERATURE, seed=SEED, max_new_tokens=NEW_TOKENS):
        kind = event.WhichOneof("event")
        if kind == "delta":
            text += event.delta.text
            unprinted += event.delta.text
        elif kind == "finished":
            finished = event.finished
        *lines, unprinted = unprinted.split("\n")
        for line in [*lines, unprinted] if finished else lines:
            if aloud and line.strip():
                print(f"  {label} | {line}", flush=True)
    if finished is None:
        raise DemoError(f"the stream of prompt {label} ended without its last event")
    num_tokens, ttft_seconds = finished.usage.completion_tokens, finished.timings.ttft_seconds
    return Completion(text=text, num_tokens=num_tokens, ttft_seconds=ttft_seconds)


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on now."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return [found.getsockname()[1] for found in sockets]


def last_line(text: str) -> str:
    """The last line that says something."""
    return next((line for line in reversed(text.splitlines()) if line.strip()), "")


def side_by_side(left: Completion, right: Completion, width: int = 56) -> Iterator[str]:
    """Two texts in columns, without their blank lines."""
    columns = ([line for line in side.text.splitlines() if line.strip()] for side in (left, right))
    for pair in itertools.zip_longest(*columns, fillvalue=""):
        yield "  " + " | ".join(line[:width].ljust(width) for line in pair).rstrip()


def quality_cells(model: Pressed) -> list[str]:
    """Size and fidelity."""
    return [
        model.scheme,
        f"{model.weight_bytes / MIB:.2f}",
        f"{model.ratio:.2f}",
        f"{model.bits_per_weight:.2f}",
        f"{model.perplexity:.3f}",
        "" if model.kl is None else f"{model.kl:.5f}",
        "" if model.top1 is None else f"{model.top1:.2%}",
    ]


QUALITY_HEADS = ["scheme", "MiB", "ratio", "bpw", "perplexity", "KL", "top-1"]


def table(models: list[Pressed], served: list[Served]) -> Iterator[str]:
    """Lines of the table on screen."""
    rows = [[*QUALITY_HEADS, "tokens/s", f"with {CROWD}", "TTFT ms", "MiB in memory"]]
    for model, seen in zip(models, served, strict=True):
        ttft = max(completion.ttft_seconds for completion in seen.completions.values())
        speed = [f"{seen.tokens_per_second:.0f}", f"{seen.crowd_tokens_per_second:.0f}", f"{1000 * ttft:.0f}"]
        rows.append([*quality_cells(model), *speed, f"{seen.weights_bytes / MIB:.2f}"])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        yield "  " + "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True))


def demonstrate(tokens: int) -> None:
    """Every step, told on stdout."""
    shutil.rmtree(OUT, ignore_errors=True)
    OUT.mkdir(parents=True)
    models: list[Pressed] = []
    for scheme in SCHEMES:
        print(f"\npressing {SOURCE.relative_to(ROOT)} to {scheme}")
        pressed, source_perplexity = press(scheme, tokens)
        models.append(pressed)
    size = sum(path.stat().st_size for path in SOURCE.glob("*.safetensors"))
    models.insert(0, Pressed(scheme=DENSE, path=SOURCE, weight_bytes=size, perplexity=source_perplexity))
    served: list[Served] = []
    for model in models:
        print(f"\nserving {model.path.relative_to(ROOT)} ({model.scheme}): two prompts at once, then {CROWD} clients")
        served.append(serve(model))
    by_scheme = {model.scheme: seen for model, seen in zip(models, served, strict=True)}
    for label, prompt in PROMPTS.items():
        print(f"\nafter {prompt.strip()!r}: {DENSE} on the left, {STREAMED} on the right")
        left, right = (by_scheme[scheme].completions[label] for scheme in (DENSE, STREAMED))
        print(*side_by_side(left, right), sep="\n")
    print("\nasked over gRPC: log-likelihood of one text, and an object that must follow a schema")
    for model, seen in zip(models, served, strict=True):
        print(f"  {model.scheme:>10}  {seen.logprob:.4f} nats a token  {' '.join(seen.answer.split())}")
    print(f"\nsome of what the server of {STREAMED} exported")
    lines = by_scheme[STREAMED].metrics.splitlines()
    print(*(f"  {line}" for line in lines if line.startswith(RAW_METRICS)), sep="\n")
    print("\nwhat it cost")
    print(*table(models, served), sep="\n")


def main() -> int:
    """Exit status: 0 done, 1 a step failed, 130 interrupted."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--tokens", type=int, default=16384, help="held-out tokens to measure on (default: %(default)s)"
    )
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends the servers on the way out
    began = time.monotonic()
    try:
        demonstrate(arguments.tokens)
        print(f"\ndone in {time.monotonic() - began:.0f} s; the artifacts are in {OUT.relative_to(ROOT)}")
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130
    except (DemoError, CallError, ValueError, OSError, subprocess.TimeoutExpired) as error:
        print(f"demo failed: {last_line(str(error))}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
