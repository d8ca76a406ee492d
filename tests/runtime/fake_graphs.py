"""A GPU's way of running steps on a CPU: kernels that read block tables alone, and graphs that really are functions."""

import dataclasses
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import TypeVar

import pytest
import torch

from pressd.runtime import runner, startup
from pressd.runtime.graphs import Replay
from pressd.runtime.kernels.attention import reference as attention
from pressd.runtime.kernels.catalogue import POINTWISE
from pressd.runtime.kernels.registry import REFERENCE, AttentionKernel
from pressd.runtime.kernels.step import reference as step
from pressd.runtime.models import loading
from pressd.runtime.readback import Readback

T = TypeVar("T")
TABLES = AttentionKernel(name=REFERENCE, why_not=lambda problem, device: None, run=attention.run, reads_tables=True)


class FakeCapture:
    """Runs the body again at every replay and writes over the first outputs, where a graph would have its own."""

    def __init__(self, device: torch.device) -> None:
        self.num_graphs = 0

    def __call__(self, body: Callable[[], T]) -> Replay[T]:
        self.num_graphs += 1
        outputs = body()

        def run() -> None:
            again = body()
            for field in dataclasses.fields(outputs):  # type: ignore[arg-type]
                getattr(outputs, field.name).copy_(getattr(again, field.name))

        return Replay(run, outputs)


class FakeReadback(Readback):
    """Copies what it is given, as a GPU does: graphs write over their outputs."""

    def __init__(self, tensors: Sequence[torch.Tensor]) -> None:
        super().__init__([tensor.clone() for tensor in tensors])


def pretend_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let engines that are made from now on take a GPU's runner, on the CPU."""
    monkeypatch.setattr(loading, "attention_kernels", lambda device: (TABLES,))
    monkeypatch.setattr(
        loading, "pointwise_kernels", lambda device: (dataclasses.replace(POINTWISE, selects_rotations=False),)
    )
    monkeypatch.setattr(startup, "step_kernel", lambda: SimpleNamespace(prepare=step.prepare))
    monkeypatch.setattr(startup, "race_kernel", lambda: None)
    monkeypatch.setattr(startup, "CudaCapture", FakeCapture)
    monkeypatch.setattr(runner, "Readback", FakeReadback)
