"""The measurement of schemes and passes: its recipes, its arithmetic and what it keeps, not its numbers."""

import importlib
import json
import math
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from pressd.compress.plan import make_plan
from pressd.compress.recipe import parse_recipe
from pressd.runtime.artifact.reader import Checkpoint

ROOT = Path(__file__).parents[2]
BENCH = ROOT / "tests" / "bench"
TOKENS = {"calibration": 64, "evaluation": 32}


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCH))
    return importlib.import_module("quantise")


@pytest.fixture
def cells(bench: ModuleType) -> ModuleType:
    return sys.modules["quantise_cells"]


@pytest.fixture
def report(bench: ModuleType) -> ModuleType:
    return sys.modules["quantise_report"]


def row(scheme: str, passes: str, seed: int | None, kl: float, **changed: Any) -> dict[str, Any]:
    return {
        "cell": {"scheme": scheme, "passes": passes, "recipe": "", "seed": seed, "rows": "stdlib"},
        "tokens": TOKENS,
        "date": "2026-01-01",
        "environment": {"processor": "Z", "python": "3.11.7", "torch": "2.0", "commit": "abc", "code": "d"},
        "torch_threads": 2,
        "bytes": 3 << 19,
        "bpw": 4.125,
        "ppl": 11.0,
        "ppl_ratio": 1.1,
        "kl_mean": kl,
        "top1_agreement": 0.9,
        "stderr": {"kl_mean": 0.003},
        "seconds": 6.0,
        "cpu_seconds": 5.0,
        "peak_rss_bytes": 7 << 20,
        "rss_bytes_before": 4 << 20,
        "fallbacks": [],
    } | changed


def canned() -> list[dict[str, Any]]:
    return [
        row("w4a16g32", "rtn", None, 0.4),
        row("w4a16g32", "gptq", 0, 0.1, ppl=10.0, seconds=1.0, peak_rss_bytes=5 << 20),
        row("w4a16g32", "gptq", 1, 0.3, ppl=10.0, seconds=2.0, peak_rss_bytes=9 << 20),
        row("w4a16g32", "gptq", 2, 0.2, ppl=13.0, seconds=9.0, peak_rss_bytes=8 << 20),
        row("w8a8", "rtn", None, 0.01, bpw=8.05),
        row("w8a8-static", "static, kl", 0, 0.02, bpw=8.05),
    ]


def test_lines_are_means_over_seeds_beside_rounding_to_nearest(report: ModuleType) -> None:
    document = report.markdown(canned(), [], [], [])
    # (0.1 + 0.3 + 0.2) / 3 = 0.2, half of rounding's 0.4; (1 + 2 + 9) / 3 = 4 s; the largest of the peaks.
    middle = "11.000 | 1.1000 | 0.20000 | 0.10000 to 0.30000 | 0.00300 | 0.50 | 90.00% | 4.0 | 5.0 | 9 |"
    assert f"| w4a16g32 | gptq | 1.50 | 4.12 | {middle}" in document
    # Without a seed there is nothing that lies apart.
    assert "| 0.40000 |  | 0.00300 | 1.00 |" in document
    # There is no rounding to nearest of static activations: dynamic ones are the measure.
    static = next(line for line in document.splitlines() if line.startswith("| w8a8-static |"))
    assert "| 0.02000 |  | 0.00300 | 2.00 |" in static
    assert "of which 4 MiB were Python" in document
    assert "Same weights" not in document
    assert "Not measured" not in document


def test_what_is_missing_or_was_pressed_otherwise_is_told(report: ModuleType) -> None:
    rows = [*canned(), row("w2a16g32", "gptq", 0, 1.0, fallbacks=["rtn: the Hessian is singular"])]
    document = report.markdown(rows, [], [], ["w2a16g32: gptq, seed 1"])
    assert "otherwise than asked: w2a16g32: rtn: the Hessian is singular." in document
    assert "Not measured: w2a16g32: gptq, seed 1." in document


def test_peers_are_held_against_ours_on_their_tokens(report: ModuleType) -> None:
    peers: list[dict[str, Any]] = [
        {"tool": "llmcompressor", "method": "gptq", "scheme": "w4a16g32", "seed": seed, "kl_mean": kl, "seconds": 30.0}
        for seed, kl in ((0, 0.3), (1, 0.5))
    ]
    peers.append(peers[0] | {"tool": "auto-round", "method": "tuned", "kl_mean": 0.8, "top1_agreement": 0.5})
    # Ours, recorded beside the others: it is in the table, and no peer.
    peers.append(peers[0] | {"tool": "pressd", "method": "rtn", "seed": None, "kl_mean": 0.01})
    peers.append(peers[0] | {"scheme": "w3a16g32", "kl_mean": 0.001})
    document = report.markdown(canned(), canned()[1:4], peers, [])
    ours = "| w4a16g32 | pressd | gptq | 0.20000 | 0.10000 to 0.30000 | 0.00300 | **0.50** | 90.00% | 4.0 | 5.0 |"
    theirs = [
        "| w4a16g32 | llmcompressor | gptq | 0.40000 | 0.30000 to 0.50000 |  | 1.00 |  | 30.0 |  |",
        "| w4a16g32 | auto-round | tuned | 0.80000 |  |  | 2.00 | 50.00% | 30.0 |  |",
    ]
    lines = [line for line in document.split("## Same weights")[1].splitlines() if line.startswith("| w")]
    assert lines[1:] == [ours, *theirs]
    assert lines[0].startswith("| w4a16g32 | pressd | rtn | 0.01000 |")


def test_the_guide_takes_the_table_between_its_marks(report: ModuleType) -> None:
    guide = (ROOT / "docs" / "schemes.md").read_text()
    written = report.into_guide(guide, canned())
    assert "| w4a16g32 | gptq | 1.50 | 4.12 | 11.000 | 0.20000 | 0.50 | 90.00% | 4.0 |" in written
    assert report.into_guide(written, canned()) == written
    before, after = written.split("<!-- numbers: begin")[0], written.split("numbers: end -->")[1]
    assert guide.startswith(before)
    assert guide.endswith(after)
    with pytest.raises(AssertionError, match="no marks"):
        report.into_guide("nothing", canned())


def test_the_plot_is_the_same_twice(bench: ModuleType, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    for name in ("a.svg", "b.svg"):
        bench.plot(canned(), tmp_path / name)
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()
    bench.plot(canned()[:1], tmp_path / "b.svg")
    assert (tmp_path / "a.svg").read_bytes() != (tmp_path / "b.svg").read_bytes()


def test_every_recipe_has_a_plan_in_which_all_its_passes_work(cells: ModuleType) -> None:
    checkpoint = Checkpoint.open(ROOT / "examples" / "pylm")
    found = cells.all_cells()
    for cell in found:
        recipe = parse_recipe(cell.recipe, cell.title)
        plan = make_plan(checkpoint, recipe)
        assert plan.reads_text is (cell.seed is not None)
        done = {name for group in plan.groups() for name in plan.passes_of(group)}
        assert done >= {options.use for options in recipe.passes}
    # What looks at text, with every seed; no two cells are the same.
    ways = {(cell.scheme, cell.passes) for cell in found}
    with_text = [(scheme, passes) for scheme, passes in ways if passes != "rtn"]
    assert len(found) == len({cell.title for cell in found}) == len(ways) + 2 * len(with_text)


class Measured:
    """Stands in for the processes: tells which cells were measured, fails for one."""

    def __init__(self, fails: str | None = None) -> None:
        self.titles: list[str] = []
        self._fails = fails

    def __call__(self, cell: Any) -> dict[str, Any]:
        self.titles.append(cell.title)
        if cell.title == self._fails:
            raise subprocess.CalledProcessError(1, "quantise_row.py")
        return {"kl_mean": float(len(self.titles))}


def test_only_what_is_missing_is_measured(bench: ModuleType, cells: ModuleType, tmp_path: Path) -> None:
    some = cells.all_cells()[:4]
    path = tmp_path / "deep" / "rows.json"
    first = Measured(fails=some[2].title)
    assert bench.measure_all(some, TOKENS, bench.Kept(path), first, fresh=False) == [some[2].title]
    assert len(json.loads(path.read_text())) == 3
    # Another process goes on: the rows are in the file.
    second = Measured()
    assert bench.measure_all(some, TOKENS, bench.Kept(path), second, fresh=False) == []
    assert second.titles == [some[2].title]
    more = Measured()
    bench.measure_all(some[:1], {**TOKENS, "evaluation": 64}, bench.Kept(path), more, fresh=False)
    assert more.titles == [some[0].title], "fewer tokens are another measurement"
    again = Measured()
    bench.measure_all(some[1:3], TOKENS, bench.Kept(path), again, fresh=True)
    assert again.titles == [cell.title for cell in some[1:3]]
    kept = bench.Kept(path)
    # The second of `again` replaced its row, and nobody else's.
    assert kept.find(bench.key_of(some[2], TOKENS))["kl_mean"] == 2.0
    assert kept.find(bench.key_of(some[3], TOKENS))["kl_mean"] == 4.0
    assert len(json.loads(path.read_text())) == 5


def test_documents_are_written_from_kept_rows(
    bench: ModuleType, cells: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    pytest.importorskip("matplotlib")
    cell = cells.all_cells()[0]
    told = bench.key_of(cell, bench.FULL)
    rows = tmp_path / "rows.json"
    rows.write_text(json.dumps([row(cell.scheme, cell.passes, None, 0.25) | told]))
    guide = tmp_path / "schemes.md"
    guide.write_text("a\n<!-- numbers: begin (x) -->\n<!-- numbers: end -->\nb\n")
    monkeypatch.setattr(bench, "FOLDER", tmp_path)
    monkeypatch.setattr(bench, "GUIDE", guide)
    assert bench.main(["--from-json", str(rows), "--peers", str(tmp_path / "none.json")]) == 0
    assert "| 0.25000 |" in (tmp_path / "quantise.md").read_text() == capsys.readouterr().out.removesuffix("\n")
    assert "| 0.25000 |" in guide.read_text()
    assert (tmp_path / "quantise.svg").read_text().startswith("<?xml")
    assert bench.main(["--only", "no such words", "--from-json", str(rows)]) == 1


@pytest.mark.slow
def test_two_cells_of_few_tokens_are_measured(tmp_path: Path) -> None:
    rows = tmp_path / "rows.json"
    command = [sys.executable, str(BENCH / "quantise.py"), "--quick", f"--rows={rows}"]
    printed = subprocess.run(command, check=True, text=True, stdout=subprocess.PIPE).stdout
    rounded, fitted = json.loads(rows.read_text())
    assert rounded["bytes"] == fitted["bytes"]
    assert 0 < fitted["kl_mean"] < rounded["kl_mean"]
    assert all(math.isfinite(found["stderr"]["kl_mean"]) for found in (rounded, fitted))
    assert fitted["pass_seconds"]["gptq"] > 0
    # The larger of the two by at least what a Gram matrix and the calibration's residual streams take.
    assert fitted["peak_rss_bytes"] > rounded["peak_rss_bytes"] > rounded["rss_bytes_before"] > 0
    assert f"| {fitted['kl_mean']:.5f} |" in printed
