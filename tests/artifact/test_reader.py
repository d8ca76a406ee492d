"""What a checkpoint says about itself once it has been accepted."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from pressd.compress import compress
from pressd.runtime.artifact.manifest import read_manifest, write_manifest
from pressd.runtime.artifact.reader import Checkpoint
from pressd.runtime.artifact.specs import Packed

WEIGHTS = "model.safetensors"


@pytest.fixture
def copy(tiny_llama: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_llama, tmp_path / "copy"))


def change_config(path: Path, **changes: object) -> None:
    content = json.loads((path / "config.json").read_text()) | changes
    (path / "config.json").write_text(json.dumps({name: value for name, value in content.items() if value != "absent"}))


def test_a_plain_directory_is_dense(tiny_llama: Path) -> None:
    checkpoint = Checkpoint.open(tiny_llama)
    tensors = load_file(tiny_llama / WEIGHTS)
    assert checkpoint.names() == tensors.keys()
    assert checkpoint.manifest is None
    assert checkpoint.torch_dtype == torch.float32
    assert checkpoint.dense_bytes == sum(tensor.numel() * 4 for tensor in tensors.values())
    assert checkpoint.artifact_bytes == (tiny_llama / WEIGHTS).stat().st_size
    assert checkpoint.linear("model.layers.0.mlp.down_proj") == Packed.dense((64, 160), torch.float32)
    for name, tensor in tensors.items():
        assert torch.equal(checkpoint.tensor(name), tensor)


def test_the_head_of_a_tied_model_is_its_embedding(tiny_llama_tied: Path) -> None:
    checkpoint = Checkpoint.open(tiny_llama_tied)
    assert checkpoint.model.tied
    assert "lm_head.weight" not in checkpoint.names()
    assert checkpoint.linear("lm_head") == Packed.dense((97, 64), torch.float32)
    weight = checkpoint.linear_tensors("lm_head")["weight"]
    assert torch.equal(weight, checkpoint.tensor("model.embed_tokens.weight"))


def test_a_stored_copy_of_a_tied_head_is_left_out(tiny_llama_tied: Path, tmp_path: Path) -> None:
    path = Path(shutil.copytree(tiny_llama_tied, tmp_path / "copy"))
    tensors = load_file(path / WEIGHTS)
    save_file(tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, path / WEIGHTS)
    checkpoint = Checkpoint.open(path)
    assert checkpoint.names() == tensors.keys()
    assert checkpoint.dense_bytes == Checkpoint.open(tiny_llama_tied).dense_bytes


def test_rotary_buffers_of_old_checkpoints_are_ignored(copy: Path) -> None:
    tensors = load_file(copy / WEIGHTS)
    save_file(tensors | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}, copy / WEIGHTS)
    assert Checkpoint.open(copy).names() == tensors.keys()


@pytest.mark.parametrize(
    ("key", "name", "dtype"),
    [
        ("dtype", "float16", torch.float16),
        ("torch_dtype", "bfloat16", torch.bfloat16),
        ("dtype", "absent", torch.float32),
    ],
)
def test_the_precision_is_config_s_or_the_embedding_s(copy: Path, key: str, name: str, dtype: torch.dtype) -> None:
    change_config(copy, **({"dtype": "absent"} | {key: name}))
    assert Checkpoint.open(copy).torch_dtype == dtype


def test_a_double_precision_checkpoint_is_read(tmp_path: Path, tiny_llama: Path) -> None:
    path = Path(shutil.copytree(tiny_llama, tmp_path / "copy"))
    save_file({name: tensor.double() for name, tensor in load_file(path / WEIGHTS).items()}, path / WEIGHTS)
    change_config(path, dtype="float64")
    checkpoint = Checkpoint.open(path)
    assert (checkpoint.torch_dtype, checkpoint.tensor("model.norm.weight").dtype) == (torch.float64, torch.float64)


def test_biases_belong_to_the_model_when_config_says_so(tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "vocab_size": 11}
    config = LlamaConfig(**sizes, num_attention_heads=4, head_dim=8, attention_bias=True, mlp_bias=True)
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    checkpoint = Checkpoint.open(tmp_path)
    assert checkpoint.tensor("model.layers.0.self_attn.q_proj.bias").shape == (32,)
    assert checkpoint.linear("model.layers.0.self_attn.o_proj").in_features == 32


def test_the_id_of_a_plain_directory_follows_names_sizes_and_headers(tiny_llama: Path, copy: Path) -> None:
    original = Checkpoint.open(tiny_llama).artifact_id
    assert Checkpoint.open(copy).artifact_id == original
    change_config(copy, rope_parameters={"rope_theta": 5.0, "rope_type": "default"})
    assert Checkpoint.open(copy).artifact_id != original


def test_an_artifact_s_id_and_sizes_are_its_manifest_s(tiny_llama: Path, tmp_path: Path) -> None:
    manifest = compress(tiny_llama, "w4a16g32", tmp_path / "out")
    checkpoint = Checkpoint.open(tmp_path / "out")
    assert checkpoint.manifest == manifest
    assert checkpoint.artifact_id == manifest.id
    assert checkpoint.dense_bytes == Checkpoint.open(tiny_llama).dense_bytes
    assert checkpoint.artifact_bytes == manifest.totals.bytes
    assert sorted(checkpoint.linear_tensors("model.layers.1.mlp.up_proj")) == [
        "weight_packed",
        "weight_scale",
        "weight_shape",
    ]


def test_quality_does_not_change_the_id(tiny_llama: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    manifest = compress(tiny_llama, "bf16", out)
    write_manifest(out, manifest.model_copy(update={"quality": {"kl_mean": 0.25}}))
    changed = read_manifest(out)
    assert changed is not None
    assert (changed.id, changed.quality) == (manifest.id, {"kl_mean": 0.25})
    kept = ["journal.jsonl", "manifest.json", "recipe.toml", "report.html", "report.json"]
    assert sorted(path.name for path in (out / "pressd").iterdir()) == kept  # nothing temporary
    assert Checkpoint.open(out).artifact_id == manifest.id


def test_the_foreign_group_that_a_name_belongs_to_is_found_as_they_find_it(tiny_llama: Path, tmp_path: Path) -> None:
    """compressed-tensors: exact names before patterns, patterns before the class name, in whatever order they are."""
    out = tmp_path / "out"
    compress(tiny_llama, "w4a16g32", out)
    shutil.rmtree(out / "pressd")
    content = json.loads((out / "config.json").read_text())
    first = content["quantization_config"]["config_groups"]["group_0"]
    wrong = first | {"weights": first["weights"] | {"num_bits": 8}}
    exact = [f"model.layers.{layer}.{part}" for layer in (0, 1) for part in ("self_attn.o_proj", "mlp.down_proj")]
    content["quantization_config"]["config_groups"] = {
        "class": wrong | {"targets": ["Linear"]},
        "patterns": first | {"targets": [r"re:.*\.(q|k|v)_proj$", r"re:.*layers\.\d+\.mlp\.(gate|up)_proj"]},
        "too wide": wrong | {"targets": ["re:model.*o_proj", "re:model.*down_proj"]},
        "names": first | {"targets": exact},
    }
    (out / "config.json").write_text(json.dumps(content))
    checkpoint = Checkpoint.open(out)
    layers = [linear.prefix for linear in checkpoint.model.linears() if linear.prefix.startswith("model.layers.")]
    assert {checkpoint.linear(prefix).bits for prefix in layers} == {4}
