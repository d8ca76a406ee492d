"""What may be taken up, by whom, and what is left on disk when it may not."""

import fcntl
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from killing import same_but_the_report
from safetensors.torch import load_file, save_file

from pressd.compress import compress
from pressd.compress.calibration import CalibrationRows
from pressd.compress.press import BlockDone
from pressd.compress.recipe import parse_recipe
from pressd.compress.staging import leftovers, unfinished
from pressd.runtime.artifact.manifest import read_manifest

GPTQ = '[[pass]]\nuse = "gptq"\nsweeps = 0\nclip = false\n[scheme]\n"*" = "w4a16g32"\n'
SHARD_BYTES = 20_000


def rows_of(seed: int = 1, *, text: str = "a", length: int = 16) -> CalibrationRows:
    ids = torch.randint(0, 97, (8, length), generator=torch.Generator().manual_seed(seed))
    return CalibrationRows(name="random", text_sha256=text, seed=seed, ids=ids)


def press(source: Path, out: Path, **changes: Any) -> None:
    options: dict[str, Any] = {"rows": rows_of(), "shard_bytes": SHARD_BYTES, "resume": True}
    compress(source, parse_recipe(changes.pop("text", GPTQ), "test"), out, **(options | changes))


def stop_after(block: str, error: type[BaseException] = KeyboardInterrupt) -> Callable[[BlockDone], None]:
    def stop(done: BlockDone) -> None:
        if done.block == block:
            raise error

    return stop


def contents(path: Path) -> dict[str, bytes]:
    return {str(file.relative_to(path)): file.read_bytes() for file in sorted(path.rglob("*")) if file.is_file()}


@pytest.fixture(scope="module")
def whole(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("whole") / "out"
    torch.set_num_threads(2)  # as every test has it; a fixture of a module is made before
    press(tiny_llama, out)
    return out


@pytest.fixture
def source(tiny_llama: Path) -> Path:
    return tiny_llama


def altered(source: Path, name: str, value: float) -> Path:
    """A copy of the source with one number of another value."""
    path = Path(shutil.copytree(source, source.with_name(f"altered-{name}"), dirs_exist_ok=True))
    tensors = load_file(source / "model.safetensors")
    tensors[name][2, 3] = value
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    return path


@pytest.fixture
def out(tmp_path: Path) -> Path:
    (tmp_path / "made").mkdir()
    return tmp_path / "made" / "out"


@pytest.fixture
def begun(source: Path, out: Path) -> Path:
    """A run that was interrupted after the first of two layers."""
    with pytest.raises(KeyboardInterrupt):
        press(source, out, progress=stop_after("layers.0"))
    (left,) = out.parent.iterdir()
    return left


def test_it_goes_on_after_the_last_whole_line(source: Path, out: Path, begun: Path, whole: Path) -> None:
    told: list[BlockDone] = []
    press(source, out, progress=told.append)
    assert [block.was_done for block in told] == [True, True, False, False]
    same_but_the_report(whole, out)
    assert list(out.parent.iterdir()) == [out]


@pytest.mark.parametrize("torn", [b'{"block": "layers.1", "gro', b'{"block": "layers.1"', b"\0" * 40 + b"\n"])
def test_a_torn_line_is_none(source: Path, out: Path, begun: Path, whole: Path, torn: bytes) -> None:
    with (begun / "pressd/journal.jsonl").open("ab") as file:
        file.write(torn)
    press(source, out)
    same_but_the_report(whole, out)


@pytest.mark.parametrize("lines", [0, 1, 2])
def test_a_shorter_journal_is_an_earlier_state(source: Path, out: Path, begun: Path, whole: Path, lines: int) -> None:
    path = begun / "pressd/journal.jsonl"
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:lines]))
    (begun / "pressd/.manifest.json.1").write_text("half")
    assert (unfinished(out) is None) == (lines == 0)
    press(source, out)
    same_but_the_report(whole, out)
    assert (lines == 0) == begun.exists()  # nothing in it could be taken up; it is not ours to remove


def test_a_torn_file_after_the_journal_is_written_again(source: Path, out: Path, begun: Path, whole: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        press(source, out, progress=stop_after("layers.1"))
    path = begun / "pressd/journal.jsonl"
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:-1]))
    # What belongs to layers.1 alone: its files were being written.
    index = json.loads((begun / "model.safetensors.index.json").read_text())["weight_map"]
    later = {file for name, file in index.items() if "layers.1." in name}
    later -= {file for name, file in index.items() if "layers.0." in name or "embed" in name}
    assert later
    for number, file in enumerate(sorted(later)):
        if (begun / file).exists():
            os.truncate(begun / file, 1 + 1000 * number)
    press(source, out)
    same_but_the_report(whole, out)


def test_a_finished_directory_that_was_not_moved_is_moved(source: Path, out: Path, begun: Path, whole: Path) -> None:
    press(source, out)
    out.replace(begun)
    press(source, out)
    same_but_the_report(whole, out)


def test_what_was_put_aside_stays_aside(source: Path, out: Path, begun: Path, whole: Path) -> None:
    aside = out.with_name(f"{out.name}.replaced-{2**30}")  # no process has so high a number
    shutil.copytree(whole, aside)
    press(source, out, overwrite=True)
    same_but_the_report(whole, out)
    assert read_manifest(aside) is not None
    assert leftovers(out) == [aside]


def test_an_artifact_is_there_until_a_resumed_run_replaces_it(source: Path, out: Path, begun: Path) -> None:
    compress(source, "w8a8", out)
    before = contents(out)
    with pytest.raises(ValueError, match="holds an artifact already; give --overwrite"):
        press(source, out)
    assert contents(out) == before
    press(source, out, overwrite=True)
    assert contents(out).keys() != before.keys()
    assert list(out.parent.iterdir()) == [out]


def test_the_newest_wins(source: Path, out: Path, begun: Path, whole: Path) -> None:
    older = Path(shutil.copytree(begun, out.with_name(f"{out.name}.partial-{2**30}")))
    os.utime(older / "pressd/journal.jsonl", ns=(0, 0))
    held = contents(older)
    press(source, out)
    same_but_the_report(whole, out)
    assert contents(older) == held
    assert leftovers(out) == [older]
    with pytest.raises(ValueError, match="holds an artifact already"):
        press(source, out)


def test_the_work_of_a_live_process_is_not_touched(source: Path, out: Path, begun: Path, whole: Path) -> None:
    held = contents(begun)
    with (begun / "pressd/journal.jsonl").open("r+b") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert leftovers(out) == []
        press(source, out)  # begins anew
    same_but_the_report(whole, out)
    assert contents(begun) == held


def test_a_live_run_is_none_that_was_left(source: Path, out: Path, whole: Path) -> None:
    seen: list[list[Path]] = []
    press(source, out, progress=lambda _: seen.append(leftovers(out)))
    assert seen == [[]] * 4


def test_of_two_that_take_it_up_one_is_refused(
    source: Path, out: Path, begun: Path, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = contents(begun)
    # Both have seen it lie there; the other was faster.
    monkeypatch.setattr("pressd.compress.press.unfinished", lambda _: begun)
    with (begun / "pressd/journal.jsonl").open("r+b") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(ValueError, match=r"cannot resume: another process has taken up .*partial-.*; wait for it"):
            press(source, out)
    assert contents(begun) == held

    def move_first(*_: object) -> None:
        begun.replace(out.with_name("finished"))

    monkeypatch.setattr("pressd.compress.staging.check_target", lambda *_, **__: move_first())
    with pytest.raises(ValueError, match="cannot resume: another process has taken up"):
        press(source, out)
    assert contents(out.with_name("finished")) == held


def test_a_number_that_comes_again_is_no_obstacle(source: Path, out: Path, whole: Path) -> None:
    """In a container every run may have the same number: what has it is not thought alive, nor in the way."""
    out.with_name(f"{out.name}.partial-{os.getpid()}").mkdir()
    press(source, out)
    same_but_the_report(whole, out)
    out.with_name(f"{out.name}.replaced-{os.getpid()}").mkdir()
    press(source, out, overwrite=True)
    same_but_the_report(whole, out)
    assert len(list(out.parent.iterdir())) == 3


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("flip", r"model-0000\d-of-\d+\.safetensors: model\.\S+ is not what was written"),
        ("cut", r"\.safetensors: model\.\S+ is not what was written"),
        ("header", r"its header is not what was written"),
        ("gone", r"it is missing, and held model\.\S+"),
    ],
)
def test_damaged_work_is_refused_and_stays(source: Path, out: Path, begun: Path, damage: str, message: str) -> None:
    file = sorted(begun.glob("*.safetensors"))[1]
    data = bytearray(file.read_bytes())
    if damage == "gone":
        file.unlink()
    elif damage == "cut":
        file.write_bytes(data[:-1])
    else:
        data[-1 if damage == "flip" else 20] ^= 1
        file.write_bytes(data)
    held = contents(begun)
    with pytest.raises(ValueError, match=f"cannot resume: .*{message}; repair the file, or press without --resume"):
        press(source, out)
    kept = contents(begun)
    assert {name: kept[name] for name in held} == held
    press(source, out, resume=False)
    assert out.is_dir()


CHANGES: dict[str, dict[str, Any]] = {
    "recipe": {"text": GPTQ.replace("false", "false\ndamp = 0.02")},
    "calibration text": {"rows": rows_of(text="b")},
    "calibration tokens": {"rows": rows_of(2)},
    "shard_bytes": {"shard_bytes": SHARD_BYTES + 1},
    "devices": {"devices": ("cpu", "cpu")},
}


@pytest.mark.parametrize("key", CHANGES)
def test_another_request_is_refused_by_name(source: Path, out: Path, begun: Path, key: str) -> None:
    held = contents(begun)
    with pytest.raises(ValueError, match=rf"cannot resume: {key} was .* when the run began and is .* now; make it"):
        press(source, out, **CHANGES[key])
    assert contents(begun) == held
    assert list(out.parent.iterdir()) == [begun]


@pytest.mark.parametrize("key", ["source", "threads", "torch", "pressd", "devices"])
def test_another_world_is_refused_by_name(
    source: Path, out: Path, begun: Path, key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = contents(begun)
    if key == "source":
        source = altered(source, "lm_head.weight", 1.0)
    elif key == "threads":
        monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    elif key == "torch":
        monkeypatch.setattr(torch, "__version__", "2.0.0")
    elif key == "pressd":
        monkeypatch.setattr("pressd.compress.fingerprint.version", lambda _: "0.0.0")
    else:
        monkeypatch.setattr("pressd.compress.fingerprint.cpu_name", lambda: "another")
    with pytest.raises(ValueError, match=f"cannot resume: {key} was .* when the run began and is .* now; make it"):
        press(source, out)
    assert contents(begun) == held
    assert list(out.parent.iterdir()) == [begun]


@pytest.mark.parametrize("block", ["embed", "layers.1"])
def test_ctrl_c_keeps_what_took_long(source: Path, out: Path, block: str) -> None:
    with pytest.raises(KeyboardInterrupt):
        press(source, out, progress=stop_after(block))
    assert unfinished(out) is not None


def test_ctrl_c_before_the_first_block_leaves_nothing(source: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("pressd.compress.press.Reread.write", interrupt)
    with pytest.raises(KeyboardInterrupt):
        press(source, out)
    assert list(out.parent.iterdir()) == []


def test_an_error_leaves_nothing(source: Path, out: Path) -> None:
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.up_proj\.weight holds NaN"):
        press(altered(source, "model.layers.1.mlp.up_proj.weight", float("nan")), out)
    with pytest.raises(RuntimeError):
        press(source, out, progress=stop_after("embed", RuntimeError))
    assert list(out.parent.iterdir()) == []


def test_rounding_alone_leaves_nothing(source: Path, out: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        compress(source, "w4a16g32", out, progress=stop_after("layers.1"))
    assert list(out.parent.iterdir()) == []


def test_a_run_by_rounding_alone_is_taken_up(source: Path, out: Path) -> None:
    def leave(_: BlockDone) -> None:
        (now,) = out.parent.iterdir()
        shutil.copytree(now, out.with_name(f"{out.name}.partial-{2**30}"))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compress(source, "w4a16g32", out, progress=leave)
    told: list[BlockDone] = []
    compress(source, "w4a16g32", out, resume=True, progress=told.append)
    assert [block.was_done for block in told] == [True, False, False, False]
    compress(source, "w4a16g32", out.with_name("plain"))
    same_but_the_report(out.with_name("plain"), out)
