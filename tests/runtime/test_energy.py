"""Energy as the machine's own meters tell it."""

from pathlib import Path

import pytest

from pressd.runtime.energy import EnergyMeter

WRAP = 262_143_328_850  # what an Intel package says: 2^32 units of 61 microjoules


def zone(folder: Path, place: str, name: str, microjoules: int, wrap: int = WRAP) -> Path:
    """Write what Linux shows of a power zone; returns the file with its counter."""
    path = folder / place
    path.mkdir(exist_ok=True)
    for file, text in (("name", name), ("max_energy_range_uj", wrap), ("energy_uj", microjoules)):
        (path / file).write_text(f"{text}\n")
    return path / "energy_uj"


@pytest.fixture
def powercap(tmp_path: Path) -> Path:
    """A machine of two packages with parts of their own, the first shown twice, and a zone of the whole platform."""
    zone(tmp_path, "intel-rapl:0", "package-0", 5_000_000)
    zone(tmp_path, "intel-rapl:0:0", "core", 3_000_000)
    zone(tmp_path, "intel-rapl:1", "package-1", 7_000_000)
    zone(tmp_path, "intel-rapl:2", "psys", 9_000_000)
    zone(tmp_path, "intel-rapl-mmio:0", "package-0", 5_000_000)
    zone(tmp_path, "dtpm", "other", 1)
    return tmp_path


def test_packages_are_added_and_nothing_is_counted_twice(powercap: Path) -> None:
    meter = EnergyMeter(powercap)
    assert meter.read() == 0
    for place, name in (("intel-rapl:0", "package-0"), ("intel-rapl:0:0", "core"), ("intel-rapl-mmio:0", "package-0")):
        zone(powercap, place, name, 6_500_000)
    zone(powercap, "intel-rapl:1", "package-1", 7_250_000)
    zone(powercap, "intel-rapl:2", "psys", 99_000_000)
    assert meter.read() == pytest.approx(1.5 + 0.25)
    assert meter.read() == 0


def test_a_counter_that_began_again_goes_on(powercap: Path) -> None:
    zone(powercap, "intel-rapl:0", "package-0", WRAP - 2_000_000)
    meter = EnergyMeter(powercap)
    zone(powercap, "intel-rapl:0", "package-0", 1_000_000)
    assert meter.read() == pytest.approx(3.0)


def test_machine_without_meters_has_no_series(tmp_path: Path) -> None:
    assert EnergyMeter(tmp_path / "absent").read() is None
    assert EnergyMeter(tmp_path).read() is None


@pytest.mark.parametrize("file", ["energy_uj", "max_energy_range_uj", "name"])
def test_package_that_may_not_be_read_leaves_no_sum(powercap: Path, file: str) -> None:
    path = powercap / "intel-rapl:1" / file
    path.unlink()
    path.mkdir()  # reading fails for root too, unlike with permissions
    assert EnergyMeter(powercap).read() is None
