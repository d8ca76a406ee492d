"""What gRPC costs: the door by itself, and a server against the same engine driven in process.

    python tests/bench/door.py                # both tables, into docs/benchmarks/door.md
    python tests/bench/door.py --quick        # shorter, the second table with the example model, on stdout
    python tests/bench/door.py --model DIR    # another model for the second table; --alone leaves that table out

The door by itself serves an engine that computes nothing: in each step, every stream gets a token. What its process,
the engine's and the client's spend is counted apart. The client decodes what it got when the measuring is over.
"""

import argparse
import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
from door_report import markdown
from engine import environment

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
PYLM = ROOT / "examples" / "pylm"
DOCUMENT = ROOT / "docs" / "benchmarks" / "door.md"
MARKS = re.compile(r"(<!-- numbers: begin \(.*?\) -->\n).*?(<!-- numbers: end -->)", re.DOTALL)
# Text that the example's tokenizer has long tokens for; the engine says it over and over.
PROMPT = "import os\nimport sys\n\n\ndef main() -> int:\n    return 0\n"
REAL = ["-m", "pressd.server.cli"]
PACED = [str(HERE / "door_engine.py")]


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """How everything is measured. `paces` are the seconds from step to step, 0 as few as it can."""

    seconds: float
    warm_up: float
    rounds: int
    tokens: int
    streams: tuple[int, ...] = (1, 16, 128)
    paces: tuple[float, ...] = (0.025, 0.0)
    clients: int = 16
    prompt: int = 32


FULL = Plan(seconds=20.0, warm_up=3.0, rounds=5, tokens=96)
QUICK = Plan(seconds=3.0, warm_up=1.0, rounds=3, tokens=64)


@dataclass(frozen=True, slots=True, kw_only=True)
class Server:
    """A server that is ready, and its processes by what they do."""

    target: str
    processes: dict[str, int]


@contextlib.contextmanager
def serving(program: list[str], model: Path, *flags: str) -> Iterator[Server]:
    """Run a server; raises RuntimeError with its log if it does not get ready."""
    paths = os.pathsep.join(str(ROOT / "tests" / name) for name in ("bench", "server"))
    command = [sys.executable, *program, "serve", str(model), "--port", "0", "--metrics-port", "0", *flags]
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder, "log")
        with log.open("wb") as file:
            told = os.environ | {"PYTHONPATH": paths}
            process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=file, env=told)
        try:
            assert process.stdout is not None
            if not process.stdout.readline():  # what is served, once it is
                raise RuntimeError(f"the server ended: {log.read_text()}")
            events = [json.loads(line) for line in log.read_text().splitlines() if line.startswith("{")]
            port = next(event["port"] for event in events if event["event"] == "listening")
            (engine,) = psutil.Process(process.pid).children()
            yield Server(target=f"127.0.0.1:{port}", processes={"door": process.pid, "engine": engine.pid})
        finally:
            process.terminate()
            process.communicate()


def alone(plan: Plan) -> list[dict[str, Any]]:
    """The door with an engine that computes nothing: a row for each pace and number of streams."""
    rows = []
    length, count = 4096, max(plan.streams)
    for pace in plan.paces:
        with tempfile.TemporaryDirectory() as folder:
            for path in PYLM.glob("tokenizer*.json"):
                shutil.copy(path, folder)
            vocab_size = json.loads((PYLM / "config.json").read_text())["vocab_size"]
            script = {"vocab_size": vocab_size, "eos": 0, "max_context": length, "kv_blocks": count * length}
            Path(folder, "script.json").write_text(json.dumps(script | {"pace": pace}))
            flags = ("--max-batch", str(count), "--max-step-tokens", str(length))
            with serving(PACED, Path(folder), *flags) as server:
                for streams in plan.streams:
                    rows.append({"streams": streams, "pace": pace} | _stream(server, streams, length, plan))
                    print(f"{streams} streams, a step in {pace} s: measured", file=sys.stderr, flush=True)
    return rows


def _stream(server: Server, streams: int, length: int, plan: Plan) -> dict[str, Any]:
    """Measure so many streams in a client process of their own."""
    told = asdict(server) | {"streams": streams, "seconds": plan.seconds, "warm_up": plan.warm_up}
    told |= {"prompt": PROMPT, "new_tokens": length // 2}
    command = [sys.executable, str(HERE / "door_client.py"), json.dumps(told)]
    found: dict[str, Any] = json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True).stdout)
    return found


def against_in_process(model: Path, plan: Plan) -> dict[str, Any]:
    """Rates of one load, over gRPC and in process in turns, with the same requests in each round."""
    import torch

    from pressd.server.bench.in_process import InProcess
    from pressd.server.bench.load import drive
    from pressd.server.bench.over_grpc import OverGrpc
    from pressd.server.bench.tables import rates
    from pressd.server.bench.workload import Clients, Span, make_requests
    from pressd.server.settings import Settings

    config = Settings(model=model, served_name="model", max_batch=plan.clients).engine_config()
    found: dict[str, list[float]] = {"in process": [], "over gRPC": []}
    spent = []
    with serving(REAL, model, "--max-batch", str(plan.clients)) as server:
        door = psutil.Process(server.processes["door"])
        with OverGrpc(server.target) as over_grpc:
            own = InProcess(model, config)
            for number in range(plan.rounds + 1):
                requests = make_requests(
                    plan.clients * 2 if number else plan.clients,
                    prompt=Span(plan.prompt, plan.prompt),
                    output=Span(plan.tokens // 2, plan.tokens),
                    vocab_size=own.info.vocab_size,
                    seed=str(number),
                )
                for name, target in (("in process", own), ("over gRPC", over_grpc)):
                    before = door.cpu_times()
                    run = drive(target, requests, Clients(plan.clients))
                    after = door.cpu_times()
                    errors = [sample.error for sample in run.samples if sample.error is not None]
                    if errors or not run.is_whole:
                        raise RuntimeError(f"{name}: {len(errors)} requests failed; {errors[:1]}")
                    if number:  # the first round warms up
                        found[name] += rates([run])
                    if number and name == "over gRPC":
                        seconds = after.user + after.system - before.user - before.system
                        spent.append(1e3 * seconds / sum(sample.num_tokens for sample in run.samples))
                print(f"round {number} of {plan.rounds}: done", file=sys.stderr, flush=True)
    return {
        "tokens_per_s": found,
        "door_cpu_s_per_1000_tokens": spent,
        "weights_bytes": own.info.weights_bytes,
        "torch_threads": torch.get_num_threads(),
    }


@contextlib.contextmanager
def random_model(scheme: str) -> Iterator[Path]:
    """1.1 billion random parameters, pressed in a scheme."""
    import torch
    from engine_row import BILLION
    from transformers import LlamaConfig, LlamaForCausalLM

    from pressd.compress import compress

    with tempfile.TemporaryDirectory() as folder:
        dense, pressed = Path(folder, "dense"), Path(folder, f"random-1b-{scheme}")
        torch.manual_seed(0)
        LlamaForCausalLM._from_config(LlamaConfig(**BILLION), dtype=torch.bfloat16).save_pretrained(dense)
        compress(dense, scheme, pressed)
        shutil.rmtree(dense)
        yield pressed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--alone", action="store_true", help="the door by itself only")
    parser.add_argument(
        "--model", type=Path, metavar="DIR", help="for the second table (1.1 billion random parameters)"
    )
    parser.add_argument("--scheme", default="w4a16g128", help="of the random model; %(default)s")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every number there as well")
    parser.add_argument("--no-write", action="store_true", help="print the tables, leave the document alone")
    arguments = parser.parse_args()
    plan = QUICK if arguments.quick else FULL
    found: dict[str, Any] = {"date": time.strftime("%Y-%m-%d"), "environment": environment(None), "plan": asdict(plan)}
    found |= {"cores": os.cpu_count(), "alone": alone(plan)}
    if not arguments.alone:
        with contextlib.ExitStack() as stack:
            model = arguments.model or (PYLM if arguments.quick else None)
            path = model or stack.enter_context(random_model(arguments.scheme))
            found["against"] = {"model": path.name} | against_in_process(path, plan)
    tables = markdown(found)
    print(tables)
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=1) + "\n")
    if not (arguments.no_write or arguments.quick or arguments.alone):
        DOCUMENT.write_text(MARKS.sub(lambda marks: f"{marks[1]}{tables}{marks[2]}", DOCUMENT.read_text()))


if __name__ == "__main__":
    main()
