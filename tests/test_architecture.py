"""The rules of docs/architecture.md and CONTRIBUTING.md that a machine can hold."""

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SETUPTOOLS = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
ROOMS = ("server", "runtime", "compress", "protos")
MAX_LINES = 350

GRPC = ("grpc", "grpc_health", "grpc_reflection", "grpc_status")
PROTOCOL = (*GRPC, "prometheus_client", "pressd.v1", "pressd.client")
PLAIN = (
    *("config", "params", "request", "report", "validation", "errors", "energy"),
    *("scheduler", "sequence", "costs", "emission", "kv_cache", "kv_plan", "prefix"),
)
TORCH_FREE = tuple(f"pressd.runtime.{name}" for name in PLAIN)
ARRAYS_ONLY = ("pressd.runtime.blocks", "pressd.runtime.placement")
# (who, must not import any of these); a name stands for everything below it.
FORBIDDEN: tuple[tuple[tuple[str, ...], tuple[str, ...]], ...] = (
    (("pressd",), ("server", "runtime", "compress", "pickle", "dill", "cloudpickle", "os.environ", "os.getenv")),
    (("pressd.runtime",), (*PROTOCOL, "pressd.server", "pressd.compress", "zmq", "msgspec", "uvloop")),
    (("pressd.compress",), (*PROTOCOL, "pressd.server", "zmq")),
    (("pressd.server",), ("pressd.compress",)),
    (TORCH_FREE, ("torch", "transformers", "numpy")),
    (ARRAYS_ONLY, ("torch", "transformers")),
)
# (who, the only packages of ours it imports, the only others; None: any)
ALLOWED: tuple[tuple[str, tuple[str, ...], tuple[str, ...] | None], ...] = (
    ("pressd.client", ("pressd.client", "pressd.v1"), (*GRPC, "google.protobuf", "google.rpc")),
    ("pressd.runtime.kernels", ("pressd.runtime.kernels",), None),
    (
        "pressd.compress",
        (
            "pressd.compress",
            *(f"pressd.runtime.{name}" for name in ("artifact", "models", "layers", "kernels", "energy")),
        ),
        None,
    ),
)
# (module, rule it may break)
EXCEPTIONS = {("pressd.server.cli", "pressd.compress"), ("pressd.server.settings", "os.environ")}


def within(name: str, *roots: str) -> bool:
    """Whether the dotted name is one of the roots or below one."""
    return any(name == root or name.startswith(f"{root}.") for root in roots)


def imports(tree: ast.AST, package: str) -> Iterator[str]:
    """Dotted name of everything imported, wherever in the file; relative imports are resolved against `package`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            origin = ".".join([*parents, *([node.module] if node.module else [])])
            yield from (f"{origin}.{alias.name}" for alias in node.names)


def dangers(tree: ast.AST) -> Iterator[str]:
    """Names of what runs code from data or reads the environment, as written."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("eval", "exec", "torch.load"):
            yield ast.unparse(node.func)
        if isinstance(node, ast.Attribute) and ast.unparse(node) in ("os.environ", "os.getenv"):
            yield ast.unparse(node)


def faults(module: str, source: str, *, is_package: bool = False) -> list[str]:
    """Every rule that the source of `module` breaks."""
    tree = ast.parse(source)
    names = list(imports(tree, module if is_package else module.rpartition(".")[0]))
    found = [f"uses {name}" for name in dangers(tree) if (module, name) not in EXCEPTIONS]
    for who, rules in FORBIDDEN:
        if within(module, *who):
            kept = [rule for rule in rules if (module, rule) not in EXCEPTIONS]
            found += [f"imports {name}" for name in names if within(name, *kept)]
    for owner, ours, others in ALLOWED:
        if within(module, owner):
            found += [f"imports {name}" for name in names if within(name, "pressd") and not within(name, *ours)]
            if others is not None:
                foreign = [name for name in names if name.split(".")[0] not in {"pressd", *sys.stdlib_module_names}]
                found += [f"imports {name}" for name in foreign if not within(name, *others)]
    return found


def module_name(path: Path) -> str:
    """Import name of a file of a room, by the longest folder that pyproject.toml maps."""
    folders = {folder: package for package, folder in SETUPTOOLS["package-dir"].items()}
    relative = path.relative_to(ROOT).with_suffix("")
    folder = next(parent.as_posix() for parent in relative.parents if parent.as_posix() in folders)
    parts = relative.relative_to(folder).parts
    return ".".join([folders[folder], *(part for part in parts if part != "__init__")])


def sources() -> list[Path]:
    generated = ("_pb2.py", "_pb2_grpc.py")
    files = (path for room in ROOMS for path in sorted((ROOT / room).rglob("*.py")))
    return [path for path in files if not path.name.endswith(generated) and path != ROOT / "protos/build.py"]


def tracked_texts() -> Iterator[tuple[str, str]]:
    """(name, text) of every file that is, or is about to be, in the repository."""
    listing = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        check=True,
    )
    for name in filter(None, listing.stdout.decode().split("\0")):
        data = (ROOT / name).read_bytes() if (ROOT / name).is_file() else b""
        if b"\0" not in data:
            yield name, data.decode(errors="replace")


def machine_paths(text: str) -> list[str]:
    """Absolute paths that exist on somebody's machine only."""
    return re.findall(r"(?<![\w.~/}-])/(?:home|Users|root|work)/[\w.-]+", text)


@pytest.mark.parametrize("path", sources(), ids=module_name)
def test_file_keeps_the_rules(path: Path) -> None:
    text = path.read_text()
    assert faults(module_name(path), text, is_package=path.stem == "__init__") == []
    assert path.stem not in ("utils", "util", "helpers", "misc"), "name it by what flows through it"
    assert len(text.splitlines()) <= MAX_LINES


@pytest.mark.parametrize(
    ("module", "source", "fault"),
    [
        ("pressd.runtime.engine", "import grpc.aio", "imports grpc.aio"),
        ("pressd.runtime.engine", "def f():\n    from pressd import server", "imports pressd.server"),
        ("pressd.runtime.layers.linear", "from ...compress import corpus", "imports pressd.compress.corpus"),
        ("pressd.runtime", "from . import engine\nimport msgspec", "imports msgspec"),
        ("pressd.compress.evaluate", "from pressd.v1 import common_pb2", "imports pressd.v1.common_pb2"),
        (
            "pressd.compress.evaluate",
            "from pressd.runtime.engine import Engine",
            "imports pressd.runtime.engine.Engine",
        ),
        ("pressd.server.app", "from pressd.compress import compress", "imports pressd.compress.compress"),
        ("pressd.client.client", "from pressd.server import settings", "imports pressd.server.settings"),
        ("pressd.client.client", "import msgspec", "imports msgspec"),
        ("pressd.runtime.scheduler", "if 0:\n    import torch", "imports torch"),
        ("pressd.runtime.kernels.int8.cpu", "from pressd.runtime import config", "imports pressd.runtime.config"),
        ("pressd.server.app", "from server import settings", "imports server.settings"),
        ("pressd.server.engine_client", "import pickle", "imports pickle"),
        ("pressd.runtime.artifact.reader", "torch.load(path)", "uses torch.load"),
        ("pressd.runtime.artifact.reader", "eval(text)", "uses eval"),
        ("pressd.runtime.engine", "threads = os.environ['N']", "uses os.environ"),
        ("pressd.runtime.engine", "from os import environ", "imports os.environ"),
    ],
)
def test_a_broken_rule_is_found(module: str, source: str, fault: str) -> None:
    assert fault in faults(module, source, is_package=module == "pressd.runtime")


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("pressd.server.cli", "from pressd.compress import verbs"),
        ("pressd.server.settings", "import os\nfound = os.environ.get('PRESSD_PORT')"),
        ("pressd.client.client", "import asyncio\nimport grpc.aio\nfrom pressd.v1 import inference_pb2"),
        ("pressd.compress.evaluate", "from pressd.runtime.models import load_decoder\nmodel.eval()"),
        ("pressd.runtime.kernels.int8.cpu", "from ..registry import register\nimport torch"),
    ],
)
def test_what_is_allowed_passes(module: str, source: str) -> None:
    assert faults(module, source) == []


def test_every_package_is_listed_and_only_those() -> None:
    folders = {path.parent for room in ROOMS for path in (ROOT / room).rglob("__init__.py")}
    assert sorted(SETUPTOOLS["packages"]) == sorted(module_name(folder / "__init__.py") for folder in folders)
    holding_code = {path.parent for path in sources()}
    assert holding_code <= folders, "a folder with code lacks its __init__.py"


def test_no_file_names_a_path_of_the_machine_it_was_written_on() -> None:
    named = {name: paths for name, text in tracked_texts() if (paths := machine_paths(text))}
    assert named == {}


def test_a_path_of_a_machine_is_found() -> None:
    for folder in ("home", "Users", "root", "work"):
        assert machine_paths(f"see /{folder}/someone/x") == [f"/{folder}/someone"]
    assert machine_paths("https://example.org/home/x ./work/x ~/work/x {root}/work/x") == []
