"""Directories of zero points, blocks and static activations that lie: config.json, headers, and values."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from pressd.compress import compress, plan, press_block
from pressd.compress.press_linear import press_linear
from pressd.runtime.artifact.errors import ArtifactError
from pressd.runtime.artifact.reader import Checkpoint
from pressd.runtime.artifact.specs import LinearSpec

WEIGHTS = "model.safetensors"
DOWN = "model.layers.0.mlp.down_proj"
ASYM, BLOCK, INT8, FP8 = "w4a16g32-asym", "fp8-block", "w8a8-static", "fp8-static"
# What is put where in config.json's one group, and what is said of it.
WORDS: list[tuple[str, str, object, str]] = [
    (ASYM, "weights.dynamic", True, "only static weights"),
    (ASYM, "weights.symmetric", None, "only static weights"),
    (ASYM, "weights.symmetric", True, "weight_zero_point' is not one of this"),
    (ASYM, "weights.type", "float", "floats are supported with 8 bits and one scale per channel or block only"),
    (ASYM, "weights.scale", 1, "only static weights"),
    (ASYM, "input_activations", "int8 in groups", "zero points meet 16-bit activations only"),
    (BLOCK, "weights.block_structure", [128, 64], "strategy 'block' with block_structure [128, 64]"),
    (BLOCK, "weights.block_structure", None, "strategy 'block' with group_size None"),
    (BLOCK, "weights.strategy", "channel", "strategy 'channel' with block_structure [128, 128]"),
    (BLOCK, "weights.group_size", 128, "strategy 'block'"),
    (BLOCK, "weights.type", "int", "strategy 'block'"),
    (BLOCK, "weights.symmetric", False, "floats are supported with 8 bits"),
    (BLOCK, "input_activations.group_size", 64, "quantised activations are supported as 8 bits of the weights' type"),
    (BLOCK, "input_activations.strategy", "token", "quantised activations are supported"),
    (BLOCK, "input_activations", None, "weights in blocks are supported with dynamic activations only"),
    (BLOCK, "input_activations", "static float", "weights in blocks are supported with dynamic activations only"),
    (INT8, "input_activations.symmetric", False, "quantised activations are supported"),
    (INT8, "input_activations.strategy", "token", "quantised activations are supported"),
    (INT8, "input_activations.dynamic", 0, "quantised activations are supported"),
    (INT8, "input_activations.dynamic", "local", "quantised activations are supported"),
    (INT8, "input_activations.num_bits", 4, "quantised activations are supported"),
    (INT8, "input_activations.type", "float", "quantised activations are supported"),
    (INT8, "input_activations", None, "format 'int-quantized' is not 'pack-quantized', how w8a16 is stored"),
    (INT8, "input_activations", "dynamic int8", "input_scale' is not one of this"),
    (INT8, "weights.num_bits", 4, "activations of one scale meet 8-bit weights of one per row; write w8a8-static"),
    (INT8, "weights.strategy", "tensor", "strategy 'tensor'"),
    (FP8, "input_activations.block_structure", [1, 128], "quantised activations are supported"),
    (FP8, "input_activations", None, "input_scale' is not one of this"),
]
ACTIVATIONS = {
    "dynamic int8": {"num_bits": 8, "type": "int", "symmetric": True, "dynamic": True, "strategy": "token"},
    "int8 in groups": {
        "num_bits": 8,
        "type": "int",
        "symmetric": True,
        "dynamic": True,
        "strategy": "group",
        "group_size": 32,
    },
    "static float": {"num_bits": 8, "type": "float", "symmetric": True, "dynamic": False, "strategy": "tensor"},
}
Change = Callable[[torch.Tensor], torch.Tensor | None]
# Which tensor becomes what (None: it is gone), and what is said of it when headers are read.
HEADERS: list[tuple[str, str, Change, str]] = [
    (ASYM, "weight_zero_point", lambda _: None, f"tensor '{DOWN}.weight_zero_point' is missing"),
    (ASYM, "weight_zero_point", lambda _: torch.zeros(128, 8, dtype=torch.int32), "has shape [128, 8]"),
    (ASYM, "weight_zero_point", lambda _: torch.zeros(8, 16, dtype=torch.int32), "config.json asks for [16, 8]"),
    (ASYM, "weight_zero_point", lambda _: torch.zeros(16, 8, dtype=torch.uint8), "is U8"),
    (ASYM, "weight_zero_point", lambda _: torch.zeros(16, 8), "is F32, config.json asks for torch.int32"),
    (BLOCK, "weight_scale", lambda _: torch.ones(128, 1), "has shape [128, 1], config.json asks for [1, 2]"),
    (BLOCK, "weight", lambda w: w.view(torch.int8), "is I8, config.json asks for torch.float8_e4m3fn"),
    (INT8, "input_scale", lambda _: None, f"tensor '{DOWN}.input_scale' is missing"),
    (INT8, "input_scale", lambda _: torch.ones(128, 1), "has shape [128, 1], config.json asks for [1]"),
    (INT8, "input_scale", lambda _: torch.tensor(1.0), "has shape [], config.json asks for [1]"),
    (FP8, "input_scale", lambda _: torch.ones(1, dtype=torch.int8), "is I8, config.json asks for a floating-point"),
]
# Values, which are looked at when they are loaded.
VALUES: list[tuple[str, str, float, str]] = [
    (ASYM, "weight_scale", float("nan"), "holds NaN or infinity"),
    (BLOCK, "weight_scale", float("inf"), "holds NaN or infinity"),
    *(
        (scheme, "input_scale", value, f"is {value}, not a scale; press the source again")
        for scheme in (INT8, FP8)
        for value in (float("nan"), float("inf"), 0.0, -0.5)
    ),
]


@pytest.fixture(scope="module")
def pressed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A Llama with one layer of 256 intermediate channels in each scheme, as a foreign directory."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("special")
    config = LlamaConfig(
        vocab_size=97,
        hidden_size=128,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=256,
        max_position_embeddings=64,
        pad_token_id=None,
    )
    LlamaForCausalLM(config).save_pretrained(folder / "source")

    def with_scale(
        original: torch.Tensor, weight: torch.Tensor, spec: LinearSpec
    ) -> tuple[dict[str, torch.Tensor], tuple[float, float]]:
        return press_linear(original, weight, spec, input_scale=torch.ones(1))

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(plan, "check_passes", lambda recipe, groups: None)
        monkeypatch.setattr(press_block, "press_linear", with_scale)
        for scheme in (ASYM, BLOCK, INT8, FP8):
            compress(folder / "source", scheme, folder / scheme)
            shutil.rmtree(folder / scheme / "pressd")
    return {scheme: folder / scheme for scheme in (ASYM, BLOCK, INT8, FP8)}


def refusal(path: Path) -> str:
    with pytest.raises(ArtifactError) as caught:
        Checkpoint.open(path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(("scheme", "place", "value", "message"), WORDS)
def test_words_that_no_kernel_computes_are_refused(
    pressed: dict[str, Path], scheme: str, place: str, value: object, message: str, tmp_path: Path
) -> None:
    shutil.copytree(pressed[scheme], tmp_path / "model")
    config = json.loads((tmp_path / "model/config.json").read_text())
    *parents, last = place.split(".")
    inside = config["quantization_config"]["config_groups"]["group_0"]
    for parent in parents:
        inside = inside[parent]
    inside[last] = ACTIVATIONS.get(value, value) if isinstance(value, str) else value
    (tmp_path / "model/config.json").write_text(json.dumps(config))
    assert message in refusal(tmp_path / "model")


@pytest.mark.parametrize(("scheme", "suffix", "change", "message"), HEADERS)
def test_headers_that_disagree_are_refused(
    pressed: dict[str, Path], scheme: str, suffix: str, change: Change, message: str, tmp_path: Path
) -> None:
    shutil.copytree(pressed[scheme], tmp_path / "model")
    tensors = load_file(tmp_path / "model" / WEIGHTS)
    changed = change(tensors.pop(f"{DOWN}.{suffix}"))
    tensors |= {} if changed is None else {f"{DOWN}.{suffix}": changed}
    save_file(tensors, tmp_path / "model" / WEIGHTS)
    assert message in refusal(tmp_path / "model")


@pytest.mark.parametrize(("scheme", "suffix", "value", "message"), VALUES)
def test_values_that_are_no_scales_are_reported(
    pressed: dict[str, Path], scheme: str, suffix: str, value: float, message: str, tmp_path: Path
) -> None:
    shutil.copytree(pressed[scheme], tmp_path / "model")
    tensors = load_file(tmp_path / "model" / WEIGHTS)
    tensors[f"{DOWN}.{suffix}"].view(-1)[0] = value
    save_file(tensors, tmp_path / "model" / WEIGHTS)
    checkpoint = Checkpoint.open(tmp_path / "model")
    checkpoint.linear_tensors("model.layers.0.mlp.up_proj")
    with pytest.raises(ArtifactError) as caught:
        checkpoint.linear_tensors(DOWN)
    assert f"{WEIGHTS}: {DOWN}.{suffix} {message}" in str(caught.value)
