"""What is installed: every package, its stubs and types, and imports that stay as light as promised."""

import importlib
import importlib.metadata
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PACKAGES: list[str] = PROJECT["tool"]["setuptools"]["packages"]
# One marker per folder that is mapped: a namespace package has no place for a common one (PEP 561).
TYPED: list[str] = list(PROJECT["tool"]["setuptools"]["package-dir"])
PROTOS = sorted(path.stem for path in (ROOT / "protos/pressd/v1").glob("*.proto"))


def run_python(program: str) -> None:
    """Run a program in a fresh interpreter, where nothing is imported yet."""
    completed = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert completed.returncode == 0, completed.stderr


@pytest.mark.parametrize("package", PACKAGES)
def test_package_is_installed(package: str) -> None:
    assert importlib.import_module(package).__file__


def test_every_proto_has_its_stubs() -> None:
    folder = Path(str(importlib.import_module("pressd.v1").__file__)).parent
    for proto in PROTOS:
        for suffix in ("_pb2.py", "_pb2.pyi", "_pb2_grpc.py"):
            assert (folder / f"{proto}{suffix}").is_file(), "run `make dev`"


def test_version_is_the_changelogs() -> None:
    version = importlib.metadata.version("pressd")
    assert version == PROJECT["project"]["version"]
    assert f"\n## [{version}]" in (ROOT / "CHANGELOG.md").read_text()


@pytest.mark.parametrize("module", ["scheduler", "blocks", "request", "config"])
def test_bookkeeping_of_the_engine_loads_no_torch(module: str) -> None:
    run_python(f"import sys, pressd.runtime.{module}; assert 'torch' not in sys.modules")


def test_client_loads_no_torch_and_no_engine() -> None:
    run_python("import sys, pressd.client; assert not {'torch', 'pressd.runtime', 'pressd.server'} & set(sys.modules)")


def test_engine_loads_where_the_servers_dependencies_are_missing() -> None:
    missing = ("grpc", "zmq", "msgspec", "uvloop", "prometheus_client", "google.protobuf")
    run_python(
        f"import sys; sys.modules.update(dict.fromkeys({missing}))\n"  # None there makes the import fail
        "import pressd.runtime.engine, pressd.runtime.artifact, pressd.runtime.models, pressd.compress.corpus"
    )


@pytest.mark.slow  # fetches the build's own requirements
def test_wheel_holds_the_packages_and_nothing_else(tmp_path: Path) -> None:
    listing = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        check=True,
        text=True,
    )
    for name in filter(None, listing.stdout.split("\0")):  # a copy: building leaves files behind
        if (ROOT / name).is_file() and Path(name).suffix != ".safetensors":
            (tmp_path / "source" / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, tmp_path / "source" / name)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", f"--wheel-dir={tmp_path}"]
    subprocess.run([*command, str(tmp_path / "source")], check=True, timeout=240)
    (wheel,) = tmp_path.glob("pressd-*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names} == {
        "pressd",
        wheel.name.removesuffix("-py3-none-any.whl") + ".dist-info",
    }
    folders = {name.rpartition("/")[0].replace("/", ".") for name in names if name.startswith("pressd/")}
    assert folders == set(PACKAGES)
    assert {f"{package.replace('.', '/')}/py.typed" for package in TYPED} <= set(names)
    stubs = {
        f"pressd/v1/{proto}{suffix}" for proto in PROTOS for suffix in (".proto", "_pb2.py", "_pb2.pyi", "_pb2_grpc.py")
    }
    assert stubs <= set(names)
    in_tree = {path.name for room in ("server", "runtime", "compress") for path in (ROOT / room).rglob("*.py")}
    assert in_tree <= {Path(name).name for name in names}
