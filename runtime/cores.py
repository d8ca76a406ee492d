"""Which cores a process of its own computes on: what the machine has, and what a container may use of it. No torch.

Layers wait for memory and for multipliers, which two threads of one core share: a second one adds nothing and delays
the first. Weights lie in the memory of one node, and every other reaches it slowly. A container's quota is no set of
cores: threads beyond it are stopped in the middle of a step while the others wait for them.
"""

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

# From so many cores on, one is left to the process that talks to clients.
ENOUGH = 8


@dataclass(frozen=True, slots=True, order=True)
class Cpu:
    """One hardware thread: the node whose memory is near, the core it is part of, and its number."""

    node: int
    core: tuple[int, int]
    number: int


def choose(cpus: Iterable[Cpu], quota: float | None) -> tuple[int, ...]:
    """Return the hardware threads to compute on, one for each core, of one node, within a quota of cores."""
    by_node: dict[int, dict[tuple[int, int], int]] = {}
    for cpu in sorted(cpus):
        by_node.setdefault(cpu.node, {}).setdefault(cpu.core, cpu.number)
    cores = sorted(max(by_node.values(), key=len).values())
    if len(by_node) == 1 and len(cores) >= ENOUGH and (quota is None or quota > len(cores) - 1):
        cores = cores[:-1]
    return tuple(cores if quota is None else cores[: max(1, int(quota))])


def cores_of_machine(root: Path = Path("/")) -> tuple[int, ...] | None:
    """Return the hardware threads that this process should compute on; None where the machine does not tell."""
    try:
        allowed = os.sched_getaffinity(0)
        nodes = _nodes(root)
        cpus = [Cpu(nodes.get(number, 0), _core(root, number), number) for number in allowed]
    except (OSError, AttributeError, ValueError):
        return None
    return choose(cpus, cpu_quota(root))


def cpu_quota(root: Path = Path("/")) -> float | None:
    """Return how many cores' time the cgroups of this process get, None for no limit: the least of all levels."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return None
    quotas = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        top = root / "sys/fs/cgroup" if not controllers else root / "sys/fs/cgroup/cpu"
        folder = top / path.lstrip("/")
        # Inside of a container the path may be that of the host; its own limit then stands at the top.
        for level in {top, folder, *folder.parents} if folder.is_relative_to(top) else {top}:
            if level.is_relative_to(top) and (quota := _quota(level)) is not None:
                quotas.append(quota)
    return min(quotas, default=None)


def _quota(folder: Path) -> float | None:
    try:
        if (unified := folder / "cpu.max").is_file():
            quota, period = unified.read_text().split()
        else:
            quota, period = ((folder / f"cpu.cfs_{name}_us").read_text().strip() for name in ("quota", "period"))
        return None if quota in ("max", "-1") else int(quota) / int(period)
    except (OSError, ValueError, ZeroDivisionError):
        return None


def _core(root: Path, number: int) -> tuple[int, int]:
    """Return package and core of a hardware thread; where nothing is said, each is a core of its own."""
    folder = root / f"sys/devices/system/cpu/cpu{number}/topology"
    try:
        return int((folder / "physical_package_id").read_text()), int((folder / "core_id").read_text())
    except OSError:
        return -1, number


def _nodes(root: Path) -> dict[int, int]:
    """Return the node of each hardware thread."""
    found = {}
    for folder in (root / "sys/devices/system/node").glob("node[0-9]*"):
        for number in _numbers((folder / "cpulist").read_text()):
            found[number] = int(folder.name.removeprefix("node"))
    return found


def _numbers(text: str) -> Iterable[int]:
    """Read a list such as 0-3,8."""
    for part in text.strip().split(","):
        if part:
            first, _, last = part.partition("-")
            yield from range(int(first), int(last or first) + 1)
