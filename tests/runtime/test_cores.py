"""Threads and cores from made-up machines."""

from pathlib import Path

import pytest

from pressd.runtime import cores
from pressd.runtime.cores import Cpu, choose, cpu_quota


def machine(*, packages: int = 1, per_package: int, threads: int = 1) -> list[Cpu]:
    """Hardware threads numbered as Linux does: the first of every core, then the second of every core."""
    found = []
    for thread in range(threads):
        for package in range(packages):
            for core in range(per_package):
                number = thread * packages * per_package + package * per_package + core
                found.append(Cpu(package, (package, core), number))
    return found


@pytest.mark.parametrize(
    ("cpus", "quota", "expected"),
    [
        (machine(per_package=2), None, (0, 1)),
        (machine(per_package=2, threads=2), None, (0, 1)),
        (machine(per_package=7), None, tuple(range(7))),
        (machine(per_package=8), None, tuple(range(7))),  # one is left to the door
        (machine(per_package=8, threads=2), None, tuple(range(7))),
        (machine(packages=2, per_package=4), None, (0, 1, 2, 3)),  # the door has the other node
        (machine(packages=2, per_package=4)[3:], None, (4, 5, 6, 7)),  # the node of which more may be used
        (machine(per_package=16), 4.0, (0, 1, 2, 3)),
        (machine(per_package=16), 2.5, (0, 1)),
        (machine(per_package=16), 0.5, (0,)),
        (machine(per_package=8), 8.0, tuple(range(7))),
        (machine(per_package=8), 7.0, tuple(range(7))),  # the quota leaves one already
        (machine(per_package=4, threads=2)[4:], None, (4, 5, 6, 7)),  # second threads alone may be used
    ],
)
def test_choice(cpus: list[Cpu], quota: float | None, expected: tuple[int, ...]) -> None:
    assert choose(cpus, quota) == expected
    assert choose(reversed(cpus), quota) == expected


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "200000 100000\n"}, 2.0),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "max 100000\n"}, None),
        ({"proc/self/cgroup": "0::/\n"}, None),
        ({}, None),
        (
            {
                "proc/self/cgroup": "0::/kubepods/pod1/box\n",
                "sys/fs/cgroup/kubepods/cpu.max": "800000 100000\n",
                "sys/fs/cgroup/kubepods/pod1/cpu.max": "150000 100000\n",
                "sys/fs/cgroup/kubepods/pod1/box/cpu.max": "max 100000\n",
            },
            1.5,
        ),
        # The path is the host's, which is not to be seen from inside.
        ({"proc/self/cgroup": "0::/../../other\n", "sys/fs/cgroup/cpu.max": "300000 100000\n"}, 3.0),
        (
            {
                "proc/self/cgroup": "4:memory:/\n3:cpu,cpuacct:/docker/1\n",
                "sys/fs/cgroup/cpu/docker/1/cpu.cfs_quota_us": "50000\n",
                "sys/fs/cgroup/cpu/docker/1/cpu.cfs_period_us": "100000\n",
            },
            0.5,
        ),
        (
            {
                "proc/self/cgroup": "3:cpu,cpuacct:/\n",
                "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n",
                "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
            },
            None,
        ),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "nonsense\n"}, None),
    ],
)
def test_quota(tmp_path: Path, files: dict[str, str], expected: float | None) -> None:
    assert cpu_quota(write(tmp_path, files)) == expected


def test_a_machine_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cores.os, "sched_getaffinity", lambda _: {0, 1, 2, 3, 8, 9})
    files = {"sys/devices/system/node/node0/cpulist": "0-1,8\n", "sys/devices/system/node/node1/cpulist": "2-3,9\n"}
    for number, core in {0: 0, 1: 1, 2: 0, 3: 0, 8: 0, 9: 1}.items():
        folder = f"sys/devices/system/cpu/cpu{number}/topology"
        files[f"{folder}/physical_package_id"] = "0" if number in (0, 1, 8) else "1"
        files[f"{folder}/core_id"] = str(core)
    assert cores.cores_of_machine(write(tmp_path, files)) == (0, 1)
    assert cores.cores_of_machine(tmp_path / "nothing is said") == (0, 1, 2, 3, 8, 9)


def test_this_machine() -> None:
    found = cores.cores_of_machine()
    assert found is None or (found and set(found) <= cores.os.sched_getaffinity(0))
