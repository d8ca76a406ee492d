"""What the engine is asked and what it answers: plain data, no torch, no protocol."""

import enum
from dataclasses import dataclass, field


class FinishReason(enum.Enum):
    """Why a request ended."""

    EOS = "eos"
    STOP = "stop"
    MAX_TOKENS = "max_tokens"
    CONTEXT_LIMIT = "context_limit"
    CANCELLED = "cancelled"
    NUMERIC_ERROR = "numeric_error"


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How the next token is drawn. temperature 0 is greedy; top_p 1 keeps the whole vocabulary."""

    temperature: float = 1.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0.0 <= self.temperature <= 100.0:
            raise ValueError(f"temperature is {self.temperature}; it must be between 0 (greedy) and 100")
        if not 0.0 < self.top_p <= 1.0:
            raise ValueError(f"top_p is {self.top_p}; it must be above 0 and at most 1")
        if not 0 <= self.seed < 2**64:
            raise ValueError(f"seed is {self.seed}; it must fit in 64 unsigned bits")


@dataclass(frozen=True, slots=True, kw_only=True)
class StoppingParams:
    """When a request ends by itself. None for max_new_tokens means: up to the context limit."""

    max_new_tokens: int | None = None
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        if self.max_new_tokens is not None and self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens is {self.max_new_tokens}; it must be at least 1")


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One prompt to complete. `arrival` is time.monotonic() seconds (one clock for all processes of a machine)."""

    request_id: str
    prompt_token_ids: tuple[int, ...]
    sampling: SamplingParams = field(default_factory=SamplingParams)
    stopping: StoppingParams = field(default_factory=StoppingParams)
    arrival: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestOutput:
    """What one step did for one request: new tokens, and the reason if it ended.

    The step that first schedules a request reports it, without tokens if the prompt takes more steps.

    `matched_token_id` is the stop or EOS token (never part of `token_ids`) that ended it. Times are monotonic seconds:
    when its first token was scheduled and when its first token came out; 0.0 while that has not happened.
    """

    request_id: str
    token_ids: tuple[int, ...] = ()
    finish_reason: FinishReason | None = None
    matched_token_id: int | None = None
    scheduled_at: float = 0.0
    first_token_at: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class StepStats:
    """One step's counts, the engine's gauges after it, and its totals since it began (kv_gathers, numeric_errors)."""

    seconds: float
    num_prefill_tokens: int
    num_decode_tokens: int
    num_rows: int
    num_running: int
    num_waiting: int
    kv_blocks_used: int
    kv_gathers: int
    numeric_errors: int


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
    """What start-up discovered; constant for the life of the engine. Bytes are of memory really allocated."""

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
    kv_bytes: int
    weights_bytes: int
    dense_bytes: int
    kernels: tuple[KernelChoice, ...]
    load_seconds: dict[str, float]
