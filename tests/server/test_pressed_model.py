"""Models that are pressed before they are served: once, by one of many; whatever ends it leaves nothing to trust."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import pytest
from hub import REPOSITORY, lay_out_cache

from pressd.compress import compress
from pressd.runtime.artifact.manifest import read_manifest
from pressd.runtime.artifact.reader import Checkpoint
from pressd.server import pressed_model
from pressd.server.pressed_model import PressError, pressed, scheme_named

SCHEME = "w4a16g32"
PATIENCE = 60
# Presses as ever, but after the first layer waits until somebody has opened a pipe for writing and closed it.
HELD = """
import sys
from pressd.compress.progress import ProgressLine
from pressd.server import press_process
def wait(self, what, done, total):
    if what == "layers.0":
        open({pipe!r}).read()
ProgressLine.tell = wait
sys.exit(press_process.main(sys.argv[1:]))
"""
SERVE = """
import sys
from pressd.server import cli, pressed_model
pressed_model.PROGRAM = ("-c", sys.argv[1])
sys.exit(cli.main(["serve", *sys.argv[2:]]))
"""
PRESS = """
import sys
from pathlib import Path
from pressd.server import logs, pressed_model
logs.configure("info")
pressed_model.PROGRAM = ("-c", sys.argv[1])
print(pressed_model.pressed(Path(sys.argv[2]), sys.argv[3], Path(sys.argv[4]), name="model"))
"""
FAILS = ("-c", "raise SystemExit(9)")
# Instead of pressing, copies what has been: for what is not about pressing itself.
COPIES = "import shutil, sys; shutil.copytree({artifact!r}, sys.argv[-1])"


@pytest.fixture
def source(tiny_llama: Path, tmp_path: Path) -> Path:
    return shutil.copytree(tiny_llama, tmp_path / "tiny_llama")


@pytest.fixture(scope="module")
def oracle(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `compress` makes of the same."""
    out = tmp_path_factory.mktemp("oracle") / "artifact"
    compress(tiny_llama, SCHEME, out)
    return out


@pytest.fixture
def is_copied(oracle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pressed_model, "PROGRAM", ("-c", COPIES.format(artifact=str(oracle))))


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache" / "pressd" / "pressed"


@pytest.fixture
def pipe(tmp_path: Path) -> Path:
    os.mkfifo(tmp_path / "pipe")
    return tmp_path / "pipe"


@pytest.fixture
def start(pipe: Path, cache: Path) -> Iterator[Callable[..., "subprocess.Popen[str]"]]:
    """Start programs of Python whose pressing is held; what still runs at the end is killed."""
    processes: list[subprocess.Popen[str]] = []

    def started(program: str, *arguments: str) -> "subprocess.Popen[str]":
        processes.append(
            subprocess.Popen(
                [sys.executable, "-c", program, HELD.format(pipe=str(pipe)), *arguments],
                env=os.environ | {"XDG_CACHE_HOME": str(cache.parent.parent)},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
        return processes[-1]

    yield started
    for process in processes:
        process.kill()
        process.communicate()


def events(process: "subprocess.Popen[str]") -> Iterator[dict[str, Any]]:
    """What a program logs, line by line."""
    stderr = process.stderr
    assert stderr is not None
    return (json.loads(line) for line in stderr)


def await_held(pipe: Path) -> IO[str]:
    """Wait until the pressing is held; close what is returned to let it go on."""
    return pipe.open("w")


def remains(cache: Path) -> list[str]:
    """What is in the cache besides locks."""
    return sorted(path.name for path in cache.iterdir() if path.suffix != ".lock")


def press(source: Path, cache: Path, scheme: str = SCHEME) -> Path:
    return pressed(source, scheme, cache, name="model")


def test_what_comes_out_is_what_compress_makes(source: Path, cache: Path, oracle: Path) -> None:
    out = press(source, cache)
    assert remains(cache) == [out.name]
    assert out.name.startswith(f"model-{SCHEME}-")
    assert Checkpoint.open(out).artifact_id == Checkpoint.open(oracle).artifact_id


@pytest.mark.usefixtures("is_copied")
def test_it_is_pressed_once(source: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = press(source, cache)
    monkeypatch.setattr(pressed_model, "PROGRAM", FAILS)
    assert press(source, cache) == out
    with pytest.raises(PressError, match="cannot be pressed as w8a16: ended with status 9"):
        press(source, cache, "w8a16")
    assert remains(cache) == [out.name]


@pytest.mark.usefixtures("is_copied")
def test_other_contents_are_pressed_anew(
    source: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = press(source, cache)
    monkeypatch.setattr(pressed_model, "PROGRAM", FAILS)
    weights = source / "model.safetensors"
    times = (weights.stat().st_atime_ns, weights.stat().st_mtime_ns)

    def is_found() -> bool:
        try:
            return press(source, cache) == out
        except PressError:
            return False

    original = weights.read_bytes()
    assert is_found()
    for place in (0, len(original) // 2, len(original) - 1):
        changed = bytearray(original)
        changed[place] ^= 1
        weights.write_bytes(changed)
        os.utime(weights, ns=times)  # as in an image, where all times are one
        assert not is_found()
    weights.write_bytes(original)
    assert not is_found()  # it was written since, which is enough
    os.utime(weights, ns=times)
    assert is_found()
    (source / "chat_template.jinja").write_text("x")
    assert not is_found()
    (source / "chat_template.jinja").unlink()
    with pytest.raises(PressError):
        press(shutil.copytree(source, tmp_path / "elsewhere"), cache)


@pytest.mark.parametrize(("size", "places"), [(0, 0), (1, 1), (1 << 20, 16), ((1 << 20) + 1, 16), (5 << 30, 16)])
def test_samples_reach_from_the_first_byte_to_the_last(size: int, places: int) -> None:
    begins = pressed_model._places(size)
    assert len(begins) == places
    assert begins == sorted(begins)
    if size:
        assert begins[0] == 0
        assert begins[-1] < size <= begins[-1] + pressed_model._SAMPLE_BYTES


@pytest.mark.usefixtures("is_copied")
def test_damage_is_pressed_again(source: Path, cache: Path) -> None:
    out = press(source, cache)
    manifest = read_manifest(out)

    def cut() -> None:
        os.truncate(out / "model.safetensors", 1000)

    for damage in (cut, (out / "config.json").unlink, (out / "pressd" / "manifest.json").unlink):
        damage()
        assert press(source, cache) == out
        assert read_manifest(out) == manifest
        Checkpoint.open(out).verify(full=True)


def test_what_cannot_be_pressed_is_one_line(source: Path, cache: Path, oracle: Path, tmp_path: Path) -> None:
    with pytest.raises(PressError, match=r"is pressed already \(.*w4a16g32\); leave out -s"):
        press(oracle, cache)
    with pytest.raises(PressError, match="absent is not a directory"):
        press(tmp_path / "absent", cache)
    with pytest.raises(ValueError, match="w9a16"):
        scheme_named("w9a16")
    os.truncate(source / "model.safetensors", 100)
    with pytest.raises(PressError, match=f"tiny_llama cannot be pressed as {SCHEME}: .*model.safetensors") as raised:
        press(source, cache)
    assert "\n" not in str(raised.value)
    assert remains(cache) == []


def test_press_that_is_killed_is_told(source: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = "import os, sys; os.mkdir(f'{sys.argv[-1]}.partial-1'); os.kill(os.getpid(), 9)"
    monkeypatch.setattr(pressed_model, "PROGRAM", ("-c", program))
    with pytest.raises(PressError, match="ended by signal 9"):
        press(source, cache)
    assert remains(cache) == []


@pytest.mark.system
@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signal_ends_a_start_that_presses(
    start: Callable[..., "subprocess.Popen[str]"],
    source: Path,
    cache: Path,
    pipe: Path,
    number: signal.Signals,
    status: int,
) -> None:
    server = start(SERVE, str(source), "-s", SCHEME)
    with await_held(pipe):
        assert any(".partial-" in name for name in remains(cache))
        server.send_signal(number)
        _, stderr = server.communicate(timeout=PATIENCE)
    assert server.returncode == status
    assert all(line.startswith("{") for line in stderr.splitlines())
    assert remains(cache) == []


@pytest.mark.system
def test_killed_start_leaves_nothing_to_trust(
    start: Callable[..., "subprocess.Popen[str]"], source: Path, cache: Path, pipe: Path
) -> None:
    server = start(SERVE, str(source), "-s", SCHEME)
    with await_held(pipe):
        server.kill()
        server.wait(timeout=PATIENCE)
        (partial,) = remains(cache)
        # Waits for the lock: whoever pressed sees that nobody waits for it.
        out = pressed(source, SCHEME, cache, name="tiny_llama")
    assert partial.startswith(f"{out.name}.partial-")
    assert remains(cache) == [out.name]
    Checkpoint.open(out).verify(full=True)


@pytest.mark.system
def test_of_two_starts_one_presses(
    start: Callable[..., "subprocess.Popen[str]"], source: Path, cache: Path, pipe: Path
) -> None:
    first = start(PRESS, str(source), SCHEME, str(cache))
    with await_held(pipe):
        second = start(PRESS, str(source), SCHEME, str(cache))
        assert next(events(second))["event"] == "waiting for another start that presses the same"
    said = [process.communicate(timeout=PATIENCE) for process in (first, second)]
    assert (first.returncode, second.returncode) == (0, 0)
    out = cache / remains(cache)[0]
    assert {stdout for stdout, _ in said} == {f"{out}\n"}
    assert [[json.loads(line)["event"] for line in stderr.splitlines()] for _, stderr in said] == [
        ["pressing", "pressed"],
        ["pressed before"],
    ]
    Checkpoint.open(out).verify(full=True)


@pytest.mark.system
def test_id_on_the_hub_is_pressed_and_served(
    serve: Callable[..., Any], tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lay_out_cache(tmp_path / "home", tiny_llama)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    server = serve(Path(REPOSITORY), "-s", SCHEME, scripted=False).await_ready()
    (pressed_before,) = (tmp_path / "cache/pressd/pressed").glob("tiny.model-w4a16g32-????????????????")
    served = read_manifest(pressed_before)
    assert served is not None
    with server.client() as client:
        (model,) = client.models()
    assert (model.name, model.version) == ("tiny.model", served.id)
    assert server.stop() == 0
