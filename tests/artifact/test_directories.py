"""Directories that lie or are damaged: each is refused with one line, by the reader and by `compress` alike."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from pressd.compress import compress
from pressd.runtime.artifact import reader
from pressd.runtime.artifact.errors import ArtifactError
from pressd.runtime.artifact.manifest import StoredFile, artifact_id
from pressd.runtime.artifact.reader import Checkpoint

Damage = Callable[[Path], None]
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
DOWN = "model.layers.1.mlp.down_proj"


@pytest.fixture(scope="module")
def pressed(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pressed") / "w4"
    compress(tiny_llama, "w4a16g32", path)
    return path


@pytest.fixture(scope="module")
def sharded(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sharded") / "bf16"
    compress(tiny_llama, "bf16", path, shard_bytes=60_000)
    shutil.rmtree(path / "pressd")
    return path


@pytest.fixture
def originals(tiny_llama: Path, tiny_llama_tied: Path, pressed: Path, sharded: Path) -> dict[str, Path]:
    return {"dense": tiny_llama, "tied": tiny_llama_tied, "pressed": pressed, "sharded": sharded}


def config(**changes: object) -> Damage:
    def damage(path: Path) -> None:
        content = json.loads((path / "config.json").read_text()) | changes
        (path / "config.json").write_text(json.dumps(content))

    return damage


def quantization(**changes: object) -> Damage:
    """Change quantization_config; a dotted name changes something inside its one group."""

    def damage(path: Path) -> None:
        content = json.loads((path / "config.json").read_text())
        for name, value in changes.items():
            place = content["quantization_config"]
            *parents, last = name.split("__")
            for parent in parents:
                place = place[parent]
            place[last] = value
        (path / "config.json").write_text(json.dumps(content))

    return foreign(damage)


def weights(change: Callable[[dict[str, torch.Tensor]], object]) -> Damage:
    def damage(path: Path) -> None:
        tensors = load_file(path / WEIGHTS)
        change(tensors)
        save_file(tensors, path / WEIGHTS)

    return foreign(damage)


def index(change: Callable[[dict[str, str]], object]) -> Damage:
    def damage(path: Path) -> None:
        content = json.loads((path / INDEX).read_text())
        change(content["weight_map"])
        (path / INDEX).write_text(json.dumps(content))

    return damage


def foreign(then: Damage) -> Damage:
    """First make it somebody else's directory, which no manifest protects."""

    def damage(path: Path) -> None:
        shutil.rmtree(path / "pressd", ignore_errors=True)
        then(path)

    return damage


def text(name: str, content: str) -> Damage:
    return lambda path: (path / name).write_text(content) and None


def cut(name: str, num_bytes: int) -> Damage:
    return lambda path: (path / name).write_bytes((path / name).read_bytes()[:-num_bytes]) and None


def flip_last_byte(path: Path) -> None:
    content = bytearray((path / WEIGHTS).read_bytes())
    content[-1] ^= 1
    (path / WEIGHTS).write_bytes(content)


def manifest(**changes: object) -> Damage:
    def damage(path: Path) -> None:
        content = json.loads((path / "pressd/manifest.json").read_text()) | changes
        (path / "pressd/manifest.json").write_text(json.dumps(content))

    return damage


def unlist(name: str) -> Damage:
    """Leave a file out of the manifest, with an id that agrees."""

    def damage(path: Path) -> None:
        content = json.loads((path / "pressd/manifest.json").read_text())
        del content["files"][name]
        content["id"] = artifact_id({file: StoredFile(**stored) for file, stored in content["files"].items()})
        (path / "pressd/manifest.json").write_text(json.dumps(content))

    return damage


def only_a_pickle(path: Path) -> None:
    (path / WEIGHTS).rename(path / "pytorch_model.bin")


def same_tensor_twice(path: Path) -> None:
    first, second = sorted(path.glob("model-*.safetensors"))[:2]
    tensors = load_file(second)
    save_file(tensors | {"model.embed_tokens.weight": load_file(first)["model.embed_tokens.weight"]}, second)


def cut_shard(path: Path) -> None:
    cut(sorted(path.glob("model-*.safetensors"))[1].name, 1)(path)


def lose_shard(path: Path) -> None:
    sorted(path.glob("model-*.safetensors"))[1].unlink()


HOSTILE: list[tuple[str, str, Damage, str]] = [
    ("no config", "dense", lambda path: (path / "config.json").unlink(), "has no config.json"),
    ("config is no JSON", "dense", text("config.json", "{"), "config.json: JSON is not valid"),
    ("config is deep", "dense", text("config.json", "[" * 200_000), "nested too deeply"),
    ("config is a list", "dense", text("config.json", "[]"), "JSON is a list"),
    ("unknown family", "dense", config(architectures=["MambaForCausalLM"]), "known: LlamaForCausalLM"),
    ("two families", "dense", config(architectures=["LlamaForCausalLM", "X"]), "known: LlamaForCausalLM"),
    ("family of another type", "dense", config(architectures=7), "architecture 7 is not known"),
    ("size is missing", "dense", config(hidden_size=None), "hidden_size is None"),
    ("size is text", "dense", config(vocab_size="97"), "vocab_size is '97'"),
    ("size is true", "dense", config(num_hidden_layers=True), "num_hidden_layers is True"),
    ("a billion layers", "dense", config(num_hidden_layers=10**9), "num_hidden_layers is 1000000000"),
    ("heads do not divide", "dense", config(num_key_value_heads=3), "not a multiple of num_key_value_heads 3"),
    ("flag is text", "dense", config(tie_word_embeddings="yes"), "tie_word_embeddings is 'yes'"),
    ("dtype unknown", "dense", config(dtype="int4"), "dtype 'int4' is not known"),
    ("shape contradicts config", "dense", config(intermediate_size=128), "config.json asks for"),
    ("one layer too many", "dense", config(num_hidden_layers=3), "is missing"),
    ("one layer too few", "dense", config(num_hidden_layers=1), "is not one of this LlamaForCausalLM's"),
    ("missing tensor", "dense", weights(lambda t: t.pop("model.norm.weight")), "'model.norm.weight' is missing"),
    ("extra tensor", "dense", weights(lambda t: t.update(evil=torch.ones(1))), "'evil' is not one of this"),
    (
        "integer norm",
        "dense",
        weights(lambda t: t.update({"model.norm.weight": torch.ones(64, dtype=torch.int8)})),
        "is I8",
    ),
    (
        "tied, yet another head",
        "tied",
        weights(lambda t: t.update({"lm_head.weight": torch.ones(97, 64)})),
        "set it to false",
    ),
    ("truncated", "dense", cut(WEIGHTS, 1), "truncated"),
    ("empty", "dense", text(WEIGHTS, ""), "at least 8"),
    ("only a pickle", "dense", only_a_pickle, "pickles, which are never read"),
    ("no weights", "dense", lambda path: (path / WEIGHTS).unlink(), f"neither {WEIGHTS} nor"),
    ("unfinished", "dense", lambda path: (path / "pressd").mkdir(), "is unfinished"),
    ("truncated shard", "sharded", cut_shard, "truncated"),
    ("lost shard", "sharded", lose_shard, "is missing; model.safetensors.index.json names it"),
    ("path traversal", "sharded", index(lambda m: m.update(x="../w.safetensors")), "plain name"),
    ("absolute path", "sharded", index(lambda m: m.update(x="/w.safetensors")), "plain name"),
    ("a folder below", "sharded", index(lambda m: m.update(x="a/w.safetensors")), "plain name"),
    ("NUL in a name", "sharded", index(lambda m: m.update(x="w\0.safetensors")), "plain name"),
    ("a pickle in the index", "sharded", index(lambda m: m.update(x="w.bin")), "plain name"),
    ("a number in the index", "sharded", index(lambda m: m.update(x=1)), "plain name"),
    ("index without map", "sharded", text(INDEX, "{}"), "weight_map must be an object"),
    ("index lists what is not there", "sharded", index(lambda m: m.update(x=m["model.norm.weight"])), "'x' is not in"),
    ("index forgets a tensor", "sharded", index(lambda m: m.pop("model.norm.weight")), "does not list tensor"),
    ("tensor in two files", "sharded", same_tensor_twice, "'model.embed_tokens.weight' is in both"),
    ("wrong checksum", "pressed", flip_last_byte, "sha256 differs"),
    ("wrong size", "pressed", cut(WEIGHTS, 1), "the manifest says"),
    ("listed file is gone", "pressed", lambda path: (path / "tokenizer.json").unlink(), "tokenizer.json is missing"),
    ("unlisted weights", "pressed", unlist(WEIGHTS), f"{WEIGHTS} is not listed in the manifest"),
    ("unlisted config", "pressed", unlist("config.json"), "config.json is not listed in the manifest"),
    ("manifest is no JSON", "pressed", text("pressd/manifest.json", "{"), "Invalid JSON"),
    ("manifest of the future", "pressed", manifest(schema=2), "schema: Input should be 1"),
    ("manifest with more", "pressed", manifest(evil=1), "evil: Extra inputs"),
    ("manifest with another id", "pressed", manifest(id="0" * 64), "id is not the digest of its files"),
    (
        "manifest traversal",
        "pressed",
        manifest(files={"../x": {"bytes": 1, "sha256": "0" * 64}}),
        "must be a plain name",
    ),
    ("unknown method", "pressed", quantization(quant_method="gptq"), "quant_method 'gptq' is not known"),
    ("not compressed", "pressed", quantization(quantization_status="frozen"), "quantization_status is 'frozen'"),
    ("quantised cache", "pressed", quantization(kv_cache_scheme={"num_bits": 8}), "kv_cache_scheme: only 8 bits, int"),
    ("no groups", "pressed", quantization(config_groups=None), "config_groups: needs an object"),
    ("preset", "pressed", quantization(config_groups={"W4A16": ["Linear"]}), "W4A16: needs an object"),
    ("no targets", "pressed", quantization(config_groups__group_0__targets=None), "needs a list of names"),
    ("nine bits", "pressed", quantization(config_groups__group_0__weights__num_bits=9), "'w9a16g32' is not known"),
    (
        "five bits",
        "pressed",
        quantization(config_groups__group_0__weights__num_bits=5),
        "has shape [64, 8], config.json asks for [64, 10]",
    ),
    (
        "float codes",
        "pressed",
        quantization(config_groups__group_0__weights__type="float"),
        "floats are supported with 8 bits and one scale per channel or block only",
    ),
    (
        "asymmetric without zero points",
        "pressed",
        quantization(config_groups__group_0__weights__symmetric=False),
        "weight_zero_point' is missing (14 in all)",
    ),
    (
        "symmetric is a number",
        "pressed",
        quantization(config_groups__group_0__weights__symmetric=1),
        "only static weights in natural order",
    ),
    (
        "permuted",
        "pressed",
        quantization(config_groups__group_0__weights__actorder="group"),
        "only static weights in natural order",
    ),
    (
        "unknown strategy",
        "pressed",
        quantization(config_groups__group_0__weights__strategy="block"),
        "strategy 'block'",
    ),
    (
        "group does not divide",
        "pressed",
        quantization(config_groups__group_0__weights__group_size=128),
        "not a multiple",
    ),
    ("unknown group size", "pressed", quantization(config_groups__group_0__weights__group_size=33), "group_size 33"),
    ("other format", "pressed", quantization(config_groups__group_0__format="dense"), "format 'dense' is not 'pack-"),
    (
        "activations",
        "pressed",
        quantization(config_groups__group_0__input_activations={"num_bits": 8}),
        "8 bits of the weights' type, dynamic",
    ),
    (
        "group of nothing stored",
        "pressed",
        quantization(ignore=["lm_head", f"{DOWN}"]),
        f"'{DOWN}.weight' is missing",
    ),
    ("pattern that explodes", "pressed", quantization(ignore=["re:(a|a)+b"]), "too complicated"),
    ("pattern of many repeats", "pressed", quantization(ignore=["re:" + ".*" * 9 + "x"]), "too complicated"),
    ("pattern of many choices", "pressed", quantization(ignore=["re:" + "(.|.)" * 50]), "too complicated"),
    ("pattern in verbose mode", "pressed", quantization(ignore=["re:(?x)([a-z0-9._]+) +!"]), "has an extension (?...)"),
    ("pattern that looks ahead", "pressed", quantization(ignore=["re:(?=a)"]), "has an extension (?...)"),
    ("forty thousand patterns", "pressed", quantization(ignore=["re:.*.*x"] * 40_000), "too many, or too complicated"),
    ("bits are text", "pressed", quantization(config_groups__group_0__weights__num_bits="4"), "num_bits is '4'"),
    ("pattern that is none", "pressed", quantization(ignore=["re:(a"]), "is not valid"),
    (
        "stored shape lies",
        "pressed",
        weights(lambda t: t[f"{DOWN}.weight_shape"].copy_(torch.tensor([64, 159]))),
        "says [64, 159], config.json asks for [64, 160]",
    ),
]


@pytest.mark.parametrize(
    ("kind", "damage", "message"), [case[1:] for case in HOSTILE], ids=[case[0] for case in HOSTILE]
)
def test_it_is_refused_in_one_line(
    originals: dict[str, Path], kind: str, damage: Damage, message: str, tmp_path: Path
) -> None:
    path = tmp_path / "model"
    shutil.copytree(originals[kind], path)
    damage(path)
    with pytest.raises(ArtifactError) as caught:
        Checkpoint.open(path)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    with pytest.raises(ArtifactError) as caught_pressing:
        compress(path, "w8a8", tmp_path / "out")
    assert str(caught_pressing.value) == str(caught.value)
    assert [entry.name for entry in tmp_path.iterdir()] == ["model"]


def test_a_path_that_is_no_directory_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for name in ("file", "nothing"):
        with pytest.raises(ArtifactError, match="is not a directory; give a model directory"):
            Checkpoint.open(tmp_path / name)


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_a_scale_that_is_not_finite_is_reported(pressed: Path, poison: float, tmp_path: Path) -> None:
    path = tmp_path / "model"
    shutil.copytree(pressed, path)
    weights(lambda t: t[f"{DOWN}.weight_scale"][3].fill_(poison))(path)
    checkpoint = Checkpoint.open(path)
    checkpoint.linear_tensors("model.layers.0.mlp.down_proj")
    with pytest.raises(ArtifactError, match=f"{WEIGHTS}: {DOWN}.weight_scale holds NaN or infinity"):
        checkpoint.linear_tensors(DOWN)


@pytest.fixture
def never_hashed_when_opened(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader, "HASH_BELOW_BYTES", 0)


@pytest.mark.usefixtures("never_hashed_when_opened")
def test_a_large_artifact_is_hashed_when_asked(pressed: Path, tmp_path: Path) -> None:
    path = tmp_path / "model"
    shutil.copytree(pressed, path)
    flip_last_byte(path)
    checkpoint = Checkpoint.open(path)
    checkpoint.verify(full=False)
    with pytest.raises(ArtifactError, match="sha256 differs"):
        checkpoint.verify(full=True)
