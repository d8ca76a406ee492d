"""Which wheels a GPU machine is sent, and what is said when it cannot be done; no registry is asked."""

import importlib.util
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import pytest
from packaging.requirements import Requirement

FOLDER = Path(__file__).parent


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"gpu_{name}", FOLDER / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def bundle() -> ModuleType:
    return load("bundle")


def wheel(folder: Path, name: str, version: str, requires: Sequence[str] = (), tag: str = "py3-none-any") -> Path:
    path = folder / f"{name}-{version}-{tag}.whl"
    lines = ["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}"]
    with zipfile.ZipFile(path, "w") as archive:
        metadata = "\n".join([*lines, *(f"Requires-Dist: {text}" for text in requires)])
        archive.writestr(f"{name}-{version}.dist-info/METADATA", f"{metadata}\n\ntext")
    return path


def needs(bundle: ModuleType, *requirements: str, held: dict[str, str] | None = None) -> object:
    found = bundle.Needs("3.12", held or {})
    found.add(Requirement(text) for text in requirements)
    return found


def registry(monkeypatch: pytest.MonkeyPatch, bundle: ModuleType, wheels: dict[str, tuple[str, Sequence[str]]]) -> list:
    """Offer wheels by "name==version"; return the list of what is asked for."""
    asked: list[list[str]] = []

    def download(requirements: list[str], folder: Path, python: str) -> None:
        asked.append(requirements)
        for text in requirements:
            wanted = Requirement(text)
            versions = [spec.partition("==")[2] for spec in wheels if spec.startswith(f"{wanted.name}==")]
            (version, *_) = [v for v in sorted(versions, reverse=True) if v in wanted.specifier]
            wheel(folder, wanted.name.replace("-", "_"), version, *wheels[f"{wanted.name}=={version}"])

    monkeypatch.setattr(bundle, "download", download)
    return asked


def test_needs_of_needs_are_followed_but_not_into_what_is_held(
    bundle: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    requires = ["torch>=2", "Second.Part>=1", 'old; python_version < "3.12"', 'extra-part; extra == "all"']
    asked = registry(
        monkeypatch, bundle, {"first==1.0": (requires,), "second-part==1.5": (["third"],), "third==2.0": ([],)}
    )
    found = bundle.collect(needs(bundle, "first", held={"torch": "2.11.0"}), tmp_path, "3.12")
    assert [path.name.partition("-")[0] for path in found] == ["first", "second_part", "third"]
    assert asked == [["first"], ["second-part>=1"], ["third"]]
    assert bundle.collect(needs(bundle, "first", held={"torch": "2.11.0"}), tmp_path, "3.12") == found
    assert len(asked) == 3, "what is there already is not fetched again"


def test_a_version_that_a_later_need_excludes_is_replaced(
    bundle: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    wheels = {"core==2.0": ([],), "core==1.9": ([],), "model==1.0": (["core==1.9"],)}
    registry(monkeypatch, bundle, wheels)
    found = bundle.collect(needs(bundle, "core>=1", "model"), tmp_path, "3.12")
    assert [path.name for path in found] == ["core-1.9-py3-none-any.whl", "model-1.0-py3-none-any.whl"]


def test_wheels_for_another_python_or_system_are_not_chosen(bundle: ModuleType, tmp_path: Path) -> None:
    wanted = needs(bundle, "core")
    for tag in ("cp311-cp311-manylinux_2_28_x86_64", "cp312-cp312-macosx_11_0_arm64", "cp313-abi3-manylinux1_x86_64"):
        wheel(tmp_path, "core", "3.0", tag=tag)
    assert bundle.chosen(wanted, tmp_path.glob("*.whl")) == {}
    for tag in ("cp312-cp312-manylinux_2_26_x86_64.manylinux_2_28_x86_64", "cp39-abi3-manylinux2014_x86_64"):
        path = wheel(tmp_path, "core", "2.0", tag=tag)
        assert bundle.chosen(wanted, [path]) == {"core": path}


def test_a_held_version_that_does_not_do_is_an_error(bundle: ModuleType) -> None:
    with pytest.raises(bundle.BundleError, match=r"torch>=2.12 is needed and the machine holds torch 2.11.0"):
        needs(bundle, "torch>=2.12", held={"torch": "2.11.0"})


def test_a_package_without_a_wheel_is_an_error_in_one_line(bundle: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(
        bundle.BundleError, match=r"^pip download: No matching distribution found for pressd-no"
    ) as raised:
        bundle.pip(["--no-index", f"--find-links={tmp_path}", "pressd-no-such-package"], "download")
    assert "\n" not in str(raised.value)


def test_too_much_to_carry_is_an_error(bundle: ModuleType, tmp_path: Path) -> None:
    small, large = wheel(tmp_path, "small", "1"), wheel(tmp_path, "large", "1")
    large.write_bytes(large.read_bytes() + bytes(1 << 20))
    assert "2 wheels of 1.0 MiB and a tree of 62.0 MiB" in bundle.check_size([small, large], 62 << 20)
    with pytest.raises(bundle.BundleError, match=r"more than 64 MiB; the largest wheel is large-1-py3-none-any.whl"):
        bundle.check_size([small, large], 63 << 20)


def test_what_the_project_needs_is_held_or_carried(bundle: ModuleType) -> None:
    pyproject = bundle._pyproject()
    found = bundle.Needs("3.12")
    found.add(bundle.wanted(pyproject))
    assert {"pyzmq", "msgspec", "pydantic", "grpcio-health-checking", "pytest", "compressed-tensors"} <= set(
        found.carried
    )
    assert not {"torch", "transformers", "ruff", "mypy"} & set(found.carried)
    named = {Requirement(text).name for text in pyproject["project"]["dependencies"]}
    assert named == (named & set(bundle.HELD)) | (named & set(found.carried))


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    """run.py over an empty folder with one source file."""
    module = load("run")
    monkeypatch.setattr(module, "ROOT", tmp_path)
    for name in ("BUNDLE", "SITE", "STAMP"):
        monkeypatch.setattr(module, name, tmp_path / getattr(module, name).relative_to(FOLDER.parents[1]))
    (tmp_path / "runtime").mkdir()
    (tmp_path / "runtime/engine.py").write_text("answer = 1\n")
    module.BUNDLE.mkdir(parents=True)
    return module


def own_wheel(run: ModuleType) -> None:
    path = wheel(run.BUNDLE, "pressd", "0.1.0")
    with zipfile.ZipFile(path, "a") as archive:
        archive.write(run.ROOT / "runtime/engine.py", "pressd/runtime/engine.py")
        archive.writestr(
            "pressd-0.1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr("pressd-0.1.0.dist-info/RECORD", "")


def test_the_bundle_is_unpacked_once_and_again_when_it_changes(run: ModuleType) -> None:
    with pytest.raises(run.Refused, match=r"holds no wheel of pressd; run `make gpu-bundle`"):
        run.install()
    own_wheel(run)
    run.install()
    run.check_fresh()
    (run.SITE / "left").touch()
    run.install()
    assert (run.SITE / "left").exists(), "it was unpacked a second time"
    (run.ROOT / "runtime/engine.py").write_text("answer = 2\n")
    with pytest.raises(run.Refused, match=r"older than runtime/engine.py; run `make gpu-bundle` again"):
        run.check_fresh()
    own_wheel(run)
    run.install()
    run.check_fresh()
    assert not (run.SITE / "left").exists()


def test_a_stage_that_fails_is_told_and_its_output_kept(run: ModuleType, tmp_path: Path) -> None:
    program = "import os, sys; print('seen', os.environ['PYTHONPATH']); sys.exit(3)"
    stage = run.run("stage", [sys.executable, "-c", program], tmp_path)
    assert stage["exit_code"] == 3
    assert (tmp_path / "stage.log").read_text() == f"seen {run.SITE}\n"
