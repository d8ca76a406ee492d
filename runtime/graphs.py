"""Steps as CUDA graphs: captured once per bucket of sizes, replayed with one call."""

from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

import torch

T = TypeVar("T")
# Decoding steps are padded to the next of these many sequences.
SMALL_BATCHES = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256)
# Programs of attention are launched for the longest sequence that a graph may meet, so short ones have their own.
KV_BOUNDS = (2048, 16384, 65536)


@dataclass(frozen=True, slots=True)
class Replay(Generic[T]):
    """What was captured: `run` computes it again from the same inputs, into the same `outputs`."""

    run: Callable[[], None]
    outputs: T


class Capture(Protocol):
    """Turns a function of fixed tensors into a replay of what it launches."""

    def __call__(self, body: Callable[[], T]) -> Replay[T]: ...


class CudaCapture:
    """Captures CUDA graphs that share their memory: of any two, only one is being replayed."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, body: Callable[[], T]) -> Replay[T]:
        # Once outside: kernels are compiled then, and libraries allocate what they keep.
        body()
        torch.cuda.synchronize(self._device)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            outputs = body()
        return Replay(graph.replay, outputs)


def batch_buckets(max_batch: int) -> tuple[int, ...]:
    """Return the numbers of sequences for which a graph is captured; the largest graph holds `max_batch`."""
    return (*(size for size in SMALL_BATCHES if size < max_batch), max_batch)


def kv_bounds(max_length: int) -> tuple[int, ...]:
    """Return the sequence lengths up to which a graph serves; the last is `max_length`."""
    return (*(bound for bound in KV_BOUNDS if bound < max_length), max_length)


def bucket_of(size: int, buckets: tuple[int, ...]) -> int | None:
    """Return the least of the ascending `buckets` that holds `size`, None if none does."""
    place = bisect_left(buckets, size)
    return buckets[place] if place < len(buckets) else None
