"""What an engine is told before it starts. No I/O, no environment, no torch."""

import math
from dataclasses import dataclass
from typing import Literal

DeviceName = Literal["auto", "cpu", "cuda"]
DtypeName = Literal["auto", "float32", "float64", "bfloat16", "float16"]
KVDtypeName = Literal["auto", "bf16", "int8", "fp8"]
KernelPreference = Literal["fast", "reference"]

DEVICES: tuple[DeviceName, ...] = ("auto", "cpu", "cuda")
DTYPES: tuple[DtypeName, ...] = ("auto", "float32", "float64", "bfloat16", "float16")
KV_DTYPES: tuple[KVDtypeName, ...] = ("auto", "bf16", "int8", "fp8")


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """Settings of one engine; every bound is checked once, here.

    `dtype` is what layers compute in (`auto`: the checkpoint's own). `kv_dtype` is what keys and values are stored in
    (`auto`: what layers compute in); the scales of int8 and fp8 are the checkpoint's where it has some for that type,
    else each token and head has its own. `kv_memory` is in bytes (None: as much as
    `max_batch` requests of `max_context` tokens need, within a quarter of the free memory). `max_context` None takes
    the model's own limit. `threads` None leaves torch's choice. `target_itl` is the time, in seconds, that a step
    should take at most while sequences wait for their next token, so that prompts are computed in smaller pieces beside
    them (None: only `max_step_tokens` bounds a step). With `overlap` a step is launched before the results of the last
    are read (None: on a GPU). `code_cache` is the directory that keeps kernels which were generated for this CPU (None:
    they are generated at every start). With `pins_cores` this process runs on as many cores as help, and on no others,
    unless `threads` says how many. `cuda_graphs` lets a GPU replay decoding steps instead of being told of each
    operator.
    """

    device: DeviceName = "auto"
    dtype: DtypeName = "auto"
    kernels: KernelPreference = "fast"
    block_size: int = 16
    kv_dtype: KVDtypeName = "auto"
    kv_memory: int | None = None
    max_batch: int = 32
    max_step_tokens: int = 512
    max_context: int | None = None
    threads: int | None = None
    target_itl: float | None = None
    prefix_cache: bool = True
    overlap: bool | None = None
    cuda_graphs: bool = True
    code_cache: str | None = None
    pins_cores: bool = False

    def __post_init__(self) -> None:
        for name in ("block_size", "max_batch", "max_step_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        for name in ("kv_memory", "max_context", "threads"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}; it must be at least 1, or left out")
        if self.target_itl is not None and not 0.0 < self.target_itl < math.inf:
            raise ValueError(f"target_itl is {self.target_itl} seconds; it must be above 0, or left out")
        if self.device not in DEVICES:
            raise ValueError(f"device {self.device!r} is not known; choose one of {', '.join(DEVICES)}")
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype {self.dtype!r} is not known; choose one of {', '.join(DTYPES)}")
        if self.kv_dtype not in KV_DTYPES:
            raise ValueError(f"kv_dtype {self.kv_dtype!r} is not known; choose one of {', '.join(KV_DTYPES)}")
        if self.kernels not in ("fast", "reference"):
            raise ValueError(f"kernels {self.kernels!r} is not known; choose fast or reference")
        if self.max_step_tokens < self.max_batch:
            raise ValueError(
                f"max_step_tokens ({self.max_step_tokens}) is below max_batch ({self.max_batch}); "
                "a step must have room for one token of every running request"
            )
