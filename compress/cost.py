"""What pressing cost, and on which machine: all that differs between two runs of one recipe. No torch."""

import contextlib
import os
import platform
import resource
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from pressd.runtime.energy import EnergyMeter


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """Wall seconds in all, per block, per scheme and per pass; `peak_rss_bytes` is of the process since it started.

    `joules` are of the machine's processor packages, whatever ran on them; None where no meter can be read.
    """

    wall_seconds: float
    peak_rss_bytes: int
    blocks: dict[str, float]
    schemes: dict[str, float]
    passes: dict[str, float] = field(default_factory=dict)
    joules: float | None = None


class Clock:
    """Collects wall seconds from its making on: per block, inside of those per scheme and pass; and joules."""

    def __init__(self, now: Callable[[], float] = time.perf_counter, meter: EnergyMeter | None = None) -> None:
        self._now = now
        self._meter = EnergyMeter() if meter is None else meter
        self._joules: float | None = 0.0
        self._start = now()
        self._blocks: dict[str, float] = {}
        self._schemes: defaultdict[str, float] = defaultdict(float)
        self._passes: defaultdict[str, float] = defaultdict(float)

    @contextlib.contextmanager
    def block(self, name: str) -> Iterator[None]:
        """Time one block."""
        start = self._now()
        yield
        self._blocks[name] = self._now() - start
        self.tick()

    @contextlib.contextmanager
    def scheme(self, name: str) -> Iterator[None]:
        """Time one group of this scheme."""
        start = self._now()
        yield
        self._schemes[name] += self._now() - start

    @contextlib.contextmanager
    def step(self, name: str) -> Iterator[None]:
        """Time a pass, or what is done for all of them, such as the forward pass."""
        start = self._now()
        yield
        self._passes[name] += self._now() - start

    def tick(self) -> None:
        """Read the meter, whose counters begin again every few minutes: to be called more often than that."""
        joules = self._meter.read()
        self._joules = None if joules is None or self._joules is None else self._joules + joules

    def seconds(self, block: str) -> float:
        """Seconds of a block that is done."""
        return self._blocks[block]

    def cost(self) -> Cost:
        """What was spent until now."""
        self.tick()
        return Cost(
            wall_seconds=self._now() - self._start,
            peak_rss_bytes=peak_rss_bytes(),
            blocks=dict(self._blocks),
            schemes=dict(self._schemes),
            passes=dict(self._passes),
            joules=self._joules,
        )


def peak_rss_bytes(status: Path = Path("/proc/self/status")) -> int:
    """Most memory that this process ever had resident, mapped files included.

    The kernel's VmHWM, where it tells it: getrusage also counts the parent that the process was started from.
    """
    with contextlib.suppress(OSError):
        for line in status.read_text(encoding="ascii", errors="replace").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) << 10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


def cpu_name(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """The processor as the kernel names it, else as the platform does."""
    with contextlib.suppress(OSError):
        for line in cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                return value.strip()
    return platform.processor() or platform.machine()


def num_cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0))
