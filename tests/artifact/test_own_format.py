"""Artifacts that only we have words for: what they say of themselves, and what becomes of those that lie."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from pressd.compress import compress
from pressd.compress.recipe import parse_recipe
from pressd.runtime.artifact.errors import ArtifactError
from pressd.runtime.artifact.own_config import hide, restore
from pressd.runtime.artifact.reader import Checkpoint
from pressd.runtime.artifact.specs import Masked, Packed, Sum

WEIGHTS = "model.safetensors"
DOWN = "model.layers.1.mlp.down_proj"
SCHEMES = {"embed": "w8a16", "layers.0.down": "sparse24:w8a16+residual2", "layers.1.down": "sparse24:w8a16+residual2"}


@pytest.fixture(scope="module")
def ours(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("ours") / "sum"
    recipe = '[scheme]\n"down" = "sparse24:w8a16+residual2"\n"embed" = "w8a16"\n'
    compress(tiny_llama, parse_recipe(recipe, "recipe"), path)
    return path


def test_the_config_names_no_family_that_others_know(ours: Path, tiny_llama: Path) -> None:
    stored = json.loads((ours / "config.json").read_text())
    assert (stored["model_type"], stored["architectures"]) == ("pressd", ["PressdForCausalLM"])
    assert stored["quantization_config"] == {"quant_method": "pressd", "schemes": SCHEMES}
    checkpoint = Checkpoint.open(ours)
    source = json.loads((tiny_llama / "config.json").read_text())
    # What the reader hands on is the source's own config again.
    assert {key: checkpoint.config[key] for key in source} == source
    assert checkpoint.config.keys() - source.keys() == {"quantization_config"}
    assert isinstance(checkpoint.linear("model.embed_tokens"), Packed)
    spec = checkpoint.linear(DOWN)
    assert isinstance(spec, Sum)
    assert isinstance(spec.base, Masked)


def test_hidden_and_restored_is_the_same() -> None:
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 7}
    hidden = hide(config | {"auto_map": {"AutoModel": "evil.Model"}}, {"embed": "w8a16"})
    assert "auto_map" not in hidden
    quantization = {"quant_method": "pressd", "schemes": {"embed": "w8a16"}}
    assert restore(json.loads(json.dumps(hidden))) == config | {"quantization_config": quantization}
    assert restore(config) is config


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pressd": None}, "pressd must be an object with architectures and model_type"),
        ({"pressd": {"vocab_size": 7}}, "pressd must be an object with architectures and model_type"),
        ({"pressd": {"architectures": ["X"], "model_type": "x"}}, "architecture 'X' is not known"),
        ({"pressd": {"architectures": ["X"], "model_type": ["x"]}}, "pressd must be an object with architectures and"),
        ({"model_type": "llama"}, "architecture 'PressdForCausalLM' is not known"),
        ({"schemes": None}, "quantization_config.schemes: needs an object"),
        ({"schemes": {"layers.9.o": "w8a16"}}, "'layers.9.o': 'w8a16' is not a scheme of a fused group"),
        ({"schemes": {"layers.0.o": 8}}, "'layers.0.o': 8 is not a scheme of a fused group"),
        ({"schemes": {"layers.0.o": "w9a16"}}, "layers.0.o: scheme 'w9a16' is not known"),
        ({"schemes": {"layers.0.o": "lowrank99:bf16"}}, "lowrank 99 is not below both sides of 64 x 64"),
        ({"schemes": {"embed": "w8a8"}}, "rows of an embedding are looked up, not multiplied"),
        ({"schemes": {"embed": "w8a16"}}, "tensor 'model.layers.0.mlp.down_proj.weight' is missing"),
    ],
)
def test_a_config_that_lies_is_refused_in_one_line(
    ours: Path, changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    path = foreign(ours, tmp_path)
    content = json.loads((path / "config.json").read_text())
    if "schemes" in changes:
        content["quantization_config"] |= changes
    else:
        content |= changes
    (path / "config.json").write_text(json.dumps(content))
    with pytest.raises(ArtifactError) as caught:
        Checkpoint.open(path)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_part_whose_stored_shape_lies_is_refused(ours: Path, tmp_path: Path) -> None:
    path = foreign(ours, tmp_path)
    change(path, f"{DOWN}.base.values.weight_shape", torch.tensor([64, 160]))
    with pytest.raises(ArtifactError, match=r"values.weight_shape' says \[64, 160\], config.json asks for \[64, 80\]"):
        Checkpoint.open(path)


def test_a_mask_that_does_not_keep_two_of_four_is_refused_before_use(ours: Path, tmp_path: Path) -> None:
    path = foreign(ours, tmp_path)
    change(path, f"{DOWN}.base.mask", torch.full((64, 20), 0xFF, dtype=torch.uint8))
    checkpoint = Checkpoint.open(path)
    checkpoint.linear_tensors("model.layers.0.mlp.down_proj")
    with pytest.raises(ArtifactError, match=f"{WEIGHTS}: {DOWN}.base.mask does not keep two of every four"):
        checkpoint.linear_tensors(DOWN)


def test_a_scale_deep_in_the_tree_must_be_finite(ours: Path, tmp_path: Path) -> None:
    path = foreign(ours, tmp_path)
    change(path, f"{DOWN}.base.values.weight_scale", torch.full((64, 1), float("inf")))
    with pytest.raises(ArtifactError, match=f"{DOWN}.base.values.weight_scale holds NaN or infinity"):
        Checkpoint.open(path).linear_tensors(DOWN)


def foreign(path: Path, tmp_path: Path) -> Path:
    """Return a copy that no manifest protects."""
    copy = Path(shutil.copytree(path, tmp_path / "model"))
    shutil.rmtree(copy / "pressd")
    return copy


def change(path: Path, name: str, tensor: torch.Tensor) -> None:
    tensors = load_file(path / WEIGHTS)
    assert (tensors[name].shape, tensors[name].dtype) == (tensor.shape, tensor.dtype)
    save_file(tensors | {name: tensor}, path / WEIGHTS)
