"""The metric of what the machine's meters say."""

from pathlib import Path

from pressd.runtime.energy import EnergyMeter
from pressd.server import measure
from pressd.server import metrics as m


def test_series_is_there_while_the_meter_can_be_read(tmp_path: Path) -> None:
    def shown() -> list[float]:
        return [s.value for f in metrics.collect() for s in f.samples if s.name == "pressd_energy_joules_total"]

    zone = tmp_path / "intel-rapl:0"
    zone.mkdir()
    for file, text in (("name", "package-0"), ("max_energy_range_uj", "262143328850"), ("energy_uj", "5000000")):
        (zone / file).write_text(f"{text}\n")
    metrics = m.Metrics("m")
    meter = EnergyMeter(tmp_path)
    measure.energy(metrics, meter)
    assert shown() == [0]
    for joules in (6, 8):
        (zone / "energy_uj").write_text(f"{joules * 1_000_000}\n")
        measure.energy(metrics, meter)
    assert shown() == [3.0]
    (zone / "energy_uj").unlink()
    measure.energy(metrics, meter)
    assert shown() == []
