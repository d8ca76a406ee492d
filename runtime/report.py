"""What the engine says of itself: plain data, no torch, no protocol."""

from dataclasses import dataclass
from typing import Literal

from pressd.runtime.request import RequestOutput


@dataclass(frozen=True, slots=True, kw_only=True)
class StepStats:
    """One step's counts, the engine's gauges after it, and its totals since it began.

    Totals: kv_gathers (a layer read keys and values of scattered blocks through a copy), kv_copied_blocks,
    numeric_errors, preemptions, prefix_queried_tokens, prefix_hit_tokens, evicted_blocks. `kv_blocks_cached` are free
    to be taken but hold a prefix. `seconds` are those of planning, launching and collecting the step; `host_seconds`
    the part of them in which, on a CPU, no layer ran: scheduling, sampling and Python. `graph` tells how layers were
    launched: `hit` as one graph, `eager` one by one. `late_compiles` counts kernels compiled while serving.
    """

    seconds: float
    num_prefill_tokens: int
    num_decode_tokens: int
    num_rows: int
    num_running: int
    num_waiting: int
    num_preempted: int
    kv_blocks_used: int
    kv_blocks_cached: int
    kv_gathers: int
    kv_copied_blocks: int
    numeric_errors: int
    preemptions: int
    prefix_queried_tokens: int
    prefix_hit_tokens: int
    evicted_blocks: int
    host_seconds: float
    graph: Literal["hit", "eager"] = "eager"
    late_compiles: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class StepResult:
    """Everything a step has to report."""

    outputs: tuple[RequestOutput, ...]
    stats: StepStats


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelChoice:
    """One implementation chosen at load, how many layers it serves, and why those before it were refused."""

    op: str
    storage: str
    implementation: str
    layers: int
    refusals: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineInfo:
    """What start-up discovered; constant for the life of the engine. Bytes are of memory really allocated.

    `kv_blocks` and `kv_bytes` are of all KV groups together; `kv_tokens` is the longest sequence that they can hold.
    `unfused_groups` are those whose members could not become one matrix. `activations_bytes` are what the largest step
    takes on a GPU, `graphs_bytes` what captured steps keep there; 0 elsewhere.
    """

    architecture: str
    artifact_id: str
    device: str
    dtype: str
    kv_dtype: str
    vocab_size: int
    max_context: int
    max_batch: int
    eos_token_ids: tuple[int, ...]
    block_size: int
    kv_blocks: int
    kv_tokens: int
    kv_bytes: int
    weights_bytes: int
    dense_bytes: int
    kernels: tuple[KernelChoice, ...]
    unfused_groups: int
    load_seconds: dict[str, float]
    activations_bytes: int = 0
    graphs_bytes: int = 0
