"""Our files against compressed-tensors and transformers: the same bits, read by them unchanged, and theirs by us."""

from pathlib import Path
from typing import Any

import pytest
import torch

from pressd.compress import compress
from pressd.compress.encoding import decode
from pressd.compress.recipe import parse_recipe
from pressd.runtime.artifact.reader import Checkpoint
from pressd.runtime.artifact.schemes import Scheme, parse_scheme
from pressd.runtime.artifact.tokenizer import load_tokenizer
from pressd.runtime.kernels.fp8 import format as fp8
from pressd.runtime.kernels.int8 import format as int8
from pressd.runtime.kernels.integer_codes import quantize
from pressd.runtime.kernels.packed_int import format as packed_int
from pressd.runtime.models import load_decoder

SCHEMES = [
    *("w8a8", "w4a8", "w4a8g32", "w3a8g32", "w8a8g32"),
    *(f"w{bits}a16g32" for bits in range(2, 9)),
    *("w2a16", "w3a16", "w4a16", "w5a16", "w8a16"),
]
FLOATS = ["fp8", "fp8a16"]
# Schemes and recipes that compressed-tensors has no words for.
OURS = [
    '"qkv" = "sparse24:w4a16g32"\n"down" = "sparse24:w8a16"',
    '"*" = "sparse24:bf16"',
    '"*" = "lowrank16:w8a8"',
    '"*" = "lowrank16:bf16"',
    '"*" = "w2a16g32+residual8"',
    '"embed" = "w8a16"',
    '"*" = "w4a16g32"\n"embed" = "w4a16g32"\n"lm_head" = "w8a16"',
    '"layers.1.down" = "w3a16g32+residual1"',
]
LAYER = "model.layers.1."
PYLM = Path(__file__).parents[2] / "examples" / "pylm"


@pytest.fixture(scope="module", params=["tied", "untied"])
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bfloat16 Llama that transformers wrote; 160 columns in down_proj, which 64 and 128 do not divide."""
    fixture = "tiny_llama_tied" if request.param == "tied" else "tiny_llama"
    path = tmp_path_factory.mktemp(request.param)
    _load(request.getfixturevalue(fixture), dtype=torch.bfloat16).save_pretrained(path)
    return path


@pytest.mark.parametrize("scheme", SCHEMES + FLOATS)
def test_transformers_loads_what_we_write(source: Path, scheme: str, tmp_path: Path) -> None:
    compress(source, scheme, tmp_path / "out")
    _assert_same_weights(Checkpoint.open(tmp_path / "out"), _load(tmp_path / "out"))


@pytest.mark.parametrize(("scheme", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_transformers_loads_dense_artifacts(source: Path, scheme: str, dtype: torch.dtype, tmp_path: Path) -> None:
    compress(source, scheme, tmp_path / "out")
    model = _load(tmp_path / "out")
    assert model.dtype == dtype
    original = _load(source).state_dict()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, original[name].to(dtype)), name


@pytest.mark.parametrize(
    "rules",
    [
        '"*" = "w4a16g32"\n"down" = "w8a16"',  # one format, two groups
        '"*" = "w4a16g32"\n"gate_up" = "w8a8"',  # two formats
        '"*" = "w3a16"\n"layers.1.*" = "keep"\n"layers.0.o" = "w8a8"',  # linears that stay dense
        '"layers.0.qkv" = "w6a16g32"',
        '"lm_head" = "w8a16"',  # untied where the source ties it
        '"*" = "w4a16g32"\n"lm_head" = "w4a16g32"',  # all there is
        '"*" = "w4a8g32"\n"lm_head" = "w8a8"\n"layers.0.o" = "keep"',
    ],
)
def test_transformers_loads_mixed_schemes(source: Path, rules: str, tmp_path: Path) -> None:
    compress(source, parse_recipe(f"[scheme]\n{rules}\n", "recipe"), tmp_path / "out")
    _assert_same_weights(Checkpoint.open(tmp_path / "out"), _load(tmp_path / "out"))


def test_transformers_loads_several_files(source: Path, tmp_path: Path) -> None:
    compress(source, "w4a16g32", tmp_path / "out", shard_bytes=20_000)
    ours = Checkpoint.open(tmp_path / "out")
    assert len(ours.weight_files) > 2
    _assert_same_weights(ours, _load(tmp_path / "out"))


@pytest.mark.parametrize("scheme", ["bf16", "w8a8", "w4a16g128"])
def test_transformers_loads_the_example_model_pressed(scheme: str, tmp_path: Path) -> None:
    compress(PYLM, scheme, tmp_path / "out")
    _assert_same_weights(Checkpoint.open(tmp_path / "out"), _load(tmp_path / "out"))


@pytest.mark.parametrize("scheme", ["w4a16g32", "w3a16", "fp8a16"])
def test_transformers_computes_the_same_logits(tiny_llama: Path, scheme: str, tmp_path: Path) -> None:
    compress(tiny_llama, scheme, tmp_path / "out")
    ids = torch.randint(0, 97, (2, 33), generator=torch.Generator().manual_seed(3))
    theirs = _load(tmp_path / "out")(ids).logits
    decoder = load_decoder(
        Checkpoint.open(tmp_path / "out"), device=torch.device("cpu"), dtype=torch.float32, prefer="reference"
    )
    # The same products in another order: the bound of every family's conformance test.
    assert (decoder.full_logits(ids) - theirs).abs().max() < 1e-4 * theirs.abs().max()


@pytest.mark.parametrize("scheme", ["w8a8", "w4a8", "w4a8g32"])
def test_transformers_rounds_activations_alike(tiny_llama: Path, scheme: str, tmp_path: Path) -> None:
    compress(tiny_llama, scheme, tmp_path / "out")
    checkpoint = Checkpoint.open(tmp_path / "out")
    model = _load(tmp_path / "out")
    model(torch.zeros(1, 2, dtype=torch.int64))
    prefix = f"{LAYER}mlp.down_proj"
    # The largest value of a row, or of each group of 32, is 127.5: that makes its scale 1, and no other value is near
    # the middle between two codes: no rounding error moves a code. Two float32 sums of 160 products differ by at most
    # 2 * 160 * 2^-24 * sum |product|.
    x = torch.randint(-120, 120, (5, 160), generator=torch.Generator().manual_seed(3)) + 0.25
    x[:, 7::32] = 127.5
    x[2, 64:96] /= 4  # a group with a scale of its own
    step = torch.ones(5, 160)
    step[2, 64:96] /= 4 if scheme.endswith("g32") else 1
    weight = decode(checkpoint.linear_tensors(prefix), checkpoint.linear(prefix), torch.float32)
    rounded = (x / step).round().clamp(-128, 127) * step
    ours = rounded @ weight.T
    theirs = model.get_submodule(prefix)(x)
    assert bool(((ours - theirs).abs() <= 160 * 2**-23 * (x.abs() @ weight.abs().T)).all())


@pytest.mark.parametrize("scheme", SCHEMES + FLOATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_codes_and_scales_are_theirs(scheme: str, dtype: torch.dtype) -> None:
    parsed = parse_scheme(scheme)
    weight = torch.randn(48, 160, generator=torch.Generator().manual_seed(parsed.bits)).to(dtype)
    weight[3] = 0
    is_float = parsed.storage == fp8.NAME
    codes, scale = fp8.quantize(weight) if is_float else quantize(weight, parsed.bits, parsed.group_size)
    their_scale = _their_scale(weight, parsed)
    assert torch.equal(scale, their_scale)
    # In float32, as their GPU kernel divides; on a CPU they divide in the weight's own type, and round twice.
    theirs = _their_tensors(weight.float(), their_scale, parsed)
    if is_float:
        ours = fp8.encode(codes, scale)
    else:
        ours = int8.encode(codes, scale) if parsed.storage == "int8" else packed_int.encode(codes, scale, parsed.bits)
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]), name
        assert tensor.dtype == theirs[name].dtype, name


@pytest.mark.parametrize("rules", OURS)
def test_transformers_refuses_what_it_cannot_read(source: Path, rules: str, tmp_path: Path) -> None:
    from transformers import AutoConfig

    manifest = compress(source, parse_recipe(f"[scheme]\n{rules}\n", "recipe"), tmp_path / "out")
    assert manifest.loads_in["transformers"].startswith("refuses")
    for load in (_load, AutoConfig.from_pretrained):
        with pytest.raises(ValueError, match="model type `pressd`"):
            load(tmp_path / "out")
    assert Checkpoint.open(tmp_path / "out").artifact_id == manifest.id


def test_the_tokenizer_of_what_they_refuse_is_the_sources(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    from transformers import AutoTokenizer

    compress(PYLM, "w8a16+residual1", tmp_path / "out")
    capfd.readouterr()
    ours, theirs = load_tokenizer(tmp_path / "out"), AutoTokenizer.from_pretrained(PYLM)
    assert capfd.readouterr().err == ""  # no warning of a type that is not known
    assert type(ours) is type(theirs)
    text = "def é(x):\n\treturn x  # 漢"
    assert ours(text)["input_ids"] == theirs(text)["input_ids"]


@pytest.mark.parametrize("scheme", ["w8a8", "w3a16g32", "w4a16g32", "w4a16", "w8a16", *FLOATS])
def test_we_read_what_they_write(tiny_llama: Path, scheme: str, tmp_path: Path) -> None:
    _press_with_their_tools(tiny_llama, parse_scheme(scheme), tmp_path)
    checkpoint = Checkpoint.open(tmp_path)
    spec = checkpoint.linear(f"{LAYER}mlp.down_proj")
    parsed = parse_scheme(scheme)
    assert spec == parsed.spec((64, 160))
    _assert_same_weights(checkpoint, _load(tmp_path))


@pytest.mark.parametrize("scheme", ["w4a8", "w4a8g32"])
def test_four_bits_in_a_byte_each_are_refused(tiny_llama: Path, scheme: str, tmp_path: Path) -> None:
    """Left to itself, compressed-tensors stores every weight that meets int8 activations as int8."""
    _press_with_their_tools(tiny_llama, parse_scheme(scheme), tmp_path)
    with pytest.raises(ValueError, match=rf"format 'int-quantized' is not 'pack-quantized', how {scheme} is stored"):
        Checkpoint.open(tmp_path)


def test_a_file_of_before_the_dense_stream_is_refused(tiny_llama: Path, tmp_path: Path) -> None:
    """Until 0.17, 3-bit codes were stored ten to a word under the same format name."""
    from safetensors.torch import load_file, save_file

    compress(tiny_llama, "w3a16g32", tmp_path / "out")
    (tmp_path / "out/pressd/manifest.json").unlink()
    for left in (tmp_path / "out/pressd").iterdir():
        left.unlink()
    (tmp_path / "out/pressd").rmdir()
    weights = load_file(tmp_path / "out/model.safetensors")
    name = f"{LAYER}mlp.down_proj.weight_packed"
    weights[name] = torch.zeros(64, 16, dtype=torch.int32)
    save_file(weights, tmp_path / "out/model.safetensors")
    with pytest.raises(
        ValueError, match=r"down_proj.weight_packed' has shape \[64, 16\], config.json asks for \[64, 15\]"
    ):
        Checkpoint.open(tmp_path / "out")


def _load(path: Path, **options: Any) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path, **options).eval()


def _assert_same_weights(checkpoint: Checkpoint, model: Any) -> None:
    """Every linear decodes to the weight that transformers computes with, bit for bit."""
    with torch.no_grad():
        model(torch.zeros(1, 2, dtype=torch.int64))  # their weights are decoded by the first forward
    for linear in checkpoint.model.linears():
        spec = checkpoint.linear(linear.prefix)
        ours = decode(checkpoint.linear_tensors(linear.prefix), spec, checkpoint.torch_dtype)
        assert torch.equal(ours, model.get_submodule(linear.prefix).weight), linear.prefix
    for name in checkpoint.model.others():
        assert torch.equal(checkpoint.tensor(name), model.get_parameter(name)), name


def _kind(scheme: Scheme) -> str:
    return "float" if scheme.storage == fp8.NAME else "int"


def _their_arguments(scheme: Scheme) -> Any:
    from compressed_tensors.quantization import QuantizationArgs

    strategy = "channel" if scheme.group_size is None else "group"
    return QuantizationArgs(num_bits=scheme.bits, type=_kind(scheme), strategy=strategy, group_size=scheme.group_size)


def _their_scheme(scheme: Scheme) -> Any:
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    strategy = "token" if scheme.group_size is None else "group"
    activations = QuantizationArgs(
        num_bits=8, type=_kind(scheme), strategy=strategy, group_size=scheme.group_size, dynamic=True
    )
    return QuantizationScheme(
        targets=["Linear"],
        weights=_their_arguments(scheme),
        input_activations=activations if scheme.activation_bits == 8 else None,
    )


def _their_scale(weight: torch.Tensor, scheme: Scheme) -> torch.Tensor:
    from compressed_tensors.quantization.utils import calculate_qparams

    groups = weight.view(len(weight), -1, scheme.group_size or weight.size(1))
    scale, _ = calculate_qparams(groups.amin(-1), groups.amax(-1), _their_arguments(scheme))
    return scale


def _their_tensors(weight: torch.Tensor, scale: torch.Tensor, scheme: Scheme) -> dict[str, torch.Tensor]:
    from compressed_tensors.compressors import BaseCompressor

    name = {"int8": "int-quantized", "fp8": "float-quantized"}.get(scheme.storage, "pack-quantized")
    compressor = BaseCompressor.get_value_from_registry(name)
    return compressor.compress({"weight": weight, "weight_scale": scale}, _their_scheme(scheme))


def _press_with_their_tools(path: Path, scheme: Scheme, out: Path) -> None:
    """What llm-compressor does with a model, here with rounding to nearest: configure, set scales, compress, save."""
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config

    model = _load(path)
    config = QuantizationConfig(config_groups={"group_0": _their_scheme(scheme)}, ignore=["lm_head"])
    apply_quantization_config(model, config, show_progress=False)
    for module in model.modules():
        if hasattr(module, "weight_scale"):
            module.weight_scale.data = _their_scale(module.weight.data, scheme)
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    model.save_pretrained(out)
    compressor.update_config(str(out))
