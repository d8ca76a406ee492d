"""Zero points, blocks and static activations against compressed-tensors and transformers: the same bits, both ways."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from pressd.compress import compress, plan, press_block
from pressd.compress.encoding import decode, encode
from pressd.compress.passes.rtn import round_to_nearest
from pressd.compress.plan import make_plan
from pressd.compress.press_linear import press_linear
from pressd.compress.quantization_config import artifact_config, readers
from pressd.compress.recipe import parse_recipe, recipe_of_scheme
from pressd.runtime.artifact.quantization import read_quantization
from pressd.runtime.artifact.reader import Checkpoint
from pressd.runtime.artifact.schemes import Scheme, parse_scheme
from pressd.runtime.artifact.specs import LinearSpec, Packed
from pressd.runtime.kernels.fp8 import reference as fp8
from pressd.runtime.kernels.integer_codes import quantize_activations_by
from pressd.runtime.layers.linear import Linear
from pressd.runtime.models import load_decoder

CPU = torch.device("cpu")
ASYMMETRIC = [*(f"w{bits}a16g32-asym" for bits in range(2, 9)), *(f"w{bits}a16-asym" for bits in (2, 3, 4, 8))]
OTHERS = ["fp8-block", "w8a8-static", "fp8-static"]
DOWN = "model.layers.1.mlp.down_proj"
INPUT_SCALE = 0.03125


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bfloat16 Llama whose inputs 128 divides; keys and values have 64 rows, half a block."""
    return _save_llama(tmp_path_factory.mktemp("models") / "blocks", hidden_size=128, intermediate_size=384)


@pytest.fixture(scope="module")
def odd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One whose queries, keys, values and gates have 40, 20, 20 and 90 rows: no whole words of zero points."""
    return _save_llama(tmp_path_factory.mktemp("models") / "odd", hidden_size=60, intermediate_size=90, head_dim=10)


@pytest.fixture(autouse=True)
def calibrated(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stand in for calibration: one scale of activations that is exact in every type."""

    def with_scale(
        original: torch.Tensor, weight: torch.Tensor, spec: LinearSpec
    ) -> tuple[dict[str, torch.Tensor], tuple[float, float]]:
        return press_linear(original, weight, spec, input_scale=torch.full((1,), INPUT_SCALE, dtype=weight.dtype))

    monkeypatch.setattr(plan, "check_passes", lambda recipe, groups: None)
    monkeypatch.setattr(press_block, "press_linear", with_scale)


@pytest.mark.parametrize("scheme", ASYMMETRIC + OTHERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_codes_scales_and_zero_points_are_theirs(scheme: str, dtype: torch.dtype) -> None:
    parsed = parse_scheme(scheme)
    shape = (300, 256) if parsed.block_size else (50, 160)  # 50 zero points of 3 bits end within a word
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(parsed.bits)).to(dtype)
    weight[3] = 0
    weight[4] = weight[4].abs()
    weight[5] = -weight[5].abs() - 1
    weight[6, ::2] = 0.125
    spec = parsed.spec(shape)
    assert isinstance(spec, Packed)
    rounded = round_to_nearest(weight, spec)
    input_scale = torch.full((1,), INPUT_SCALE, dtype=dtype) if parsed.static_activations else None
    ours = encode(rounded.codes, rounded.scale, spec, zero_point=rounded.zero_point, input_scale=input_scale)
    assert {suffix: (tensor.dtype, tuple(tensor.shape)) for suffix, tensor in ours.items()} == spec.layout(dtype)
    scale, zero = _their_parameters(weight, parsed)
    assert torch.equal(rounded.scale, scale)
    if rounded.zero_point is not None:
        assert torch.equal(rounded.zero_point, zero)
    # In float32, as their GPU kernel divides; on a CPU they divide in the weight's own type, and round twice.
    state = {"weight": weight.float(), "weight_scale": scale, "weight_zero_point": zero}
    state |= {} if input_scale is None else {"input_scale": input_scale}
    theirs = _their_compressor(parsed).compress(state, _their_scheme(parsed))
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype, name
        assert torch.equal(_bits(tensor), _bits(theirs[name])), name
    decoded = _their_compressor(parsed).decompress(ours, _their_scheme(parsed))["weight"]
    assert torch.equal(decode(ours, spec, dtype), decoded)
    rows = slice(7, 21)
    assert torch.equal(rounded.decoded(rows, spec, dtype), decoded[rows])


@pytest.mark.parametrize("rows", [0, 1, 7])
@pytest.mark.parametrize("scheme", OTHERS)
def test_activations_are_rounded_as_theirs(scheme: str, rows: int) -> None:
    from compressed_tensors.quantization.lifecycle.forward import fake_quantize
    from compressed_tensors.quantization.utils import compute_dynamic_scales_and_zp

    parsed = parse_scheme(scheme)
    x = torch.randn(rows, 256, generator=torch.Generator().manual_seed(rows)) * 4
    x[:, 5::64] *= 30
    x[:, 1] = 1e6  # beyond every code
    scale = torch.tensor([INPUT_SCALE], dtype=torch.bfloat16)
    arguments = _their_scheme(parsed).input_activations
    if parsed.block_size:
        codes, found = fp8.quantize_activations(x, parsed.block_size)
        seen = fp8.disk.dequantize(codes, found, torch.float32)
        if rows:
            their_scale, zero = compute_dynamic_scales_and_zp(x.unsqueeze(0), arguments, torch.nn.Module())
            assert torch.equal(found, their_scale[0])
            assert torch.equal(seen, fake_quantize(x.unsqueeze(0), their_scale, zero, arguments)[0])
        return
    by = quantize_activations_by if scheme.startswith("w8a8") else fp8.quantize_activations_by
    codes, found = by(x, scale)
    assert torch.equal(codes.float() * found, fake_quantize(x, scale.float(), None, arguments))


@pytest.mark.parametrize("scheme", ["w4a16g32-asym", "w2a16g32-asym", "w3a16-asym", "w8a16-asym", *OTHERS])
def test_transformers_loads_what_we_write(source: Path, scheme: str, tmp_path: Path) -> None:
    manifest = compress(source, scheme, tmp_path / "out")
    checkpoint = Checkpoint.open(tmp_path / "out")
    if "asym" not in scheme:
        assert manifest.loads_in["transformers"] == "native"
        _assert_same_weights(checkpoint, _load(tmp_path / "out"))
    else:
        assert manifest.loads_in["transformers"] == "with CompressedTensorsConfig(dequantize=True)"
    _assert_same_weights(checkpoint, _load(tmp_path / "out", dequantize=True))


def test_transformers_needs_to_be_told_of_zero_points(source: Path, tmp_path: Path) -> None:
    """What the manifest warns of; once this fails, it need not."""
    compress(source, "w4a16g32-asym", tmp_path / "out")
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        _load(tmp_path / "out")


@pytest.mark.parametrize(
    "rules", ['"*" = "w4a16g32-asym"\n"down" = "w8a16"', '"qkv" = "w4a16g32-asym"\n"down" = "w3a16-asym"']
)
def test_zero_points_beside_another_scheme_are_ours_alone(source: Path, rules: str, tmp_path: Path) -> None:
    manifest = compress(source, parse_recipe(f"[scheme]\n{rules}\n", "recipe"), tmp_path / "out")
    assert manifest.loads_in["transformers"] == "refuses; convert it to dense"
    with pytest.raises(ValueError, match="model type `pressd`"):
        _load(tmp_path / "out")
    assert Checkpoint.open(tmp_path / "out").artifact_id == manifest.id


@pytest.mark.parametrize("scheme", ["w4a16g32-asym", "w3a16-asym", *OTHERS])
def test_we_read_what_they_write(source: Path, scheme: str, tmp_path: Path) -> None:
    _press_with_their_tools(source, parse_scheme(scheme), tmp_path)
    checkpoint = Checkpoint.open(tmp_path)
    assert checkpoint.linear(DOWN) == parse_scheme(scheme).spec((128, 384))
    _assert_same_weights(checkpoint, _load(tmp_path, dequantize=True))


@pytest.mark.parametrize("scheme", ASYMMETRIC + OTHERS)
def test_config_json_says_what_is_read_from_it(source: Path, scheme: str) -> None:
    checkpoint = Checkpoint.open(source)
    plan = make_plan(checkpoint, recipe_of_scheme(scheme))
    config = json.loads(json.dumps(artifact_config(checkpoint.config, plan)))
    stored = read_quantization(config, checkpoint.model)
    assert stored.scheme_of(DOWN) == parse_scheme(scheme)
    assert stored.scheme_of("lm_head") is None
    assert (readers(plan)["transformers"] == "native") == ("asym" not in scheme)


@pytest.mark.parametrize("scheme", ["w8a8-static", "fp8-static", "fp8-block"])
def test_transformers_rounds_activations_alike(source: Path, scheme: str, tmp_path: Path) -> None:
    compress(source, scheme, tmp_path / "out")
    checkpoint = Checkpoint.open(tmp_path / "out")
    model = _load(tmp_path / "out", dtype=torch.float32)
    model(torch.zeros(1, 2, dtype=torch.int64))
    x = torch.randn(5, 384, generator=torch.Generator().manual_seed(3)) * 2
    x[:, 7] = 1000.0  # beyond every code of what is static
    decoder = load_decoder(checkpoint, device=CPU, dtype=torch.float32, prefer="reference")
    with torch.no_grad():
        theirs = model.get_submodule(DOWN)(x.unsqueeze(0))[0]
    ours = decoder.blocks[1].mlp.down(x)
    weight = decode(checkpoint.linear_tensors(DOWN), checkpoint.linear(DOWN), torch.float32)
    # The codes are the same, and so are the weights: two float32 sums of 384 products differ by at most
    # 2 * 384 * 2^-24 * sum |product|, and scales that multiply sums instead of products round thrice more.
    assert bool(((ours - theirs).abs() <= 387 * 2**-23 * (x.abs() @ weight.abs().T)).all())


def test_blocks_answer_alike_but_for_codes_that_flip(source: Path, tmp_path: Path) -> None:
    compress(source, "fp8-block", tmp_path / "out")
    ids = torch.randint(0, 97, (2, 33), generator=torch.Generator().manual_seed(3))
    fast, reference, dense = (
        load_decoder(Checkpoint.open(path), device=CPU, dtype=torch.float32, prefer=prefer).full_logits(ids)
        for path, prefer in ((tmp_path / "out", "fast"), (tmp_path / "out", "reference"), (source, "reference"))
    )
    # A sum that is added up in another order may move an activation to the next code: a part of them by what rounding
    # moved all of them.
    assert (fast - reference).norm() < 0.5 * (dense - reference).norm()
    assert (dense - reference).norm() < 0.5 * dense.norm()


@pytest.mark.parametrize("scheme", ["w4a16g32-asym", "w2a16g32-asym"])
def test_fast_and_reference_answer_alike(source: Path, scheme: str, tmp_path: Path) -> None:
    compress(source, scheme, tmp_path / "out")
    checkpoint = Checkpoint.open(tmp_path / "out")
    ids = torch.randint(0, 97, (2, 33), generator=torch.Generator().manual_seed(3))
    reference = load_decoder(checkpoint, device=CPU, dtype=torch.float32, prefer="reference").full_logits(ids)
    fast = load_decoder(checkpoint, device=CPU, dtype=torch.float32, prefer="fast").full_logits(ids)
    # The same products in another order: the bound of every family's conformance test.
    assert (fast - reference).abs().max() < 1e-4 * reference.abs().max()


@pytest.mark.parametrize("prefer", ["fast", "reference"])
@pytest.mark.parametrize("scheme", ["w3a16-asym", "w4a16-asym", "w2a16-asym", "w8a8-static", "fp8-static"])
def test_odd_members_are_fused(odd: Path, scheme: str, prefer: Any, tmp_path: Path) -> None:
    compress(odd, scheme, tmp_path / "out")
    decoder = _same_products(tmp_path / "out", scheme, prefer)
    assert decoder.unfused_groups == 0
    assert all(isinstance(block.attention.qkv, Linear) for block in decoder.blocks)


@pytest.mark.parametrize("prefer", ["fast", "reference"])
@pytest.mark.parametrize(
    "scheme", ["w4a16g32-asym", "w2a16g64-asym", "sparse24:w5a16g32-asym", "fp8-block", "w8a8-static"]
)
def test_members_are_fused_where_scales_keep_their_places(
    source: Path, scheme: str, prefer: Any, tmp_path: Path
) -> None:
    compress(source, scheme, tmp_path / "out")
    decoder = _same_products(tmp_path / "out", scheme, prefer)
    # Of 128 queries, 64 keys and 64 values, keys would begin a block that values share; gate and up have three each.
    assert decoder.unfused_groups == (2 if scheme == "fp8-block" else 0)
    assert all(isinstance(block.mlp.gate_up, Linear) for block in decoder.blocks)


@pytest.mark.parametrize("scheme", ["w8a8-static", "fp8-static", "w8a8-static+residual4"])
def test_members_with_scales_of_their_own_stay_apart(source: Path, scheme: str, tmp_path: Path) -> None:
    compress(source, scheme, tmp_path / "out")
    weights = load_file(tmp_path / "out/model.safetensors")
    name = "model.layers.1.self_attn.k_proj." + ("base." if "+" in scheme else "") + "input_scale"
    weights[name] *= 2
    save_file(weights, tmp_path / "out/model.safetensors")
    shutil.rmtree(tmp_path / "out/pressd")
    decoder = _same_products(tmp_path / "out", scheme, "fast")
    assert decoder.unfused_groups == 1


def _same_products(path: Path, scheme: str, prefer: Any) -> Any:
    """Load, and compare every linear of the decoder's layers with the decoded weights of its members, in float64."""
    checkpoint = Checkpoint.open(path)
    decoder = load_decoder(checkpoint, device=CPU, dtype=torch.float32, prefer=prefer)
    generator = torch.Generator().manual_seed(5)
    for group in checkpoint.model.groups():
        if not group.name.startswith("layers."):
            continue
        _, number, kind = group.name.split(".")
        block = decoder.blocks[int(number)]
        layer = (
            block.attention.output if kind == "o" else getattr(block.attention if kind == "qkv" else block.mlp, kind)
        )
        # Whole steps that no scale rounds: of 1/32, also where they are doubled; in e4m3, and in blocks of extreme 448.
        x = torch.randint(-60, 61, (3, group.shape[1]), generator=generator).float() * 2
        x = (x.to(torch.float8_e4m3fn) if "fp8" in scheme else x).float() * INPUT_SCALE
        if scheme == "fp8-block":
            x[:, ::128] = 448 * INPUT_SCALE
        expected, sizes = [], []
        for member in group.members:
            tensors, spec = checkpoint.linear_tensors(member.prefix), checkpoint.linear(member.prefix)
            weight = decode(tensors, spec, torch.float64)
            expected.append(x.double() @ weight.T)
            parts = decode(tensors | _without_zero_points(tensors), spec, torch.float64).abs() + weight.abs()
            sizes.append(x.double().abs() @ parts.T)
        # Sums of 384 products at most in float32, whose parts may be summed apart; a few roundings of scales.
        allowed = 400 * 2**-23 * torch.cat(sizes, dim=-1)
        assert bool(((layer(x).double() - torch.cat(expected, dim=-1)).abs() <= allowed).all()), group.name
    return decoder


def _without_zero_points(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor * 0 for name, tensor in tensors.items() if name.endswith("zero_point")}


def _save_llama(path: Path, **sizes: int) -> Path:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=97,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.2,
        pad_token_id=None,
        **sizes,
    )
    with torch.random.fork_rng():
        torch.manual_seed(11)
        LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(path)
    return path


def _load(path: Path, *, dequantize: bool = False, **options: Any) -> Any:
    from transformers import AutoModelForCausalLM
    from transformers.utils.quantization_config import CompressedTensorsConfig

    if not dequantize:
        return AutoModelForCausalLM.from_pretrained(path, **options).eval()
    with pytest.warns(UserWarning, match="the model you're loading already has a `quantization_config`"):
        return AutoModelForCausalLM.from_pretrained(
            path, quantization_config=CompressedTensorsConfig(dequantize=True)
        ).eval()


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.flatten().view(torch.uint8)


def _assert_same_weights(checkpoint: Checkpoint, model: Any) -> None:
    with torch.no_grad():
        model(torch.zeros(1, 2, dtype=torch.int64))  # their weights are decoded by the first forward
    for linear in checkpoint.model.linears():
        spec = checkpoint.linear(linear.prefix)
        ours = decode(checkpoint.linear_tensors(linear.prefix), spec, checkpoint.torch_dtype)
        assert torch.equal(ours, model.get_submodule(linear.prefix).weight), linear.prefix


def _their_scheme(scheme: Scheme) -> Any:
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    kind = "float" if scheme.storage == "fp8" else "int"
    weights: dict[str, Any] = {"num_bits": scheme.bits, "type": kind, "symmetric": scheme.symmetric}
    weights |= {"strategy": "channel" if scheme.group_size is None else "group", "group_size": scheme.group_size}
    inputs: dict[str, Any] = {"num_bits": 8, "type": kind, "strategy": "tensor", "dynamic": False}
    if scheme.block_size:
        weights |= {"strategy": "block", "block_structure": [128, 128]}
        inputs |= {"strategy": "group", "group_size": 128, "dynamic": True}
    return QuantizationScheme(
        targets=["Linear"],
        weights=QuantizationArgs(**weights),
        input_activations=QuantizationArgs(**inputs) if scheme.activation_bits == 8 else None,
    )


def _their_compressor(scheme: Scheme) -> Any:
    from compressed_tensors.compressors import BaseCompressor

    name = {"int8": "int-quantized", "fp8": "float-quantized"}.get(scheme.storage, "pack-quantized")
    return BaseCompressor.get_value_from_registry(name)


def _their_parameters(weight: torch.Tensor, scheme: Scheme) -> tuple[torch.Tensor, torch.Tensor]:
    from compressed_tensors.quantization.utils import calculate_qparams

    if scheme.block_size:
        padded = torch.nn.functional.pad(weight, (0, 0, 0, -len(weight) % 128))
        groups = padded.view(len(padded) // 128, 128, -1, 128).transpose(1, 2).flatten(2)
    else:
        groups = weight.view(len(weight), -1, scheme.group_size or weight.size(1))
    found: tuple[torch.Tensor, torch.Tensor] = calculate_qparams(
        groups.amin(-1), groups.amax(-1), _their_scheme(scheme).weights
    )
    return found


def _press_with_their_tools(path: Path, scheme: Scheme, out: Path) -> None:
    """What llm-compressor does with a model, here with rounding to nearest: configure, set scales, compress, save."""
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config

    model = _load(path)
    config = QuantizationConfig(config_groups={"group_0": _their_scheme(scheme)}, ignore=["lm_head"])
    apply_quantization_config(model, config, show_progress=False)
    for module in model.modules():
        if hasattr(module, "weight_scale"):
            module.weight_scale.data, zero = _their_parameters(module.weight.data, scheme)
            if not scheme.symmetric:
                module.weight_zero_point.data = zero
        if hasattr(module, "input_scale"):
            module.input_scale.data.fill_(INPUT_SCALE)
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    model.save_pretrained(out)
    compressor.update_config(str(out))
