"""Converting to dense: other tools load what comes out, and it computes what the artifact computes."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from pressd.compress import compress
from pressd.compress.convert import convert_to_dense
from pressd.compress.encoding import decode
from pressd.compress.recipe import Recipe, parse_recipe, recipe_of_scheme
from pressd.runtime.artifact.reader import Checkpoint
from pressd.runtime.models import load_decoder

CPU = torch.device("cpu")
WEIGHTS = "model.safetensors"
MIXED = '"*" = "w4a16g32"\n"layers.1.*" = "w8a16"\n"layers.1.down" = "sparse24:w3a16"'
EMBEDDED = '"*" = "w5a16"\n"embed" = "w8a16"'
UNTIED = '"*" = "w4a16g32"\n"embed" = "keep"\n"lm_head" = "w8a16g32"'
WEIGHT_ONLY = [
    *("bf16", "w4a16g32", "w3a16", "sparse24:w4a16", "sparse24:bf16", "lowrank8:w8a16", "w2a16g32+residual4"),
    *(MIXED, EMBEDDED, UNTIED),
]


def recipe_of(rules: str) -> Recipe:
    return parse_recipe(f"[scheme]\n{rules}\n", "recipe") if "=" in rules else recipe_of_scheme(rules)


def load_in_transformers(path: Path) -> Any:
    from transformers import AutoModelForCausalLM

    model, loading = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, output_loading_info=True)
    assert not loading["missing_keys"]
    assert not loading["unexpected_keys"]
    return model.eval()


@pytest.mark.parametrize("source", ["tiny_llama", "tiny_llama_tied"])
@pytest.mark.parametrize("rules", WEIGHT_ONLY)
def test_transformers_computes_what_the_artifact_computes(
    source: str, rules: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    path: Path = request.getfixturevalue(source)
    compress(path, recipe_of(rules), tmp_path / "pressed")
    converted = convert_to_dense(tmp_path / "pressed", tmp_path / "dense", dtype=torch.float32)
    assert not converted.drops_activations
    checkpoint = Checkpoint.open(tmp_path / "pressed")
    model = load_in_transformers(tmp_path / "dense")
    assert type(model).__name__ == "LlamaForCausalLM"
    stored = load_file(tmp_path / "dense" / WEIGHTS)
    for linear in checkpoint.model.linears():
        weight = decode(checkpoint.linear_tensors(linear.prefix), checkpoint.linear(linear.prefix), torch.float32)
        assert torch.equal(model.get_submodule(linear.prefix).weight, weight)
        assert torch.equal(stored.pop(f"{linear.prefix}.weight"), weight)
    assert stored.keys() == checkpoint.model.others().keys()
    ids = torch.randint(0, 97, (3, 40), generator=torch.Generator().manual_seed(5))
    decoder = load_decoder(checkpoint, device=CPU, dtype=torch.float32, prefer="reference")
    with torch.inference_mode():
        ours, theirs = decoder.full_logits(ids), model(ids).logits
    # The bound of every family's conformance test: two float32 implementations of one model.
    assert float((ours - theirs).norm() / theirs.norm()) < 1e-4


def test_the_directory_is_plain(tiny_llama: Path, tmp_path: Path) -> None:
    compress(tiny_llama, "sparse24:w4a16", tmp_path / "pressed")
    (tmp_path / "pressed/LICENSE").write_text("do as you like")
    told: list[tuple[str, int, int]] = []
    converted = convert_to_dense(tmp_path / "pressed", tmp_path / "dense", progress=lambda *block: told.append(block))
    assert told == [("embed", 1, 4), ("layers.0", 2, 4), ("layers.1", 3, 4), ("head", 4, 4)]
    names = {file.name for file in (tmp_path / "dense").iterdir()}
    assert names == {
        "config.json",
        WEIGHTS,
        "tokenizer.json",
        "tokenizer_config.json",
        "generation_config.json",
        "LICENSE",
    }
    source = json.loads((tiny_llama / "config.json").read_text())
    assert json.loads((tmp_path / "dense/config.json").read_text()) == source
    assert converted.bytes == (tmp_path / "dense" / WEIGHTS).stat().st_size
    assert converted.dtype == "float32"
    assert Checkpoint.open(tmp_path / "dense").manifest is None


@pytest.mark.parametrize("dtype", [None, torch.float16, torch.float32])
def test_the_precision_is_the_artifacts_or_the_one_asked_for(
    tiny_llama: Path, dtype: torch.dtype | None, tmp_path: Path
) -> None:
    recipe = parse_recipe('[scheme]\n"*" = "w4a16g32"\n"embed" = "bf16"\n"lm_head" = "bf16"\n', "recipe")
    compress(tiny_llama, recipe, tmp_path / "pressed")
    assert Checkpoint.open(tmp_path / "pressed").torch_dtype == torch.bfloat16
    converted = convert_to_dense(tmp_path / "pressed", tmp_path / "dense", dtype=dtype)
    expected = dtype or torch.bfloat16
    assert converted.dtype == str(expected).removeprefix("torch.")
    assert {tensor.dtype for tensor in load_file(tmp_path / "dense" / WEIGHTS).values()} == {expected}
    assert Checkpoint.open(tmp_path / "dense").torch_dtype == expected


def test_it_can_be_pressed_again(tiny_llama_tied: Path, tmp_path: Path) -> None:
    compress(tiny_llama_tied, "w4a16g32", tmp_path / "pressed")
    convert_to_dense(tmp_path / "pressed", tmp_path / "dense")
    again = compress(tmp_path / "dense", "w8a16", tmp_path / "again")
    assert again.totals.params == Checkpoint.open(tiny_llama_tied).model.num_params
    assert Checkpoint.open(tmp_path / "again").model.tied


def test_many_files_hold_the_same(tiny_llama: Path, tmp_path: Path) -> None:
    compress(tiny_llama, "w3a16", tmp_path / "pressed")
    convert_to_dense(tmp_path / "pressed", tmp_path / "one")
    convert_to_dense(tmp_path / "pressed", tmp_path / "many", shard_bytes=30_000)
    one, many = Checkpoint.open(tmp_path / "one"), Checkpoint.open(tmp_path / "many")
    assert len(many.weight_files) > 3
    assert one.names() == many.names()
    assert all(torch.equal(one.tensor(name), many.tensor(name)) for name in one.names())


def test_a_foreign_directory_is_converted(tiny_llama: Path, tmp_path: Path) -> None:
    compress(tiny_llama, "w8a8", tmp_path / "pressed")
    shutil.rmtree(tmp_path / "pressed/pressd")
    assert Checkpoint.open(tmp_path / "pressed").manifest is None
    assert convert_to_dense(tmp_path / "pressed", tmp_path / "dense").drops_activations
    load_in_transformers(tmp_path / "dense")


class _Stop(Exception):
    pass


def test_an_interruption_leaves_nothing(tiny_llama: Path, tmp_path: Path) -> None:
    compress(tiny_llama, "w8a8", tmp_path / "pressed")

    def interrupt(block: str, done: int, total: int) -> None:
        if block == "layers.1":
            raise _Stop

    with pytest.raises(_Stop):
        convert_to_dense(tmp_path / "pressed", tmp_path / "dense", progress=interrupt)
    assert [path.name for path in tmp_path.iterdir()] == ["pressed"]


def test_what_is_there_is_never_replaced(tiny_llama: Path, tmp_path: Path) -> None:
    compress(tiny_llama, "w8a8", tmp_path / "pressed")
    before = {path: path.read_bytes() for path in (tmp_path / "pressed").rglob("*") if path.is_file()}
    for out in (tmp_path / "pressed", tmp_path):
        with pytest.raises(ValueError, match="is not empty; give an empty or a new directory"):
            convert_to_dense(tmp_path / "pressed", out)
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="is not a directory; give another place"):
        convert_to_dense(tmp_path / "pressed", tmp_path / "file")
    assert {path: path.read_bytes() for path in (tmp_path / "pressed").rglob("*") if path.is_file()} == before


def test_a_weight_that_does_not_fit_is_named(tiny_llama: Path, tmp_path: Path) -> None:
    source = Path(shutil.copytree(tiny_llama, tmp_path / "source"))
    tensors = load_file(source / WEIGHTS)
    tensors["model.layers.1.mlp.up_proj.weight"][2, 3] = 1e5  # beyond float16's 65504
    save_file(tensors, source / WEIGHTS)
    compress(source, "w8a16", tmp_path / "pressed")
    message = r"up_proj\.weight is not finite in torch\.float16; choose a wider --dtype"
    with pytest.raises(ValueError, match=message):
        convert_to_dense(tmp_path / "pressed", tmp_path / "dense", dtype=torch.float16)
    assert not (tmp_path / "dense").exists()
