"""The page of an artifact: what is on it, and that nothing on it is anybody else's markup."""

import json
import re
import shutil
from pathlib import Path

import pytest
from report_pages import SVG, Words, altered, assert_no_nan, cells_of, group_of, page_of, text_of, tree_of

from pressd.compress import compress, evaluate
from pressd.compress.evaluate import record_quality
from pressd.compress.inspect import read
from pressd.compress.report import BlockCost, Report, read_report
from pressd.compress.report_html import report_page
from pressd.runtime.artifact.errors import ArtifactError
from pressd.runtime.artifact.manifest import Manifest, PlannedGroup
from pressd.server import cli

QUALITY: dict[str, object] = {
    "source": "models/source",
    "data": {"name": "stdlib", "split": "heldout", "tokens": 32768, "seq_len": 512, "sha256": "0" * 64},
    "ppl_source": 10.0,
    "ppl": 12.5,
    "ppl_ratio": 1.25,
    "kl_mean": 0.125,
    "top1_agreement": 0.75,
    "stderr": {"ppl_ratio": 0.01, "kl_mean": 0.002, "top1_agreement": 0.005},
}


@pytest.fixture(scope="module")
def pressed(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("page") / "out"
    compress(tiny_llama, "w3a16g32", out)
    return out


@pytest.fixture(scope="module")
def manifest(pressed: Path) -> Manifest:
    return read(pressed)


def test_pressing_writes_a_page_of_what_is_there(pressed: Path, manifest: Manifest) -> None:
    page = (pressed / "pressd/report.html").read_text(encoding="utf-8")
    report = read_report(pressed)
    assert report is not None
    # Read again, mappings come in another order: that must not show.
    assert report_page(manifest, report) == page
    rows = {row[0]: row for row in cells_of(page)}
    for group in manifest.plan:
        assert rows[group.name][:5] == [
            *(group.name, group.scheme, f"{group.shape[0]:,} × {group.shape[1]:,}"),
            *(f"{group.bits:.3f}", f"{group.bytes:,}"),
        ]
        # Three digits.
        told = rows[group.name][5]
        assert float(told) == pytest.approx(100 * group.error, rel=0.005) if group.error else told == "–"
    assert rows["pressd"] == ["pressd", "native"]
    words = text_of(page)
    assert manifest.source.path in words
    assert manifest.id in words
    assert f"{manifest.totals.bpw:.3f}" in words
    assert f"{manifest.totals.ratio:.2f}×" in words
    assert manifest.recipe.text.split()[-1] in words
    assert "not measured; run pressd eval" in words
    assert report.machine.cpu in words


def test_a_page_is_whole_and_fetches_nothing(manifest: Manifest) -> None:
    page = page_of(altered(manifest, quality=QUALITY, gates={"kl_mean": 0.1}))
    tree = tree_of(page)
    seen = Words(page)
    assert not {"script", "link", "img", "iframe", "object", "base", "form", "use", "image"} & set(seen.elements)
    names = {name for name, _ in seen.attributes}
    assert not {"src", "href", "xlink:href", "action", "style", "srcset"} & names
    assert not [name for name in names if name.startswith("on")]
    assert "default-src 'none'; style-src 'unsafe-inline'" in [value for _, value in seen.attributes]
    (style,) = tree.iter("style")
    assert style.text is not None
    assert not re.search(r"url|@import|//", style.text)
    # Every picture says what it is, by ids that are there and unique.
    ids = [value for name, value in seen.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    drawings = list(tree.iter(f"{SVG}svg"))
    assert len(drawings) == 5  # quality, map, scale, blocks, schemes
    for drawing in drawings:
        assert drawing.get("role") == "img"
        assert set(drawing.get("aria-labelledby", "").split()) <= set(ids)
        assert all(drawing.findtext(f"{SVG}{what}") for what in ("title", "desc"))


HOSTILE = "</code></pre><script>alert(1)</script><img src=x onerror='a'>\"&amp;"


def test_what_files_say_is_text(manifest: Manifest) -> None:
    class Noted(PlannedGroup):
        passes: tuple[str, ...] = ()
        notes: tuple[str, ...] = ()

    plan = [group_of(f"layers.0.{HOSTILE}", 0.1, fallback=HOSTILE), group_of(HOSTILE, 0.1, scheme=HOSTILE)]
    plan.append(group_of("layers.1.o", 0.2, kind=Noted, passes=(HOSTILE,), notes=(HOSTILE,)))
    hostile = altered(
        manifest,
        plan=tuple(plan),
        source=manifest.source.model_copy(update={"path": f"/x/{HOSTILE}"}),
        recipe=manifest.recipe.model_copy(update={"text": HOSTILE}),
        quality=QUALITY
        | {HOSTILE: HOSTILE, "source": HOSTILE, "data": {"name": HOSTILE}, "more": {HOSTILE: [HOSTILE]}},
        gates={HOSTILE: 0.5},
        loads_in={HOSTILE: HOSTILE},
        requires={HOSTILE: HOSTILE},
        files={HOSTILE: next(iter(manifest.files.values()))},
        tool=manifest.tool.model_copy(update={"version": HOSTILE}),
    )
    page = page_of(
        hostile,
        f"pressd {HOSTILE}",
        blocks=(BlockCost(name=HOSTILE, seconds=1.0),),
        schemes={HOSTILE: 1.0},
        passes={HOSTILE: 1.0},
    )
    tree_of(page)
    seen, plain = Words(page), Words(page_of(manifest))
    assert set(seen.elements) <= {*plain.elements, "li", "ul", "polyline", "circle", "span"}
    assert {"script", "img"}.isdisjoint(seen.elements)
    assert not [name for name, _ in seen.attributes if name.startswith("on")]
    assert "".join(seen.words).count("<script>alert(1)</script>") >= 15


def test_letters_that_would_reorder_or_break_a_page_are_replaced(manifest: Manifest) -> None:
    source = manifest.source.model_copy(update={"path": "/a/\u202egnp.exe\x00\x1b[31m\ud800\uffff\tx"})
    page = page_of(altered(manifest, source=source))
    tree_of(page)
    page.encode("utf-8")
    assert "/a/\ufffdgnp.exe\ufffd\ufffd[31m\ufffd\ufffd x" in text_of(page)


def test_a_measurement_changes_the_page(pressed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    artifact = Path(shutil.copytree(pressed, tmp_path / "artifact"))
    path = artifact / "pressd/report.html"
    before = path.read_text(encoding="utf-8")
    monkeypatch.setattr(evaluate, "TOKENS", 512)
    assert record_quality(artifact, QUALITY)
    after = path.read_text(encoding="utf-8")
    assert "1.2500" not in before
    words = text_of(after)
    assert "1.2500 ± 0.0100; 10.00 → 12.50" in words
    assert "75.00% ± 0.50%" in words
    assert "Measured against models/source on 32768 tokens of stdlib (heldout) in rows of 512." in words
    report = read_report(artifact)
    assert report is not None
    assert report_page(read(artifact), report) == after
    assert {entry.name for entry in path.parent.iterdir()} == {
        *("manifest.json", "report.json", "report.html", "recipe.toml", "journal.jsonl")
    }


def test_a_page_that_cannot_be_written_leaves_the_old_one(
    pressed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    artifact = Path(shutil.copytree(pressed, tmp_path / "artifact"))
    page = (artifact / "pressd/report.html").read_bytes()
    monkeypatch.setattr(evaluate, "TOKENS", 512)

    def full(self: Path, text: str, encoding: str) -> int:
        with self.open("w") as file:
            file.write(text[:100])
        raise OSError("No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match="No space left"):
        record_quality(artifact, QUALITY)
    assert (artifact / "pressd/report.html").read_bytes() == page
    assert not [entry.name for entry in (artifact / "pressd").iterdir() if entry.name.startswith(".")]


def test_gates_are_kept_missed_or_not_measured(manifest: Manifest) -> None:
    gates = {"kl_mean": 0.125, "ppl_ratio": 1.2, "top1_agreement": 0.8}
    measured = page_of(altered(manifest, gates=gates, quality=QUALITY))
    rows = {row[0]: row for row in cells_of(measured) if len(row) == 4}
    assert rows["kl_mean"] == ["kl_mean", "at most 0.125", "0.125", "✓ kept"]
    assert rows["ppl_ratio"] == ["ppl_ratio", "at most 1.2", "1.25", "✗ missed"]
    assert rows["top1_agreement"] == ["top1_agreement", "at least 0.8", "0.75", "✗ missed"]
    assert text_of(measured).count("gate missed") == 2
    unmeasured = page_of(altered(manifest, gates=gates))
    assert {row[3] for row in cells_of(unmeasured) if row[0] in gates} == {"not measured"}
    assert "gate missed" not in text_of(unmeasured)
    assert "The recipe sets none." in text_of(page_of(manifest))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), "much", 10**400, None])
def test_a_measurement_that_is_not_finite_is_said_and_not_drawn(manifest: Manifest, bad: object) -> None:
    quality = QUALITY | {"ppl": bad, "kl_mean": bad, "stderr": {"ppl": bad}}
    page = page_of(altered(manifest, quality=quality, gates={"kl_mean": 0.1}))
    assert "gate missed: kl_mean is not a finite number, the recipe asks for at most 0.1" in text_of(page)
    assert "are not drawn" in text_of(page)
    assert_no_nan(page)


@pytest.mark.parametrize(
    "quality",
    [
        {"kl_mean": 0.25},
        {"data": [], "stderr": 3},
        {"ppl": 0.0, "ppl_source": 1.0},
        {"ppl": 1e308, "ppl_source": 5e-324},
    ],
)
def test_half_a_measurement_is_shown_as_far_as_it_goes(manifest: Manifest, quality: dict[str, object]) -> None:
    tree_of(page_of(altered(manifest, quality=quality)))


def test_fallbacks_and_notes_come_first(manifest: Manifest) -> None:
    class Noted(PlannedGroup):
        passes: tuple[str, ...] = ()
        notes: tuple[str, ...] = ()

    plan = [group_of(f"layers.{n}.o", 0.1, fallback="rtn: not positive definite") for n in range(9)]
    plan.append(group_of("layers.9.o", 0.1, kind=Noted, passes=("gptq", "round"), notes=("damped 10x",)))
    page = page_of(altered(manifest, plan=tuple(plan)))
    words = text_of(page)
    told = (
        "fallback: rtn: not positive definite: layers.0.o, layers.1.o, layers.2.o, layers.3.o, layers.4.o, layers.5.o"
    )
    assert f"What to know first {told} and 3 more damped 10x: layers.9.o" in words
    assert words.index("What to know first") < words.index("Size and quality")
    rows = {row[0]: row for row in cells_of(page)}
    assert rows["layers.9.o"][6:] == ["gptq, round", "damped 10x"]
    assert rows["group"][6:] == ["passes", "remarks"]
    assert "What to know first" not in text_of(page_of(manifest))


def test_what_was_typed_passes_and_energy_are_shown(manifest: Manifest) -> None:
    page = page_of(manifest, "pressd compress 'a b' -o c -s w8a8", passes={"gptq": 1.25, "scale": 0.5}, joules=7200.0)
    words = text_of(page)
    assert "pressd compress 'a b' -o c -s w8a8" in words
    assert "not recorded" not in words
    assert "It took 7200 J (2 Wh)." in words
    assert "Seconds per pass" in words
    assert "1.250 s" in words
    plain = text_of(page_of(manifest))
    assert "The command is not recorded" in plain
    assert f"pressd compress {manifest.source.path} --recipe pressd/recipe.toml -o OUT" in plain
    assert "Seconds per pass" not in plain
    assert " Wh)" not in plain


def test_the_command_line_is_recorded(tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "with space"
    assert cli.main(["compress", str(tiny_llama), "-o", str(out), "-s", "w8a8", "--pass", "rtn"]) == 0
    report = read_report(out)
    assert report is not None
    assert report.command == f"pressd compress {tiny_llama} -o '{out}' -s w8a8 --pass rtn"


@pytest.mark.parametrize(
    ("where", "what"),
    [("wall_seconds", "NaN"), ("wall_seconds", "-1"), ("joules", "Infinity"), ("peak_rss_bytes", "-1")],
)
def test_a_cost_that_nothing_has_is_refused(pressed: Path, tmp_path: Path, where: str, what: str) -> None:
    artifact = Path(shutil.copytree(pressed, tmp_path / "artifact"))
    path = artifact / "pressd/report.json"
    fields = json.loads(path.read_text())
    fields["cost"][where] = "HERE"
    path.write_text(json.dumps(fields).replace('"HERE"', what))
    with pytest.raises(ArtifactError, match=rf"report\.json: cost\.{where}: .*; remove it"):
        read_report(artifact)


def test_reports_of_before_are_read(pressed: Path) -> None:
    report = read_report(pressed)
    assert report is not None
    fields = json.loads(report.to_json())
    del fields["command"], fields["cost"]["passes"], fields["cost"]["joules"]
    assert Report.model_validate_json(json.dumps(fields)) == report
