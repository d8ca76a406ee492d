"""Models that are not here yet: huggingface_hub itself fetches them, from a hub on this machine or its own cache."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hub import COMMIT, REPOSITORY, Hub, hub_of, lay_out_cache

from pressd.server.model_source import default_name, find_model

PATIENCE = 60
FIND = (
    "import sys; from pathlib import Path; from pressd.server.model_source import find_model\n"
    "try: print(find_model(Path(sys.argv[1])))\n"
    "except ValueError as error: print('refused:', error)"
)
INDEX = {"weight_map": {"a": "part-1.safetensors", "b": "part-[2].safetensors", "c": "stray.bin"}}
# Contents differ, for huggingface_hub fetches what is the same only once.
WANTED = {
    name: name.encode()
    for name in (
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        "additional_chat_templates/tool_use.jinja",
        "pressd/manifest.json",
        "LICENSE",
    )
}
UNWANTED = {
    name: name.encode()
    for name in (
        "pytorch_model.bin",
        "model.pt",
        "weights.pkl",
        "modeling_tiny.py",
        "tokenizer.py",
        "LICENSE.py",
        "pressd/x.py",
        "consolidated.safetensors",
        "original/model.safetensors",
        "onnx/model.onnx",
        "model.gguf",
        "README.md",
    )
}


def find(model: str, home: Path, **environment: str) -> str:
    """Look for a model in a process of its own: huggingface_hub reads its environment once."""
    ended = subprocess.run(
        [sys.executable, "-c", FIND, model],
        env=os.environ | {"HF_HOME": str(home)} | environment,
        cwd=home,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert ended.returncode == 0, ended.stderr
    return ended.stdout.strip()


@pytest.fixture
def hub() -> Iterator[Hub]:
    with hub_of(WANTED | UNWANTED) as made:
        yield made


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("org/name", "name"),
        ("org/name@main", "name"),
        ("meta-llama/Llama-3.2_1B@v1.0", "Llama-3.2_1B"),
        ("a/b/c", "c"),
    ],
)
def test_name_is_the_last_part(model: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert default_name(Path(model)) == name


def test_directory_wins_over_an_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "name@main").mkdir(parents=True)
    assert find_model(Path("org/name@main")) == Path("org/name@main")
    assert default_name(Path("org/name@main")) == "name@main"


@pytest.mark.parametrize("model", ["nowhere", "a/b/c", "/nowhere/at-all", "org/na me", "org/name@a@b"])
def test_what_is_no_id_is_left_to_the_reader(model: str) -> None:
    assert find_model(Path(model)) == Path(model)


@pytest.mark.parametrize("revision", ["", "@v2", f"@{COMMIT}"])
def test_only_what_is_read_is_fetched(hub: Hub, revision: str, tmp_path: Path) -> None:
    hub.files["model.safetensors"] = b"weights"
    found = Path(find(f"{REPOSITORY}{revision}", tmp_path, **hub.environment))
    assert hub.fetched == {*WANTED, "model.safetensors"}
    assert (found / "model.safetensors").read_bytes() == b"weights"
    assert found.is_relative_to(tmp_path)
    # The hub is gone or forbidden: what is there is enough.
    assert Path(find(f"{REPOSITORY}{revision}", tmp_path, HF_HUB_OFFLINE="1")) == found
    assert (
        Path(find(f"{REPOSITORY}{revision}", tmp_path, HF_ENDPOINT="http://127.0.0.1:1", HF_HUB_OFFLINE="0")) == found
    )


def test_files_of_weights_are_those_of_the_index(hub: Hub, tmp_path: Path) -> None:
    parts = {"part-1.safetensors": b"1", "part-[2].safetensors": b"2", "part-2.safetensors": b"not listed"}
    hub.files |= parts | {"model.safetensors.index.json": json.dumps(INDEX).encode(), "stray.bin": b"never"}
    assert not find(REPOSITORY, tmp_path, **hub.environment).startswith("refused")
    read = {*WANTED, "model.safetensors.index.json", "part-1.safetensors", "part-[2].safetensors"}
    assert hub.fetched == read


@pytest.mark.parametrize(
    ("refusal", "complaint"),
    [
        ((403, "GatedRepo"), f"{REPOSITORY} is gated; accept its terms at https://huggingface.co/{REPOSITORY}"),
        ((404, "RepoNotFound"), f"there is no directory and no repository {REPOSITORY}; check the name"),
        ((500, ""), f"{REPOSITORY} is neither a directory nor in the Hugging Face cache, and cannot be fetched: "),
    ],
)
def test_refusal_of_the_hub_is_one_line(hub: Hub, refusal: Any, complaint: str, tmp_path: Path) -> None:
    hub.refusal = refusal
    said = find(REPOSITORY, tmp_path, **hub.environment)
    assert said.startswith(f"refused: {complaint}")
    assert "\n" not in said


def test_what_a_repository_lacks_is_one_line(hub: Hub, tmp_path: Path) -> None:
    said = find(f"{REPOSITORY}@v9", tmp_path, **hub.environment)
    assert said == f"refused: {REPOSITORY} has no revision 'v9'; give a branch, a tag or a commit"
    said = find(REPOSITORY, tmp_path, **hub.environment)
    assert said.startswith(f"refused: {REPOSITORY} has no model.safetensors and no model.safetensors.index.json")
    assert not hub.fetched & set(UNWANTED)


def test_index_that_is_none_is_one_line(hub: Hub, tmp_path: Path) -> None:
    hub.files["model.safetensors.index.json"] = b"[]"
    assert find(REPOSITORY, tmp_path, **hub.environment).endswith("does not list weights; the repository is damaged")


def test_without_a_network_is_one_line(tmp_path: Path) -> None:
    said = find(REPOSITORY, tmp_path, HF_HUB_OFFLINE="1")
    problem = f"{REPOSITORY} is neither a directory nor in the Hugging Face cache, and cannot be fetched"
    assert said == f"refused: {problem}: HF_HUB_OFFLINE is set; unset it, or give a directory"
    said = find(REPOSITORY, tmp_path, HF_HUB_OFFLINE="0", HF_ENDPOINT="http://127.0.0.1:1")
    assert said.startswith(f"refused: {problem}: ")
    assert said.endswith("check the network, or give a directory")


def test_cache_that_others_have_filled_is_used(tiny_llama: Path, tmp_path: Path) -> None:
    snapshot = lay_out_cache(tmp_path, tiny_llama)
    assert Path(find(REPOSITORY, tmp_path, HF_HUB_OFFLINE="1")) == snapshot
