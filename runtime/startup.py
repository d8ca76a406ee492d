"""From a directory to a runner that is warm: read, verify, pack, size the KV pool."""

import os
import time
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from pressd.runtime.artifact.reader import Checkpoint
from pressd.runtime.config import EngineConfig
from pressd.runtime.constraints import ConstraintCompiler
from pressd.runtime.cores import cores_of_machine
from pressd.runtime.costs import CostTable, StepBudget, TimeBudget, TokenBudget
from pressd.runtime.cuda_runner import CudaRunner
from pressd.runtime.graphs import CudaCapture
from pressd.runtime.kernels.catalogue import race_kernel, step_kernel, use_code_cache
from pressd.runtime.kernels.host_memory import keep_freed_memory
from pressd.runtime.kv_cache import KVCache, KVGroup
from pressd.runtime.kv_plan import longest_sequence, plan_groups
from pressd.runtime.models import Decoder, load_decoder
from pressd.runtime.report import EngineInfo
from pressd.runtime.runner import Runner
from pressd.runtime.warm_up import kv_memory, warm_up

# Share of a computer's free memory which an unconfigured KV pool may take; of a GPU's it takes what is left.
KV_SHARE = 0.25
WARMUP_TOKENS = 16
# Types of keys and values that are reported as they are asked for, all others by PyTorch's names.
KV_NAMES = {torch.float8_e4m3fn: "fp8"}
# Steps are timed with 1, 4, 16, ... tokens, the best of so many runs each, until one takes so many targets.
COST_RUNS = 2
ENOUGH = 2.0


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineParts:
    """What an engine is made of."""

    runner: Runner
    kv: KVCache
    budget: StepBudget
    compiler: ConstraintCompiler
    info: EngineInfo


def start(path: Path, config: EngineConfig) -> EngineParts:
    """Load the model and allocate its KV pool; raises ArtifactError or ValueError, one line each."""
    began = time.monotonic()
    checkpoint = Checkpoint.open(path)
    return start_from(checkpoint, config, verify_seconds=time.monotonic() - began)


def start_from(checkpoint: Checkpoint, config: EngineConfig, *, verify_seconds: float) -> EngineParts:
    """Start as `start` does from a checkpoint that is open already, which took `verify_seconds`."""
    keep_freed_memory()
    use_code_cache(None if config.code_cache is None else Path(config.code_cache))
    seconds = {"verify": verify_seconds}
    device, dtype = pick_device(config), pick_dtype(config, checkpoint)
    set_threads(config, device)
    began = time.monotonic()
    decoder = load_decoder(checkpoint, device=device, dtype=dtype, prefer=config.kernels, kv_dtype=config.kv_dtype)
    seconds["read"] = time.monotonic() - began
    began = time.monotonic()
    peak = warm_up(decoder, config.max_step_tokens)
    budget = measure_budget(decoder, config)
    seconds["warmup"] = time.monotonic() - began
    max_context = context_limit(config, decoder)
    groups = size_groups(config, decoder, max_context, peak)
    kv_tokens = longest_sequence(
        groups, block_size=config.block_size, max_context=max_context, chunk=config.max_step_tokens
    )
    began = time.monotonic()
    runner = make_runner(decoder, groups, config, max_length=min(max_context, kv_tokens + 1))
    seconds["graph_capture"] = time.monotonic() - began
    info = _describe(checkpoint, runner, config, max_context, kv_tokens, seconds, peak)
    kv = KVCache(
        groups,
        config.block_size,
        contiguous=not decoder.reads_tables,
        prefix_cache=config.prefix_cache,
        artifact_id=checkpoint.artifact_id,
        kv_dtype=info.kv_dtype,
    )
    compiler = ConstraintCompiler(checkpoint.path, info.vocab_size, info.eos_token_ids)
    return EngineParts(runner=runner, kv=kv, budget=budget, compiler=compiler, info=info)


def _describe(
    checkpoint: Checkpoint,
    runner: Runner,
    config: EngineConfig,
    max_context: int,
    kv_tokens: int,
    seconds: dict[str, float],
    activations_bytes: int,
) -> EngineInfo:
    decoder = runner.decoder
    dtype = str(decoder.dtype).removeprefix("torch.")
    return EngineInfo(
        architecture=decoder.config.architecture,
        artifact_id=checkpoint.artifact_id,
        device=str(decoder.device),
        dtype=dtype,
        kv_dtype=KV_NAMES.get(decoder.kv_dtype, str(decoder.kv_dtype).removeprefix("torch.")),
        vocab_size=decoder.config.vocab_size,
        max_context=max_context,
        max_batch=config.max_batch,
        eos_token_ids=decoder.config.eos_token_ids,
        block_size=config.block_size,
        kv_blocks=sum(group.num_blocks for group in runner.groups),
        kv_tokens=kv_tokens,
        kv_bytes=runner.kv_bytes,
        weights_bytes=decoder.weights_bytes,
        activations_bytes=activations_bytes,
        graphs_bytes=runner.graphs_bytes,
        dense_bytes=checkpoint.dense_bytes,
        kernels=decoder.kernels,
        unfused_groups=decoder.unfused_groups,
        load_seconds=seconds,
    )


def make_runner(decoder: Decoder, groups: tuple[KVGroup, ...], config: EngineConfig, max_length: int) -> Runner:
    """Return the runner that suits the kernels, ready to run; `max_length` bounds a sequence and the token it draws."""
    if not decoder.reads_tables:
        kind = Runner
        if decoder.is_generated:
            from pressd.runtime.cpu_runner import CpuRunner as kind  # wants LLVM, which is not there on every machine
        plain = kind(decoder, groups, block_size=config.block_size, max_batch=config.max_batch, max_length=max_length)
        plain.warm_up()
        return plain
    runner = CudaRunner(
        decoder,
        groups,
        block_size=config.block_size,
        max_batch=config.max_batch,
        max_length=max_length,
        prepare=step_kernel().prepare,
        race=race_kernel(),
        capture=CudaCapture(decoder.device) if config.cuda_graphs else None,
    )
    runner.warm_up()
    return runner


@torch.inference_mode()
def measure_budget(decoder: Decoder, config: EngineConfig) -> StepBudget:
    """Warm the model up and return how a step's tokens are bounded: by time where a target is set, else by number."""
    longest = min(config.max_step_tokens, decoder.config.max_context)
    if config.target_itl is None:
        _seconds(decoder, min(WARMUP_TOKENS, longest))
        return TokenBudget(config.max_step_tokens)
    _seconds(decoder, 1)
    tokens: list[int] = []
    seconds: list[float] = []
    size = 1
    while not seconds or (tokens[-1] < longest and seconds[-1] < ENOUGH * config.target_itl):
        tokens.append(min(size, longest))
        seconds.append(min(_seconds(decoder, tokens[-1]) for _ in range(COST_RUNS)))
        size *= 4
    table = CostTable(tuple(tokens), tuple(seconds))
    return TimeBudget(
        table, config.target_itl, max_step_tokens=config.max_step_tokens, floor=min(config.block_size, longest)
    )


def _seconds(decoder: Decoder, num_tokens: int) -> float:
    """Return how long a step of one prompt of `num_tokens` takes, the last token's logits included."""
    ids = torch.zeros(1, num_tokens, dtype=torch.int64)
    began = time.perf_counter()
    decoder.lm_head(decoder.hidden_states(ids)[:, -1]).cpu()  # a copy to the host waits until the device has done it
    return time.perf_counter() - began


def set_threads(config: EngineConfig, device: torch.device) -> None:
    """Let PyTorch, and what is generated, use as many threads as were asked for, or as the machine has cores for."""
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    elif config.pins_cores and device.type == "cpu" and (cores := cores_of_machine()) is not None:
        os.sched_setaffinity(0, cores)
        torch.set_num_threads(len(cores))


def pick_device(config: EngineConfig) -> torch.device:
    """Return the device to run on; `auto` is CUDA where there is a usable one."""
    if config.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device cuda was asked for, but PyTorch sees no CUDA device; use --device cpu")
    if config.device == "cuda" or (config.device == "auto" and torch.cuda.is_available()):
        return torch.device("cuda", 0)
    return torch.device("cpu")


def pick_dtype(config: EngineConfig, checkpoint: Checkpoint) -> torch.dtype:
    """Return the type to compute in; `auto` is what the checkpoint says."""
    if config.dtype == "auto":
        return checkpoint.torch_dtype
    dtype = getattr(torch, config.dtype)
    assert isinstance(dtype, torch.dtype)
    return dtype


def context_limit(config: EngineConfig, decoder: Decoder) -> int:
    """Return the longest sequence served: the model's own limit or the configured smaller one."""
    if config.max_context is None:
        return decoder.config.max_context
    if config.max_context > decoder.config.max_context:
        raise ValueError(
            f"max_context is {config.max_context}; this model was trained for {decoder.config.max_context}"
        )
    return config.max_context


def size_groups(config: EngineConfig, decoder: Decoder, max_context: int, peak: int) -> tuple[KVGroup, ...]:
    """Return the KV groups, with the blocks that the configured or the free memory allows; `peak` as of `warm_up`."""
    if config.kv_memory is not None:
        memory = config.kv_memory
    elif decoder.device.type == "cuda":
        memory = kv_memory(decoder, config, peak)
    else:
        memory = int(psutil.virtual_memory().available * KV_SHARE)
    return plan_groups(
        decoder.config.windows,
        layer_block_bytes=decoder.kv_bytes_per_token * config.block_size // len(decoder.blocks),
        memory=memory,
        block_size=config.block_size,
        max_context=max_context,
        max_batch=config.max_batch,
        chunk=config.max_step_tokens,
        bounded=config.kv_memory is None,
    )
