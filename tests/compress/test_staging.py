"""Where an artifact may appear, and what becomes of what is there already."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from pressd.compress import compress
from pressd.compress.press import BlockDone
from pressd.compress.staging import leftovers, staged
from pressd.runtime.artifact.manifest import read_manifest


@pytest.fixture
def artifact(tiny_llama: Path, tmp_path: Path) -> Path:
    compress(tiny_llama, "w8a8", tmp_path / "out")
    return tmp_path / "out"


def names(path: Path) -> list[str]:
    return sorted(entry.name for entry in path.iterdir())


def test_an_empty_directory_is_filled_and_parents_are_made(tiny_llama: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for out in (tmp_path / "empty", tmp_path / "new" / "deep"):
        compress(tiny_llama, "bf16", out)
        assert read_manifest(out) is not None
    assert names(tmp_path) == ["empty", "new"]


def test_something_else_is_never_touched(tiny_llama: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out/thesis.txt").write_text("ten years")
    for overwrite in (False, True):
        with pytest.raises(ValueError, match="holds something that is no artifact of pressd"):
            compress(tiny_llama, "bf16", tmp_path / "out", overwrite=overwrite)
    assert (tmp_path / "out/thesis.txt").read_text() == "ten years"
    assert names(tmp_path) == ["out"]


def test_a_file_or_a_link_is_refused(tiny_llama: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "target").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "target")
    for name in ("file", "link"):
        with pytest.raises(ValueError, match="is not a directory; give another place"):
            compress(tiny_llama, "bf16", tmp_path / name, overwrite=True)


def test_the_source_is_refused(tiny_llama: Path, tmp_path: Path) -> None:
    source = Path(shutil.copytree(tiny_llama, tmp_path / "source"))
    with pytest.raises(ValueError, match="is the source itself"):
        compress(source, "bf16", tmp_path / "x" / ".." / "source", overwrite=True)


def test_an_artifact_is_replaced_only_when_asked(tiny_llama: Path, artifact: Path) -> None:
    before = read_manifest(artifact)
    with pytest.raises(ValueError, match="give --overwrite to replace it"):
        compress(tiny_llama, "w4a16g32", artifact)
    assert read_manifest(artifact) == before
    manifest = compress(tiny_llama, "w4a16g32", artifact, overwrite=True)
    assert read_manifest(artifact) == manifest != before
    assert names(artifact.parent) == ["out"]


def test_an_artifact_with_something_of_the_user_in_it_stays(tiny_llama: Path, artifact: Path) -> None:
    (artifact / "notes.md").write_text("keep me")
    with pytest.raises(ValueError, match=r"notes\.md is not part of the artifact"):
        compress(tiny_llama, "bf16", artifact, overwrite=True)
    assert (artifact / "notes.md").read_text() == "keep me"


def test_an_artifact_whose_manifest_is_damaged_stays(tiny_llama: Path, artifact: Path) -> None:
    (artifact / "pressd/manifest.json").write_text("{}")
    with pytest.raises(ValueError, match=r"out cannot be replaced .*; remove it, or give another directory"):
        compress(tiny_llama, "bf16", artifact, overwrite=True)


def test_the_old_artifact_survives_an_interruption(tiny_llama: Path, artifact: Path) -> None:
    before = read_manifest(artifact)

    def interrupt(_: BlockDone) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compress(tiny_llama, "bf16", artifact, overwrite=True, progress=interrupt)
    assert read_manifest(artifact) == before
    assert names(artifact.parent) == ["out"]


def test_what_appears_while_pressing_is_not_overwritten(tiny_llama: Path, tmp_path: Path) -> None:
    def somebody_else(_: BlockDone) -> None:
        (tmp_path / "out").mkdir(exist_ok=True)
        (tmp_path / "out/theirs").touch()

    with pytest.raises(ValueError, match="holds something that is no artifact"):
        compress(tiny_llama, "bf16", tmp_path / "out", overwrite=True, progress=somebody_else)
    assert names(tmp_path) == ["out"]
    assert names(tmp_path / "out") == ["theirs"]


def test_the_old_artifact_returns_if_the_new_one_cannot_take_its_place(
    artifact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = read_manifest(artifact)
    rename = Path.replace

    def fail_for_the_new(self: Path, target: Path) -> Path:
        if ".partial-" in self.name:
            raise OSError("interrupted")
        return rename(self, target)

    monkeypatch.setattr(Path, "replace", fail_for_the_new)
    with pytest.raises(OSError, match="interrupted"), staged(artifact, overwrite=True) as directory:
        (directory / "file").touch()
    assert read_manifest(artifact) == before
    assert names(artifact.parent) == ["out"]


def test_what_a_killed_run_left_is_found_and_nothing_else(tmp_path: Path) -> None:
    child = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, check=True)
    gone = tmp_path / f"out[1].partial-{int(child.stdout)}"
    aside = tmp_path / f"out[1].replaced-{int(child.stdout)}"
    for path in (
        gone,
        aside,
        tmp_path / f"out[1].partial-{os.getpid()}",
        tmp_path / "out[1].partial-mine",
        tmp_path / "out1",
    ):
        path.mkdir()
    assert leftovers(tmp_path / "out[1]") == [gone, aside]
    assert leftovers(tmp_path / "out") == []
