"""The report: what it takes from a manifest and a clock, where it is written, and what `eval` adds."""

import itertools
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pressd.compress import compress, evaluate
from pressd.compress.cost import Clock, cpu_name, num_cores, peak_rss_bytes
from pressd.compress.evaluate import record_quality
from pressd.compress.inspect import read, show
from pressd.compress.report import Machine, make_report, read_report, write_report
from pressd.runtime.artifact.errors import ArtifactError
from pressd.runtime.artifact.manifest import Manifest, read_manifest

MACHINE = Machine(cpu="abacus", cores=2, torch="2.x", python="3.y")


@pytest.fixture(scope="module")
def pressed(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    compress(tiny_llama, "w3a16g32", tmp_path_factory.mktemp("report") / "out")
    return next(tmp_path_factory.getbasetemp().glob("report*/out"))


@pytest.fixture
def artifact(pressed: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(pressed, tmp_path / "artifact"))


def manifest_of(artifact: Path) -> Manifest:
    manifest = read_manifest(artifact)
    assert manifest is not None
    return manifest


def test_the_clock_counts_blocks_and_schemes() -> None:
    # Read once at the beginning, then at both ends of each stretch, and at the end: at 0, 1, 2, ...
    clock = Clock(now=itertools.count().__next__)
    with clock.block("embed"), clock.scheme("keep"):  # 1, 2; 3, 4
        pass
    with clock.block("layers.0"):  # 5
        for scheme in ("w8a8", "keep", "w8a8"):  # 6, 7; 8, 9; 10, 11
            with clock.scheme(scheme):
                pass
    assert clock.seconds("layers.0") == 7  # until 12
    cost = clock.cost()
    assert cost.wall_seconds == 13
    assert cost.blocks == {"embed": 3, "layers.0": 7}
    assert cost.schemes == {"keep": 2, "w8a8": 2}


def test_a_report_says_what_the_manifest_must_not(pressed: Path) -> None:
    manifest = manifest_of(pressed)
    cost = Clock(now=itertools.count().__next__).cost()
    report = make_report(manifest, cost, MACHINE)
    assert report.id == manifest.id
    assert report.size.totals == manifest.totals
    assert report.size.files == {name: file.bytes for name, file in manifest.files.items()}
    assert report.groups == manifest.plan
    errors = [(group.error, group.name) for group in report.worst]
    assert sorted(errors, key=lambda pair: -pair[0]) == errors
    assert {name for _, name in errors} == {group.name for group in manifest.plan if group.scheme == "w3a16g32"}
    assert make_report(manifest, cost, MACHINE).to_json() == report.to_json()
    keys = list(json.loads(report.to_json()))
    assert keys == sorted(keys)
    assert keys == ["command", "cost", "groups", "id", "machine", "quality", "schema", "size", "worst"]


def test_pressing_writes_it(pressed: Path) -> None:
    report = read_report(pressed)
    assert report is not None
    assert [block.name for block in report.cost.blocks] == ["embed", "layers.0", "layers.1", "head"]
    assert report.cost.schemes.keys() == {"keep", "w3a16g32"}
    assert sum(block.seconds for block in report.cost.blocks) <= report.cost.wall_seconds
    # Rounded to milliseconds, each of four blocks by half of one.
    assert sum(report.cost.schemes.values()) <= sum(block.seconds for block in report.cost.blocks) + 0.004
    assert report.cost.peak_rss_bytes > 100 << 20  # torch alone is more
    assert report.machine.torch == torch.__version__
    assert report.machine.cores == num_cores() >= 1
    assert report.machine.cpu == cpu_name() != ""
    assert report.quality == {}


def test_inspect_shows_the_cost(artifact: Path) -> None:
    report = read_report(artifact)
    assert report is not None
    assert f"pressed in {report.cost.wall_seconds:.1f} s, " in show(read(artifact), report)
    assert "pressed in" not in show(read(artifact), None)


QUALITY: dict[str, object] = {"kl_mean": 0.25, "data": {"tokens": 512}, "artifact": "somewhere"}


def test_a_measurement_is_taken_in(artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = read_report(artifact)
    assert before is not None
    assert not record_quality(artifact, QUALITY)
    assert read_report(artifact) == before
    monkeypatch.setattr(evaluate, "TOKENS", 512)
    assert record_quality(artifact, QUALITY)
    after = read_report(artifact)
    assert after is not None
    assert after.quality == manifest_of(artifact).quality == {"kl_mean": 0.25, "data": {"tokens": 512}}
    assert after == before.model_copy(update={"quality": after.quality})
    assert {path.name for path in (artifact / "pressd").iterdir()} == {
        *("manifest.json", "report.json", "report.html", "recipe.toml", "journal.jsonl")
    }


def test_the_report_of_another_artifact_is_left_alone(artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluate, "TOKENS", 512)
    manifest = manifest_of(artifact)
    other = make_report(manifest, Clock().cost(), MACHINE).model_copy(update={"id": "0" * 64})
    write_report(artifact, other, manifest)
    page = (artifact / "pressd/report.html").read_bytes()
    assert record_quality(artifact, QUALITY)
    assert read_report(artifact) == other
    assert (artifact / "pressd/report.html").read_bytes() == page


def test_an_artifact_without_one_is_measured_all_the_same(artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluate, "TOKENS", 512)
    (artifact / "pressd/report.json").unlink()
    assert record_quality(artifact, QUALITY)
    assert read_report(artifact) is None


@pytest.mark.parametrize("text", ["", "{", "[]", '{"schema": 2}', '{"schema": 1, "cost": "much"}'])
def test_a_damaged_one_is_named(artifact: Path, text: str) -> None:
    (artifact / "pressd/report.json").write_text(text)
    with pytest.raises(ArtifactError, match=r"report\.json: .*; remove it, nothing depends on it") as caught:
        read_report(artifact)
    assert "\n" not in str(caught.value)


def test_the_processor_has_a_name(tmp_path: Path) -> None:
    (tmp_path / "cpuinfo").write_text("processor\t: 0\nmodel name\t: Analytical Engine @ 1 Hz\nmodel name\t: other\n")
    assert cpu_name(tmp_path / "cpuinfo") == "Analytical Engine @ 1 Hz"
    (tmp_path / "cpuinfo").write_text("Processor: AArch64\n")
    assert cpu_name(tmp_path / "cpuinfo") != ""
    assert cpu_name(tmp_path / "nothing") != ""


def test_the_peak_is_of_this_process_and_not_of_its_parent(tmp_path: Path) -> None:
    # 300 MiB here, in the parent; the child imports next to nothing.
    held = bytearray(b"\1") * (300 << 20)
    program = "from pressd.compress.cost import peak_rss_bytes; print(peak_rss_bytes())"
    printed = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True).stdout
    assert peak_rss_bytes() > len(held)
    assert 5 << 20 < int(printed) < 200 << 20
    (tmp_path / "status").write_text("Name:\tx\nVmHWM:\t      12 kB\n")
    assert peak_rss_bytes(tmp_path / "status") == 12 << 10
    assert peak_rss_bytes(tmp_path / "nothing") > len(held)
