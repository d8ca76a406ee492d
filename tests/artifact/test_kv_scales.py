"""Scales of keys and values in an artifact: said in compressed-tensors' words, read back, and refused when they lie."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from pressd.compress import compress
from pressd.compress.convert import convert_to_dense
from pressd.compress.plan import make_plan
from pressd.compress.quantization_config import artifact_config
from pressd.compress.recipe import parse_recipe
from pressd.runtime.artifact.errors import ArtifactError
from pressd.runtime.artifact.kv_scales import KVKind, KVScheme, read_kv_scheme, scale_names, scale_shapes
from pressd.runtime.artifact.reader import Checkpoint
from pressd.runtime.kernels.attention.kv_codes import decode, encode
from pressd.runtime.models import load_decoder
from pressd.runtime.models.loading import KV_CODES

WEIGHTS = "model.safetensors"
NUM_LAYERS = 2
# One recipe for each way in which config.json says what is stored: not at all, compressed-tensors' words, our own.
RECIPES = {"dense": '"*" = "keep"\n', "packed": '"*" = "w4a16g32"\n', "own": '"layers.0.down" = "lowrank8:w8a16"\n'}
KINDS = {"int8": "int", "fp8": "float"}
CPU = torch.device("cpu")


def calibrated(source: Path, path: Path, kind: KVKind, recipe: str = "packed") -> Path:
    """Press a model, and put scales beside it as one who has measured them would."""
    asked = parse_recipe(f"[scheme]\n{RECIPES[recipe]}", "recipe")
    compress(source, asked, path)
    shutil.rmtree(path / "pressd")
    checkpoint = Checkpoint.open(source)
    plan = replace(make_plan(checkpoint, asked), kv_scheme=KVScheme(kind=kind))
    (path / "config.json").write_text(json.dumps(artifact_config(checkpoint.config, plan)))
    scales = {
        name: torch.full(shape, 0.01 * (number + 1), dtype=plan.dtype)
        for number, (name, shape) in enumerate(scale_shapes(plan.kv_scheme, NUM_LAYERS).items())
    }
    save_file(load_file(path / WEIGHTS) | scales, path / WEIGHTS)
    return path


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_what_is_said_is_read_back(tiny_llama: Path, tmp_path: Path, kind: KVKind, recipe: str) -> None:
    checkpoint = Checkpoint.open(calibrated(tiny_llama, tmp_path / "out", kind, recipe))
    assert checkpoint.kv_scheme == KVScheme(kind=kind)
    for layer in range(NUM_LAYERS):
        for place, scale in enumerate(checkpoint.kv_scales(layer)):
            assert scale.dtype == torch.float32
            assert scale.tolist() == pytest.approx([0.01 * (2 * layer + place + 1)], rel=2**-24)


@pytest.mark.parametrize("recipe", ["dense", "packed"])
@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_compressed_tensors_reads_the_same(tiny_llama: Path, tmp_path: Path, kind: KVKind, recipe: str) -> None:
    from compressed_tensors.quantization import QuantizationConfig, QuantizationStrategy
    from compressed_tensors.quantization.quant_metadata import KVCacheScaleType

    path = calibrated(tiny_llama, tmp_path / "out", kind, recipe)
    config = json.loads((path / "config.json").read_text())
    theirs = QuantizationConfig.model_validate(config["quantization_config"])
    found = theirs.kv_cache_scheme
    assert found is not None
    assert (found.num_bits, found.type, found.symmetric, found.dynamic) == (8, KINDS[kind], True, False)
    assert found.strategy == QuantizationStrategy.TENSOR
    assert [name.rpartition(".")[2] for name in scale_names(0)] == [kind.value for kind in KVCacheScaleType][:2]
    # What they write of it, defaults and all, is read as well.
    again = {"quantization_config": {"kv_cache_scheme": json.loads(found.model_dump_json())}}
    assert read_kv_scheme(again) == KVScheme(kind=kind)


def test_transformers_loads_it_as_if_nothing_were_there(tiny_llama: Path, tmp_path: Path) -> None:
    """5.24 calls its cache otherwise than compressed-tensors 0.20 looks for it; scales are reported as unused."""
    from transformers import AutoModelForCausalLM

    ids = torch.arange(1, 30)[None]
    compress(tiny_llama, parse_recipe(f"[scheme]\n{RECIPES['packed']}", "recipe"), tmp_path / "without")
    logits = [
        AutoModelForCausalLM.from_pretrained(path)(ids).logits
        for path in (calibrated(tiny_llama, tmp_path / "with", "fp8"), tmp_path / "without")
    ]
    assert torch.equal(*logits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_a_scale_means_what_it_means_to_compressed_tensors(kind: KVKind, dtype: torch.dtype) -> None:
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.lifecycle.forward import fake_quantize

    largest = 127 if kind == "int8" else 448
    scale = torch.tensor([2.0**-5])
    rows = torch.randn(40, 2, 16, generator=torch.Generator().manual_seed(2)).to(dtype) * largest * 2.0**-6
    rows[0, 0, :2] = torch.tensor([-3.0, 3.0]) * largest * 2.0**-5  # beyond what there is a code for
    codes, own = encode(rows, KV_CODES[kind], scale)
    assert own is None
    found = decode(codes, scale, torch.float32)
    expected = fake_quantize(rows.float(), scale, None, QuantizationArgs(**KVScheme(kind=kind).to_config()))
    if kind == "int8":  # their codes go to -128, which here is the code of no number
        expected = expected.clamp_min(-127 * scale)
    assert torch.equal(found, expected)


def test_names_are_those_of_the_layers_attention() -> None:
    assert scale_names(7) == ("model.layers.7.self_attn.k_scale", "model.layers.7.self_attn.v_scale")
    assert scale_shapes(None, 3) == {}
    assert set(scale_shapes(KVScheme(kind="int8"), 2).values()) == {(1,)}


def test_without_a_scheme_nothing_changes(tiny_llama: Path) -> None:
    checkpoint = Checkpoint.open(tiny_llama)
    plan = make_plan(checkpoint, parse_recipe('[scheme]\n"*" = "keep"\n', "recipe"))
    assert checkpoint.kv_scheme is plan.kv_scheme is None
    assert "quantization_config" not in artifact_config(checkpoint.config, plan)


Change = Callable[[dict[str, torch.Tensor]], object]
NAME = scale_names(1)[1]
WRONG_SCALES: list[tuple[str, Change, str]] = [
    ("NaN", lambda t: t[NAME].fill_(torch.nan), f"{WEIGHTS}: {NAME} is nan; a scale is finite and above 0"),
    ("infinity", lambda t: t[NAME].fill_(torch.inf), f"{NAME} is inf"),
    ("zero", lambda t: t[NAME].fill_(0.0), f"{NAME} is 0.0"),
    ("negative", lambda t: t[NAME].fill_(-1.0), f"{NAME} is -1.0"),
    ("missing", lambda t: t.pop(NAME), f"tensor '{NAME}' is missing (1 in all)"),
    ("two of them", lambda t: t.update({NAME: torch.ones(2)}), "has shape [2], config.json asks for [1]"),
    ("no dimension", lambda t: t.update({NAME: torch.tensor(1.0)}), "has shape [], config.json asks for [1]"),
    (
        "integers",
        lambda t: t.update({NAME: torch.ones(1, dtype=torch.int32)}),
        "is I32, config.json asks for a floating",
    ),
    (
        "of a layer that is not there",
        lambda t: t.update({scale_names(2)[0]: torch.ones(1)}),
        "model.layers.2.self_attn.k_scale' is not one of this LlamaForCausalLM's",
    ),
]


@pytest.fixture(scope="module")
def original(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return calibrated(tiny_llama, tmp_path_factory.mktemp("calibrated") / "fp8", "fp8")


@pytest.mark.parametrize(("change", "message"), [case[1:] for case in WRONG_SCALES], ids=[c[0] for c in WRONG_SCALES])
def test_wrong_scales_are_refused_in_one_line(original: Path, change: Change, message: str, tmp_path: Path) -> None:
    path = tmp_path / "model"
    shutil.copytree(original, path)
    tensors = load_file(path / WEIGHTS)
    change(tensors)
    save_file(tensors, path / WEIGHTS)
    with pytest.raises(ArtifactError) as caught:
        load_decoder(Checkpoint.open(path), device=CPU, dtype=torch.float32, kv_dtype="fp8")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


PLAIN = KVScheme(kind="fp8").to_config()


@pytest.mark.parametrize(
    "scheme",
    [
        {"num_bits": 8},
        PLAIN | {"num_bits": 4},
        PLAIN | {"num_bits": "8"},
        PLAIN | {"dynamic": True},
        PLAIN | {"dynamic": "local"},
        PLAIN | {"symmetric": False},
        PLAIN | {"strategy": "attn_head"},
        PLAIN | {"type": "bool"},
        PLAIN | {"group_size": 32},
        PLAIN | {"rotated": True},
        {},
        [PLAIN],
        "fp8",
        True,
    ],
    ids=str,
)
def test_another_scheme_is_refused(original: Path, scheme: object, tmp_path: Path) -> None:
    path = tmp_path / "model"
    shutil.copytree(original, path)
    config = json.loads((path / "config.json").read_text())
    config["quantization_config"]["kv_cache_scheme"] = scheme
    (path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ArtifactError, match=r"config\.json: quantization_config\.kv_cache_scheme: "):
        Checkpoint.open(path)


def test_scales_that_config_does_not_announce_are_refused(original: Path, tmp_path: Path) -> None:
    path = tmp_path / "model"
    shutil.copytree(original, path)
    config = json.loads((path / "config.json").read_text())
    del config["quantization_config"]["kv_cache_scheme"]
    (path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ArtifactError, match="k_scale' is not one of this LlamaForCausalLM's"):
        Checkpoint.open(path)


def test_a_dense_copy_has_no_scales(original: Path, tmp_path: Path) -> None:
    convert_to_dense(original, tmp_path / "dense")
    dense = Checkpoint.open(tmp_path / "dense")
    assert dense.kv_scheme is None
    assert not any(name.endswith(("k_scale", "v_scale")) for name in dense.names())
