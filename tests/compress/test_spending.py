"""Joules, carbon and money: arithmetic by hand, and nothing that was not asked for."""

import math
from pathlib import Path

import pytest

from pressd.compress.cost import Clock
from pressd.compress.spending import Factors, show_spent, spent
from pressd.runtime.energy import EnergyMeter


@pytest.fixture
def powercap(tmp_path: Path) -> Path:
    zone = tmp_path / "intel-rapl:0"
    zone.mkdir()
    for file, text in (("name", "package-0"), ("max_energy_range_uj", "10000000"), ("energy_uj", "9000000")):
        (zone / file).write_text(f"{text}\n")
    return tmp_path


def test_joules_add_up_over_a_counter_that_began_again(powercap: Path) -> None:
    clock = Clock(now=iter([0.0, 5.0]).__next__, meter=EnergyMeter(powercap))
    counter = powercap / "intel-rapl:0/energy_uj"
    for joules in (2, 7, 1):  # 9 -> 12 -> 17 -> 21
        counter.write_text(str(joules * 1_000_000))
        clock.tick()
    assert clock.cost().joules == pytest.approx(12)
    counter.unlink()
    clock = Clock(now=iter([0.0, 5.0]).__next__, meter=EnergyMeter(powercap))
    assert clock.cost().joules is None


def test_factors_are_printed_beside_what_they_make() -> None:
    assert spent(7200.0, None, Factors()) == {"wall_seconds": 7200.0, "joules": None}
    assert show_spent(spent(7200.0, 50.0, Factors())) == "took 7200.0 s, 50 J of the processors"
    found = spent(7200.0, 1.8e6, Factors(grid_gco2_per_kwh=400, price_per_hour=1.5))
    assert found["co2_g"] == pytest.approx(200)
    assert found["price"] == pytest.approx(3)
    assert (found["grid_gco2_per_kwh"], found["price_per_hour"]) == (400, 1.5)
    shown = show_spent(found)
    assert "200 g CO2 at 400 g per kWh" in shown
    assert "3 at a price of 1.5 per hour" in shown


@pytest.mark.parametrize("value", [-1.0, math.nan, math.inf])
def test_factors_are_numbers_of_at_least_0(value: float) -> None:
    with pytest.raises(ValueError, match=r"price_per_hour is .*; give a number of at least 0"):
        Factors(price_per_hour=value)


def test_carbon_without_a_meter_is_refused(powercap: Path) -> None:
    Factors(grid_gco2_per_kwh=1).check(EnergyMeter(powercap))
    Factors(price_per_hour=1).check(EnergyMeter(powercap / "absent"))
    with pytest.raises(ValueError, match="grid_gco2_per_kwh is 1, but no energy meter of this machine can be read"):
        Factors(grid_gco2_per_kwh=1).check(EnergyMeter(powercap / "absent"))
