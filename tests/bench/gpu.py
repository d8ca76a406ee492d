"""Tokens per second of the engine on a device, by scheme and batch, and how near that comes to the memory's bandwidth.

    python tests/bench/gpu.py                                        the example model, pressed
    python tests/bench/gpu.py --hidden 4096 --layers 32              a random Llama, made on the device from a seed
    python tests/bench/gpu.py --model examples/pylm --hidden 2048 --json --out build/gpu-results

Decoding reads every weight and all keys and values once per step, so bytes / bandwidth is the least time a step can
take; the share is that time over the measured one. Bandwidth is what a copy on the same device reaches, reads and
writes counted. Medians; steps include everything the engine does for them, also on the host.
"""

import argparse
import gc
import json
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from random_weights import RandomCheckpoint

from pressd.compress import compress
from pressd.runtime.artifact.reader import Checkpoint
from pressd.runtime.config import EngineConfig
from pressd.runtime.engine import Engine
from pressd.runtime.params import SamplingParams, StoppingParams
from pressd.runtime.request import Request
from pressd.runtime.startup import start_from

PYLM = Path(__file__).parents[2] / "examples" / "pylm"
SCHEMES = ("bf16", "w8a8", "w4a16g128")
BATCHES = (1, 4, 16)
PREFILL = 512
CONTEXTS = (128,)  # tokens before decoding is timed
WARMUP_STEPS = 3
LONGEST = 16384
COPY_BYTES = {"cuda": 1 << 30, "cpu": 1 << 26}


@dataclass(frozen=True, slots=True, kw_only=True)
class Decode:
    """Decoding of `batch` requests together: medians over steps, and energy of the whole card over all of them."""

    batch: int
    context: int
    steps: int
    step_ms: float
    tokens_per_s: float
    bytes_per_step: int
    bandwidth_share: float
    joules_per_token: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Prefill:
    """One prompt in one step; arithmetic of the linears alone, 2 per weight and token."""

    tokens: int
    ms: float
    tokens_per_s: float
    tflops: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One model in one scheme."""

    model: str
    scheme: str
    parameters: int
    weights_bytes: int
    kernels: tuple[str, ...]
    decode: tuple[Decode, ...]
    prefill: Prefill


def copy_bandwidth(device: torch.device, runs: int) -> float:
    """Return bytes per second, read and written, of copying a tensor larger than any cache."""
    source = torch.rand(COPY_BYTES[device.type] // 4, device=device)
    target = torch.empty_like(source)
    seconds = [_timed(device, lambda: target.copy_(source)) for _ in range(runs + 2)][2:]
    return 2 * source.numel() * source.element_size() / statistics.median(seconds)


def _timed(device: torch.device, work: Callable[[], object]) -> float:
    _wait(device)
    began = time.perf_counter()
    work()
    _wait(device)
    return time.perf_counter() - began


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def joules() -> float | None:
    """Return what the first GPU has used since its driver was loaded, None where nobody says."""
    if not torch.cuda.is_available():
        return None
    try:
        import pynvml

        pynvml.nvmlInit()
        return float(pynvml.nvmlDeviceGetTotalEnergyConsumption(pynvml.nvmlDeviceGetHandleByIndex(0))) / 1e3
    except Exception as error:  # no such package, or a card that does not count
        print(f"no energy: {type(error).__name__}: {error}", file=sys.stderr)
        return None


def profile(engine: Engine, steps: int = 8) -> str:
    """Return what a GPU is busy with while one request decodes: time of each kernel in a step, the longest first."""
    engine.add(_request("profile", CONTEXTS[0], steps + 2 * WARMUP_STEPS, salt="profile"))
    for _ in range(2 * WARMUP_STEPS):
        engine.step()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as found:
        for _ in range(steps):
            engine.step()
        torch.cuda.synchronize()
    engine.abort("profile")
    events = sorted(found.key_averages(), key=lambda event: -event.self_device_time_total)[:16]
    lines = [f"{e.self_device_time_total / steps:9.1f} us {e.count / steps:7.1f} x  {e.key[:90]}" for e in events]
    return "\n".join(lines)


def decode(engine: Engine, batch: int, context: int, steps: int, bandwidth: float) -> Decode:
    """Time steps in which every one of `batch` requests decodes one token."""
    length = WARMUP_STEPS + steps
    for index in range(batch):
        engine.add(
            _request(f"decode-{index}", context, length + batch * context // PREFILL + batch + 8, salt=str(index))
        )
    seconds: list[float] = []
    spent: list[float | None] = []
    while len(seconds) < length:
        spent = spent[:1] if len(seconds) > WARMUP_STEPS else [joules()]
        began = time.perf_counter()
        stats = engine.step().stats
        assert engine.has_work, "a request ended before all its steps were timed"
        # The step's tokens are on the host when it returns, so the device has finished it.
        if stats.num_decode_tokens == batch and stats.num_prefill_tokens == 0:
            seconds.append(time.perf_counter() - began)
    spent.append(joules())
    for index in range(batch):
        engine.abort(f"decode-{index}")
    used = None if None in spent else (spent[1] - spent[0]) / (steps * batch)  # type: ignore[operator]
    median = statistics.median(seconds[WARMUP_STEPS:])
    read = step_bytes(engine, batch, context + WARMUP_STEPS + steps // 2)
    return Decode(
        batch=batch,
        context=context,
        steps=steps,
        step_ms=1e3 * median,
        tokens_per_s=batch / median,
        bytes_per_step=read,
        bandwidth_share=read / bandwidth / median,
        joules_per_token=used,
    )


def step_bytes(engine: Engine, batch: int, context: int) -> int:
    """Bytes a decode step has to read: weights, and keys and values of `context` tokens a request.

    An embedding that is not the head as well is left out: of it, a step reads one row per request.
    """
    decoder = engine._runner.decoder
    head = {id(tensor) for tensor in decoder.head.tensors()}
    table = sum(t.numel() * t.element_size() for t in decoder.embedding.tensors() if id(t) not in head)
    return decoder.weights_bytes - table + batch * context * decoder.kv_bytes_per_token


def prefill(engine: Engine, tokens: int, runs: int, weights: int) -> Prefill:
    """Time a prompt that fits one step, from its admission to its first token."""
    seconds = []
    for index in range(runs + 1):
        engine.add(_request(f"prefill-{index}", tokens, 1, salt=f"prefill-{index}"))
        began = time.perf_counter()
        while engine.has_work:
            engine.step()
        seconds.append(time.perf_counter() - began)
    median = statistics.median(seconds[1:])
    tflops = 2 * weights * tokens / median / 1e12
    return Prefill(tokens=tokens, ms=1e3 * median, tokens_per_s=tokens / median, tflops=tflops)


def _request(request_id: str, length: int, new_tokens: int, salt: str = "") -> Request:
    prompt = tuple(index % 89 for index in range(length))
    return Request(
        request_id=request_id,
        prompt_token_ids=prompt,
        sampling=SamplingParams(temperature=0.0),
        stopping=StoppingParams(max_new_tokens=new_tokens, ignore_eos=True),
        cache_salt=salt,
    )


def measure(checkpoint: Any, label: str, scheme: str, arguments: argparse.Namespace, bandwidth: float) -> Row:
    config = EngineConfig(
        device=arguments.device,
        dtype="bfloat16",
        max_batch=max(arguments.batches),
        max_step_tokens=max(arguments.prompt, max(arguments.batches)),
        max_context=min(max(arguments.prompt, *arguments.contexts) + 256, LONGEST),
    )
    engine = Engine(start_from(checkpoint, config, verify_seconds=0.0), config)
    print(
        f"{scheme}: loaded, {engine.info.load_seconds}, KV {engine.info.kv_bytes >> 20} MiB",
        file=sys.stderr,
        flush=True,
    )
    if arguments.profile:
        print(profile(engine), file=sys.stderr, flush=True)
    # Of what is multiplied for every token: the linears in the blocks.
    linears = [member for group in checkpoint.model.groups() if "layers." in group.name for member in group.members]
    weights = sum(linear.out_features * linear.in_features for linear in linears)
    return Row(
        model=label,
        scheme=scheme,
        parameters=checkpoint.model.num_params,
        weights_bytes=engine.info.weights_bytes,
        kernels=tuple(sorted({f"{choice.storage}: {choice.implementation}" for choice in engine.info.kernels})),
        decode=tuple(
            decode(engine, batch, context, arguments.steps, bandwidth)
            for context in arguments.contexts
            for batch in arguments.batches
        ),
        prefill=prefill(engine, arguments.prompt, arguments.runs, weights),
    )


def rows(arguments: argparse.Namespace, bandwidth: float) -> Iterator[Row]:
    """Yield a row for every model and scheme, one model in memory at a time."""
    for scheme in arguments.schemes:
        if arguments.model is None:
            continue
        with tempfile.TemporaryDirectory() as folder:
            compress(arguments.model, scheme, Path(folder, "pressed"))
            checkpoint = Checkpoint.open(Path(folder, "pressed"))
            yield measure(checkpoint, arguments.model.name, scheme, arguments, bandwidth)
        _free()
    for scheme in arguments.schemes:
        if arguments.hidden is None:
            continue
        torch.manual_seed(arguments.seed)
        config = shape_config(arguments)
        made = RandomCheckpoint(config, scheme, device=torch.device(arguments.device), dtype=torch.bfloat16)
        label = f"random Llama, {made.model.num_params / 1e6:,.0f}M parameters"
        yield measure(made, label, scheme, arguments, bandwidth)
        _free()


def _free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def shape_config(arguments: argparse.Namespace) -> dict[str, Any]:
    hidden = arguments.hidden
    heads = arguments.heads or max(1, hidden // 128)
    return {
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": hidden,
        "intermediate_size": arguments.ffn or 7 * hidden // 2,
        "num_hidden_layers": arguments.layers,
        "num_attention_heads": heads,
        "num_key_value_heads": arguments.kv_heads or max(1, heads // 4),
        "vocab_size": arguments.vocab,
        "max_position_embeddings": LONGEST,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "eos_token_id": None,
    }


def environment(device: torch.device, bandwidth: float) -> dict[str, Any]:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return {"device": name, "torch": torch.__version__, "cuda": torch.version.cuda, "copy_bytes_per_s": bandwidth}


def markdown(found: dict[str, Any], measured: list[Row]) -> str:
    """Return a table for docs/, with what it was measured on."""
    version = f"PyTorch {found['torch']}" + (f", CUDA {found['cuda']}" if found["cuda"] else "")
    cases = [(item.context, item.batch) for item in measured[0].decode]
    lines = [
        f"{found['device']}, {version}; a copy moves {found['copy_bytes_per_s'] / 1e9:,.0f} GB/s. Tokens per second "
        f"when decoding (share of the time that reading weights, keys and values at that rate would take; joules of "
        f"the card for a token, where it tells), and of a "
        f"prompt of {measured[0].prefill.tokens}; bfloat16, medians.",
        "",
        "| model | scheme | weights, MiB | kernels | "
        + " | ".join(f"batch {batch} at {context}" for context, batch in cases)
        + " | prompt |",
        "|---|---|" + "---:|---|" + "---:|" * (len(cases) + 1),
    ]
    for row in measured:
        cells = [
            f"{item.tokens_per_s:,.0f} ({item.bandwidth_share:.1%}"
            + (")" if item.joules_per_token is None else f", {item.joules_per_token:.3g} J)")
            for item in row.decode
        ]
        cells.append(f"{row.prefill.tokens_per_s:,.0f} ({row.prefill.tflops:,.1f} TFLOP/s, {row.prefill.ms:,.1f} ms)")
        kernels, mib = "; ".join(row.kernels), row.weights_bytes / 2**20
        lines.append(f"| {row.model} | {row.scheme} | {mib:,.1f} | {kernels} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="directory (default examples/pylm, unless --hidden is given)")
    parser.add_argument("--hidden", type=int, help="measure a random Llama of this width")
    for name, default in (("layers", 32), ("heads", None), ("kv-heads", None), ("ffn", None), ("vocab", 32000)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--schemes", nargs="+", default=SCHEMES)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--batches", nargs="+", type=int, default=BATCHES)
    parser.add_argument("--contexts", nargs="+", type=int, default=CONTEXTS, help="tokens before decoding is timed")
    parser.add_argument("--prompt", type=int, default=PREFILL, help="tokens of the prompt that is timed")
    parser.add_argument("--steps", type=int, default=50, help="decode steps timed per batch")
    parser.add_argument("--runs", type=int, default=10, help="prompts timed")
    parser.add_argument("--profile", action="store_true", help="tell the time of each kernel of a decoding step")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true", help="print JSON, not a table")
    parser.add_argument("--out", type=Path, help="folder for bench.json and bench.md, written after every row")
    arguments = parser.parse_args()
    if arguments.model is None and arguments.hidden is None:
        arguments.model = PYLM
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.exit(2, "gpu.py: PyTorch sees no CUDA device; --device cpu measures this machine's processor\n")
    device = torch.device(arguments.device)
    bandwidth = copy_bandwidth(device, arguments.runs)
    found, measured = environment(device, bandwidth), []
    for row in rows(arguments, bandwidth):
        measured.append(row)
        if arguments.out is not None:
            arguments.out.mkdir(parents=True, exist_ok=True)
            (arguments.out / "bench.json").write_text(
                json.dumps(found | {"rows": [asdict(r) for r in measured]}) + "\n"
            )
            (arguments.out / "bench.md").write_text(markdown(found, measured))
    print(
        json.dumps(found | {"rows": [asdict(row) for row in measured]}) if arguments.json else markdown(found, measured)
    )


if __name__ == "__main__":
    main()
