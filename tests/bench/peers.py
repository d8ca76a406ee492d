"""pressd beside llama.cpp, OpenVINO GenAI and transformers: one shape, the same cores, the same prompts, one run.

    python tests/bench/peers.py --llama-python A/bin/python --openvino-python B/bin/python
    python tests/bench/peers.py --quick         # few points and runs; nothing is written to docs/

Builds a random Llama of a billion parameters under build/bench/peers, presses it, and converts it for every peer whose
Python is given: that of llama.cpp has llama-cpp-python, gguf, torch and safetensors; that of OpenVINO has
openvino-genai, optimum-intel and nncf; transformers runs in this one. What is missing is reported as missing. All
contenders are loaded at once, and at each point of each round they take turns; a figure is the median of the rounds.
"""

import argparse
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from peers_report import Report, into_readme, markdown, plot

ROOT = Path(__file__).resolve().parents[2]
WORK = ROOT / "build" / "bench" / "peers"
DOCUMENT, PLOT = ROOT / "docs" / "benchmarks" / "cpu.md", ROOT / "docs" / "benchmarks" / "cpu.svg"
WORKERS = Path(__file__).with_name("contenders")
SHAPE = {
    "vocab_size": 32000,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
SMALL = SHAPE | {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 2, "num_attention_heads": 8}
SCHEMES = ("w4a8g128", "w8a8", "w4a16g128", "bf16")
LEADING = ("w4a8g128", "w8a8")  # those that are measured at every point, as the peers are
BATCHES = (16, 8, 4, 1)  # in this order: what 16 sequences have computed serves the smaller batches
CONTEXTS = (32, 1024)
PROMPTS = (512, 2048)


@dataclass(slots=True)
class Contender:
    """One engine with one model: how it is started, and the process once it is."""

    label: str
    command: list[str]
    bytes: int
    is_ours: bool
    everywhere: bool = True
    process: subprocess.Popen[str] | None = None
    facts: dict[str, Any] = field(default_factory=dict)

    def start(self, log: Path) -> None:
        began = time.perf_counter()
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        self.process = subprocess.Popen(
            self.command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log.open("w"),
            text=True,
            env=environment,
        )
        self.facts = self._answer() | {"cold_start_s": time.perf_counter() - began}

    def ask(self, **question: Any) -> dict[str, Any]:
        assert self.process is not None
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(question) + "\n")
        self.process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self.process is not None
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.label} ended; see its log in {WORK}")
        answer: dict[str, Any] = json.loads(line)
        return answer


def make_model(folder: Path, shape: dict[str, Any]) -> None:
    """Write the random checkpoint that everything is made from."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    LlamaForCausalLM(LlamaConfig(**shape)).save_pretrained(folder)
    # Exporters want a tokenizer beside the weights; nothing is ever tokenised.
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = {f"w{number}": number for number in range(shape["vocab_size"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="w1", eos_token="w2", unk_token="w0").save_pretrained(
        folder
    )


def once(target: Path, make: Callable[[Path], None]) -> Path:
    """Make a file or folder unless it is there; half of one is never taken for a whole."""
    if not target.exists():
        print(f"making {target.name}", file=sys.stderr, flush=True)
        half = target.with_name(f"half-{target.name}")
        make(half)
        half.rename(target)
    return target


def run(*command: str | Path) -> None:
    subprocess.run([str(part) for part in command], check=True, stdout=sys.stderr)


def size_of(path: Path) -> int:
    """Bytes of the weights at a path."""
    if path.is_file():
        return path.stat().st_size
    kinds = ("*.safetensors", "*.bin")
    return sum(file.stat().st_size for kind in kinds for file in path.glob(kind) if "tokenizer" not in file.name)


def prepare(arguments: argparse.Namespace) -> tuple[list[Contender], list[str]]:
    """Return the contenders whose models could be made, and what is missing."""
    work = WORK / ("small" if arguments.small else "billion")
    work.mkdir(parents=True, exist_ok=True)
    shape = SMALL if arguments.small else SHAPE
    model = once(work / "model", lambda folder: make_model(folder, shape))
    threads, found, missing = str(arguments.threads), [], []

    def add(label: str, python: str, worker: str, made: Path, *, everywhere: bool = True) -> None:
        command = [python, str(WORKERS / worker), str(made), threads]
        ours = worker.startswith("pressd")
        found.append(Contender(label, command, size_of(made), is_ours=ours, everywhere=everywhere))

    for scheme in SCHEMES:

        def press(folder: Path, scheme: str = scheme) -> None:
            recipe = work / f"{scheme}.toml"
            # Head and embedding too, as the files of other engines have them.
            embedding = scheme if scheme == "bf16" else "w8a16"  # rows that are looked up, and multiplied by nothing
            lines = [f'"*" = "{scheme}"', f'lm_head = "{scheme}"', f'embed = "{embedding}"']
            recipe.write_text("\n".join(["[scheme]", *lines, ""]))
            run(sys.executable, "-m", "pressd.server.cli", "compress", model, "-o", folder, "--recipe", recipe)

        pressed = once(work / f"pressd-{scheme}", press)
        add(f"pressd {scheme}", sys.executable, "pressd_worker.py", pressed, everywhere=scheme in LEADING)
    if arguments.llama_python:
        for kind in ("q4_0", "q8_0"):

            def convert(file: Path, kind: str = kind) -> None:
                run(arguments.llama_python, WORKERS / "convert_gguf.py", model, file, kind)

            made = once(work / f"{kind}.gguf", convert)
            label = f"llama.cpp {kind.upper()}"
            add(label, arguments.llama_python, "llamacpp_worker.py", made, everywhere=kind == "q4_0")
    else:
        missing.append("llama.cpp (--llama-python)")
    if arguments.openvino_python:
        for kind in ("int4", "int8"):

            def export(folder: Path, kind: str = kind) -> None:
                cli = Path(arguments.openvino_python).with_name("optimum-cli")
                fine = ["--group-size", "128", "--ratio", "1.0", "--sym"] if kind == "int4" else []
                run(cli, "export", "openvino", "-m", model, "--task", "text-generation-with-past", *fine,
                    "--weight-format", kind, folder)  # fmt: skip

            add(f"OpenVINO {kind}", arguments.openvino_python, "openvino_worker.py", once(work / f"ov-{kind}", export))
    else:
        missing.append("OpenVINO GenAI (--openvino-python)")
    python = arguments.transformers_python or sys.executable
    add("transformers bf16", python, "transformers_worker.py", model, everywhere=False)
    return found, missing


def prompts(count: int, length: int, seed: int) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(5, 31000) for _ in range(length)] for _ in range(count)]


def measure(contenders: list[Contender], arguments: argparse.Namespace) -> dict[str, dict[str, list[float]]]:
    """Return, by point and contender, a figure of each round: tokens per second, or seconds to the first token."""
    figures: dict[str, dict[str, list[float]]] = {}

    def keep(point: str, contender: Contender, value: float) -> None:
        figures.setdefault(point, {}).setdefault(contender.label, []).append(value)

    for number in range(arguments.runs):
        began = time.monotonic()
        for length in arguments.prompts:
            for contender in contenders:
                if contender.everywhere or length == min(arguments.prompts):
                    prompt = prompts(1, length, 1000 * number + length)[0]  # a new one: nothing of it is cached
                    keep(
                        f"first token {length}", contender, contender.ask(what="first_token", prompt=prompt)["seconds"]
                    )
        for context in arguments.contexts:
            for batch in arguments.batches:
                asked = prompts(max(arguments.batches), context, context)[:batch]
                for contender in contenders:
                    if contender.everywhere or context == min(arguments.contexts):
                        steps = contender.ask(what="decode", prompts=asked, steps=arguments.steps)["steps"]
                        keep(f"decode {batch} at {context}", contender, batch / statistics.median(steps))
        print(f"round {number + 1}: {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--llama-python", metavar="PYTHON", help="of an environment with llama-cpp-python and gguf")
    parser.add_argument("--openvino-python", metavar="PYTHON", help="of an environment with openvino-genai and optimum")
    parser.add_argument("--transformers-python", metavar="PYTHON", help="default: this one")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--steps", type=int, default=12, help="decoding steps of a figure, which is their median")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--batches", type=int, nargs="+", default=list(BATCHES))
    parser.add_argument("--contexts", type=int, nargs="+", default=list(CONTEXTS))
    parser.add_argument("--prompts", type=int, nargs="+", default=list(PROMPTS))
    parser.add_argument("--only", nargs="+", metavar="TEXT", help="contenders whose names contain one of these")
    parser.add_argument("--small", action="store_true", help="a tiny shape, to try the script")
    parser.add_argument("--quick", action="store_true", help="two rounds, short contexts, print only")
    parser.add_argument("--from-json", type=Path, metavar="FILE", help="measure nothing, write the pages from FILE")
    parser.add_argument("--json", type=Path, default=WORK / "figures.json", metavar="FILE", help="every figure")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.runs, arguments.contexts, arguments.prompts = 2, [32], [512]
    if arguments.from_json:
        publish(Report(**json.loads(arguments.from_json.read_text())))
        return
    contenders, missing = prepare(arguments)
    if arguments.only:
        contenders = [c for c in contenders if any(text in c.label for text in arguments.only)]
    for contender in contenders:
        contender.start(WORK / f"{contender.label.replace(' ', '-')}.log")
        print(f"{contender.label}: ready after {contender.facts['cold_start_s']:.1f} s", file=sys.stderr, flush=True)
    figures = measure(contenders, arguments)
    for contender in contenders:
        contender.facts["rss_after_bytes"] = contender.ask(what="memory")["rss_bytes"]
        contender.facts |= {"bytes": contender.bytes, "is_ours": contender.is_ours}
    report = Report(
        facts={contender.label: contender.facts for contender in contenders},
        figures=figures,
        missing=missing,
        machine=machine(arguments),
    )
    arguments.json.write_text(json.dumps(report.as_dict(), indent=1) + "\n")
    print(markdown(report))
    if not (arguments.quick or arguments.small or arguments.only):
        publish(report)


def publish(report: Report) -> None:
    """Write the page, the plot, and the README's table."""
    DOCUMENT.write_text(markdown(report))
    plot(report, PLOT)
    readme = ROOT / "README.md"
    readme.write_text(into_readme(readme.read_text(), report))


def machine(arguments: argparse.Namespace) -> dict[str, Any]:
    """What the figures depend on besides the code."""
    names = [line.partition(":")[2] for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line]
    numbers = {
        line.partition(":")[0].strip(): line.partition(":")[2].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()[:30]
    }
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True).stdout
    return {
        "processor": names[0].strip() if names else platform.machine(),
        "family": f"{numbers.get('cpu family', '?')}/{numbers.get('model', '?')}",
        "threads": arguments.threads,
        "commit": commit.strip(),
        "runs": arguments.runs,
        "date": time.strftime("%Y-%m-%d"),
        "python": platform.python_version(),
    }


if __name__ == "__main__":
    main()
