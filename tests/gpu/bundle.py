"""Collect wheels for a GPU machine that has PyTorch and no network: ours, and of the others those it may lack.

    python tests/gpu/bundle.py [--python 3.12]          (or: make gpu-bundle)

Nothing is guessed about that machine: what HELD does not name in a version that satisfies every requirement is carried.
Dependencies are followed through the wheels' own metadata, as pip would, but never into what is there already.
"""

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
import zipfile
from collections.abc import Iterable
from email.parser import Parser
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.tags import Tag, compatible_tags, cpython_tags
from packaging.utils import canonicalize_name, parse_wheel_filename

ROOT = Path(__file__).parents[2]
BUNDLE = ROOT / "build" / "gpu-bundle"
# What one command may carry to the machine, with the working tree that travels by itself.
LIMIT_BYTES = 64 << 20
# In the image with the versions seen there. Large, or built for its CUDA: to be used as they are, never replaced.
HELD = {
    "torch": "2.11.0",
    "triton": "3.6.0",
    "numpy": "2.5.2",
    "safetensors": "0.8.0",
    "transformers": "5.17.0",
    "huggingface-hub": "1.33.0",  # transformers there refuses a later one
}
# Of the optional group `dev`, what running tests needs; the rest checks or types source.
FOR_TESTS = ("pytest", "pytest-timeout", "hypothesis", "compressed-tensors")
# pip compares these tags literally: every glibc from the oldest that wheels name to the image's own, and old spellings.
PLATFORMS = [
    *(f"manylinux_2_{minor}_x86_64" for minor in (5, 12, *range(17, 40))),
    *(f"manylinux{era}_x86_64" for era in (1, 2010, 2014)),
]


class BundleError(Exception):
    """One line for the user."""


def wanted(pyproject: dict[str, object]) -> list[Requirement]:
    """Return what the package needs, and what its tests need."""
    project = pyproject["project"]
    assert isinstance(project, dict)
    needed = [Requirement(text) for text in project["dependencies"]]
    development = [Requirement(text) for text in project["optional-dependencies"]["dev"]]
    return needed + [requirement for requirement in development if requirement.name in FOR_TESTS]


def needed_by(wheel: Path) -> list[Requirement]:
    """Return the requirements that a wheel states, without those of its extras."""
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if re.fullmatch(r"[^/]+\.dist-info/METADATA", name)]
        metadata = Parser().parsestr(archive.read(name).decode(), headersonly=True)
    return [Requirement(text) for text in metadata.get_all("Requires-Dist") or []]


class Needs:
    """The specifiers of every package that is to be carried, for one version of Python on Linux."""

    def __init__(self, python: str, held: dict[str, str] | None = None) -> None:
        self.held = HELD if held is None else held
        self.tags = _tags(python)
        self.environment = {
            "python_version": python,
            "python_full_version": f"{python}.0",
            "sys_platform": "linux",
            "platform_system": "Linux",
            "platform_machine": "x86_64",
            "os_name": "posix",
            "implementation_name": "cpython",
            "platform_python_implementation": "CPython",
            "extra": "",
        }
        self.carried: dict[str, SpecifierSet] = {}

    def add(self, requirements: Iterable[Requirement]) -> None:
        """Note what these ask for. Raises BundleError where the machine holds a version that does not do."""
        for requirement in requirements:
            if requirement.marker is not None and not requirement.marker.evaluate(self.environment):
                continue
            name = canonicalize_name(requirement.name)
            if name not in self.held:
                self.carried[name] = self.carried.get(name, SpecifierSet()) & requirement.specifier
            elif not requirement.specifier.contains(self.held[name], prereleases=True):
                raise BundleError(f"{requirement} is needed and the machine holds {name} {self.held[name]}")


def _tags(python: str) -> frozenset[Tag]:
    """Every wheel tag that CPython of this version accepts there."""
    major, minor = map(int, python.split("."))
    interpreter = f"cp{major}{minor}"
    own = cpython_tags((major, minor), [interpreter], PLATFORMS)
    return frozenset((*own, *compatible_tags((major, minor), interpreter, [*PLATFORMS, "any"])))


def chosen(needs: Needs, wheels: Iterable[Path]) -> dict[str, Path]:
    """Return, of the wheels that are there, the newest that satisfies each need; unsatisfied needs are left out."""
    found: dict[str, tuple[object, Path]] = {}
    for wheel in wheels:
        name, version, _, tags = parse_wheel_filename(wheel.name)
        specifier = needs.carried.get(name)
        if specifier is None or needs.tags.isdisjoint(tags) or not specifier.contains(version, prereleases=True):
            continue
        if name not in found or version > found[name][0]:
            found[name] = version, wheel
    return {name: wheel for name, (_, wheel) in found.items()}


def collect(needs: Needs, folder: Path, python: str) -> list[Path]:
    """Download until every need, and every need of what was downloaded, has its wheel; return the wheels."""
    while True:
        have, known = chosen(needs, folder.glob("*.whl")), dict(needs.carried)
        for wheel in have.values():
            needs.add(needed_by(wheel))
        if needs.carried != known:
            continue
        missing = sorted(needs.carried.keys() - have.keys())
        if not missing:
            return sorted(have.values())
        download([f"{name}{needs.carried[name]}" for name in missing], folder, python)


def download(requirements: list[str], folder: Path, python: str) -> None:
    """Fetch a wheel for each requirement alone. Raises BundleError if there is none."""
    options = ["--no-deps", "--only-binary=:all:", "--implementation=cp", f"--python-version={python}"]
    options += [f"--platform={platform}" for platform in PLATFORMS]
    pip([*options, f"--dest={folder}", *requirements], "download")


def build_own(folder: Path) -> Path:
    """Build our wheel from a copy of the source: setuptools would leave files behind that the next wheel picks up."""
    rooms = {path.partition("/")[0] for path in _pyproject()["tool"]["setuptools"]["package-dir"].values()}
    with tempfile.TemporaryDirectory() as temporary:
        for room in rooms:
            ignored = shutil.ignore_patterns("__pycache__", "*_pb2.py", "*_pb2.pyi", "*_pb2_grpc.py")
            shutil.copytree(ROOT / room, Path(temporary, room), ignore=ignored)
        for file in ("pyproject.toml", "README.md", "LICENSE"):
            shutil.copy(ROOT / file, temporary)
        pip(["--no-deps", f"--wheel-dir={folder}", temporary], "wheel")
    (wheel,) = folder.glob("pressd-*.whl")
    return wheel


def pip(arguments: list[str], verb: str) -> None:
    command = [sys.executable, "-m", "pip", verb, "--quiet", "--disable-pip-version-check", *arguments]
    completed = subprocess.run(command, capture_output=True, text=True)
    if completed.returncode:
        errors = [line for line in completed.stderr.splitlines() if line.startswith("ERROR:")]
        raise BundleError(f"pip {verb}: {errors[-1].removeprefix('ERROR: ') if errors else completed.stderr.strip()}")


def tree_bytes() -> int:
    """Bytes of the working tree that travels by itself: tracked files and new ones that git does not ignore."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listing = subprocess.run(command, cwd=ROOT, capture_output=True, check=True, text=True).stdout
    return sum((ROOT / name).stat().st_size for name in listing.split("\0") if name and (ROOT / name).is_file())


def check_size(wheels: list[Path], tree: int) -> str:
    """Return a line with the sizes. Raises BundleError if they are more than can travel."""
    mib = 1 << 20
    total = sum(wheel.stat().st_size for wheel in wheels)
    sizes = f"{len(wheels)} wheels of {total / mib:.1f} MiB and a tree of {tree / mib:.1f} MiB"
    if total + tree > LIMIT_BYTES:
        largest = max(wheels, key=lambda wheel: wheel.stat().st_size)
        raise BundleError(f"{sizes} are more than {LIMIT_BYTES // mib} MiB; the largest wheel is {largest.name}")
    return f"{sizes}, of {LIMIT_BYTES // mib} MiB that may travel"


def _pyproject() -> dict[str, dict[str, dict[str, dict[str, str]]]]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", default="3.12", help="version there (default 3.12, the image's)")
    python = parser.parse_args().python
    BUNDLE.mkdir(parents=True, exist_ok=True)
    try:
        for old in BUNDLE.glob("pressd-*.whl"):
            old.unlink()
        needs = Needs(python)
        needs.add(wanted(_pyproject()))
        wheels = [*collect(needs, BUNDLE, python), build_own(BUNDLE)]
        for stale in set(BUNDLE.glob("*.whl")) - set(wheels):
            stale.unlink()
        line = check_size(wheels, tree_bytes())
    except BundleError as error:
        sys.exit(f"gpu-bundle: {error}")
    for wheel in wheels:
        print(f"{wheel.stat().st_size / 1024:9.0f} KiB  {wheel.name}")
    print(f"{BUNDLE.relative_to(ROOT)}: {line}")


if __name__ == "__main__":
    main()
