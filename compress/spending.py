"""What a run took, and what that means at a price and a grid's carbon that the user names. No defaults. No torch."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields

from pressd.runtime.energy import POWERCAP, EnergyMeter

_JOULES_PER_KWH = 3.6e6


@dataclass(frozen=True, slots=True, kw_only=True)
class Factors:
    """Grams of CO2 (equivalent) per kilowatt-hour of the grid, and money per hour of the machine; None: not told."""

    grid_gco2_per_kwh: float | None = None
    price_per_hour: float | None = None

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if value is not None and not (math.isfinite(value) and value >= 0):
                raise ValueError(f"{field.name} is {value}; give a number of at least 0")

    @property
    def are_told(self) -> bool:
        """Whether there is any."""
        return self.grid_gco2_per_kwh is not None or self.price_per_hour is not None

    def check(self, meter: EnergyMeter | None = None) -> None:
        """Raise ValueError if grams of CO2 are asked for on a machine that does not say what energy it takes."""
        if self.grid_gco2_per_kwh is not None and (meter or EnergyMeter()).read() is None:
            raise ValueError(
                f"grid_gco2_per_kwh is {self.grid_gco2_per_kwh}, but no energy meter of this machine can be read "
                f"({POWERCAP}); leave it out"
            )


def spent(wall_seconds: float, joules: float | None, factors: Factors) -> dict[str, float | None]:
    """Return seconds and joules (None: no meter), and grams and money beside the factors they come from."""
    found: dict[str, float | None] = {"wall_seconds": wall_seconds, "joules": joules}
    if factors.grid_gco2_per_kwh is not None:
        grams = None if joules is None else joules / _JOULES_PER_KWH * factors.grid_gco2_per_kwh
        found |= {"grid_gco2_per_kwh": factors.grid_gco2_per_kwh, "co2_g": grams}
    if factors.price_per_hour is not None:
        price = wall_seconds / 3600 * factors.price_per_hour
        found |= {"price_per_hour": factors.price_per_hour, "price": price}
    return found


def show_spent(found: Mapping[str, float | None]) -> str:
    """Return one line of what `spent` said."""
    parts = [f"took {found['wall_seconds']:.1f} s"]
    joules, grams = found["joules"], found.get("co2_g")
    parts.append(
        "energy unknown (no meter that can be read)" if joules is None else f"{joules:.0f} J of the processors"
    )
    if grams is not None:
        parts.append(f"{grams:.3g} g CO2 at {found['grid_gco2_per_kwh']:g} g per kWh")
    if "price" in found:
        parts.append(f"{found['price']:.3g} at a price of {found['price_per_hour']:g} per hour")
    return ", ".join(parts)
