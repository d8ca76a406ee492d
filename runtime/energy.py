"""What the processors' own meters say: energy since the last look, from Linux's powercap (RAPL). No torch."""

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

POWERCAP = Path("/sys/class/powercap")


@dataclass(slots=True)
class _Package:
    """One processor package's counter, in microjoules; after `wrap` it begins again at zero."""

    counter: Path
    wrap: int
    last: int


class EnergyMeter:
    """Reads the packages of the machine. Kernels since 5.10 let only root read them."""

    def __init__(self, powercap: Path = POWERCAP) -> None:
        self._packages: list[_Package] = []
        with suppress(OSError):  # a part of the sum would be no sum: no meter, and read() says so
            self._packages = [_package(zone) for zone in _zones(powercap)]

    def read(self) -> float | None:
        """Return joules of all packages since the last reading, None where not all of them can be read.

        Must be asked more often than a counter wraps, which takes minutes.
        """
        try:
            readings = [_number(package.counter) for package in self._packages]
        except OSError:
            return None
        spent = 0
        for package, now in zip(self._packages, readings, strict=True):
            spent += now - package.last + (package.wrap if now < package.last else 0)
            package.last = now
        return spent * 1e-6 if self._packages else None


def _zones(powercap: Path) -> list[Path]:
    """Return a zone for each package, which may be shown twice: by its registers and by memory-mapped ones."""
    names: dict[str, Path] = {}
    for pattern in ("intel-rapl-mmio:*", "intel-rapl:*"):  # the second is what stays
        for zone in sorted(powercap.glob(pattern)):
            name = (zone / "name").read_text().strip()
            if name.startswith("package"):
                names[name] = zone
    return list(names.values())


def _package(zone: Path) -> _Package:
    counter = zone / "energy_uj"
    return _Package(counter, _number(zone / "max_energy_range_uj"), _number(counter))


def _number(path: Path) -> int:
    return int(path.read_text())
