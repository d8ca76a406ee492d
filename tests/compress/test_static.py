"""Static scales of a whole model: of inputs and of keys and values, on their way into files and out of them again."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from pressd.compress import compress, streams
from pressd.compress.calibration import CalibrationRows
from pressd.compress.recipe import Recipe, parse_recipe
from pressd.runtime.artifact.kv_scales import KVKind, KVScheme
from pressd.runtime.artifact.manifest import read_manifest
from pressd.runtime.artifact.reader import Checkpoint
from pressd.runtime.kernels.attention.batch import AttentionBatch
from pressd.runtime.models import load_decoder
from pressd.runtime.models.sequences import independent, step_of_equals

CPU = torch.device("cpu")
WEIGHTS = "model.safetensors"
LENGTH = 20


def recipe(scheme: str, static: str = 'observer = "minmax"') -> Recipe:
    return parse_recipe(f'[[pass]]\nuse = "static"\n{static}\n[scheme]\n"*" = "{scheme}"\n', "recipe")


def rows(seed: int = 1) -> CalibrationRows:
    ids = torch.randint(1, 97, (6, LENGTH), generator=torch.Generator().manual_seed(seed))
    return CalibrationRows(name="random", text_sha256="0" * 64, seed=seed, ids=ids)


def inputs_of(path: Path, ids_RT: torch.Tensor) -> dict[str, torch.Tensor]:
    """What transformers' linears read in float32, by their names."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    seen: dict[str, torch.Tensor] = {}

    def watch(name: str, module: torch.nn.Module) -> None:
        module.register_forward_pre_hook(lambda _, args: seen.update({name: args[0]}))

    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            watch(name, module)
    with torch.no_grad():
        model(ids_RT)
    return seen


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("scheme", ["w8a8-static", "fp8-static"])
def test_min_max_is_compressed_tensors_formula_to_the_bit(
    tiny_llama: Path, tmp_path: Path, scheme: str, dtype: torch.dtype
) -> None:
    """The first group's inputs are the source's own; its scale is that of a static observer which saw them."""
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.utils import calculate_qparams

    source = Path(shutil.copytree(tiny_llama, tmp_path / "source"))
    save_file({name: tensor.to(dtype) for name, tensor in load_file(source / WEIGHTS).items()}, source / WEIGHTS)
    config = json.loads((source / "config.json").read_text()) | {"dtype": str(dtype).removeprefix("torch.")}
    (source / "config.json").write_text(json.dumps(config))
    compress(source, recipe(scheme), tmp_path / "out", rows=rows())
    found = Checkpoint.open(tmp_path / "out").linear_tensors("model.layers.0.self_attn.q_proj")["input_scale"]
    assert found.dtype == dtype
    ours = _first_inputs(source, rows().ids)
    kind = "float" if scheme.startswith("fp8") else "int"
    arguments = QuantizationArgs(num_bits=8, type=kind, symmetric=True, strategy="tensor", dynamic=False)
    expected, _ = calculate_qparams(ours.amin()[None], ours.amax()[None], arguments)
    assert torch.equal(found, expected.to(dtype))
    theirs = inputs_of(source, rows().ids)["model.layers.0.self_attn.q_proj"]
    assert torch.allclose(ours, theirs.flatten(0, 1), atol=1e-5)  # one norm of float32 apart


def _first_inputs(path: Path, ids_RT: torch.Tensor) -> torch.Tensor:
    decoder = load_decoder(Checkpoint.open(path), device=CPU, dtype=torch.float32)
    with torch.inference_mode():
        return decoder.blocks[0].input_norm(decoder.embedding(ids_RT.flatten())).clone()


@pytest.mark.parametrize("scheme", ["w8a8-static", "fp8-static"])
def test_every_group_has_a_scale_of_its_inputs(tiny_llama: Path, tmp_path: Path, scheme: str) -> None:
    compress(tiny_llama, recipe(scheme), tmp_path / "out", rows=rows())
    artifact = Checkpoint.open(tmp_path / "out")
    manifest = read_manifest(tmp_path / "out")
    assert manifest is not None
    seen = inputs_of(tiny_llama, rows().ids)
    scales: dict[str, list[float]] = {}
    for group in manifest.plan:
        if group.scheme != scheme:
            continue
        assert group.passes == ("rtn", "static")
        for name in group.members:
            scale = float(artifact.linear_tensors(name)["input_scale"])
            scales.setdefault(group.name, []).append(scale)
            # Groups see what the pressed groups before them make: 8 bits change the largest value by some per cent.
            end = 448.0 if scheme == "fp8-static" else 127.5
            assert scale * end == pytest.approx(float(seen[name].abs().max()), rel=0.1)
    assert len(scales) == 8
    assert all(len(set(found)) == 1 for found in scales.values())
    assert len({found[0] for found in scales.values()}) == 8


def test_a_smaller_percentile_cuts_more_off(tiny_llama: Path, tmp_path: Path) -> None:
    found = []
    for percentile in (100, 99, 90):
        static = f'observer = "percentile"\npercentile = {percentile}'
        compress(tiny_llama, recipe("w8a8-static", static), tmp_path / f"{percentile}", rows=rows())
        artifact = Checkpoint.open(tmp_path / f"{percentile}")
        found.append(float(artifact.linear_tensors("model.layers.0.self_attn.q_proj")["input_scale"]))
    assert found == sorted(found, reverse=True)
    assert len(set(found)) == 3


@pytest.mark.parametrize("scheme", ["w4a16g32", "w8a8-static"])
@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_scales_of_keys_and_values_are_measured_written_and_used(
    tiny_llama: Path, tmp_path: Path, kind: KVKind, scheme: str
) -> None:
    path = tmp_path / "out"
    compress(tiny_llama, recipe(scheme, f'observer = "minmax"\nkv = "{kind}"'), path, rows=rows())
    artifact = Checkpoint.open(path)
    assert artifact.kv_scheme == KVScheme(kind=kind)
    said = json.loads((path / "config.json").read_text())["quantization_config"]["kv_cache_scheme"]
    assert (said["num_bits"], said["type"], said["dynamic"]) == (8, "int" if kind == "int8" else "float", False)
    # What attention reads and writes in the pressed model, unrounded and by the scales.
    ids = rows().ids
    kept = _keys_and_values(artifact, ids)
    end = 127.5 if kind == "int8" else 448.0
    for layer, pair in enumerate(kept):
        for scale, one in zip(artifact.kv_scales(layer), pair, strict=True):
            # The model is the same, but for sums in another order and, here, keys that later layers see rounded.
            assert float(one.abs().max() / scale) == pytest.approx(end, rel=1e-4)
    decoder = load_decoder(artifact, device=CPU, dtype=torch.float32, kv_dtype=kind)
    for layer, block in enumerate(decoder.blocks):
        expected = artifact.kv_scales(layer)
        assert block.attention.key_scale is not None
        assert block.attention.value_scale is not None
        assert torch.equal(block.attention.key_scale, expected[0])
        assert torch.equal(block.attention.value_scale, expected[1])
    plain = load_decoder(artifact, device=CPU, dtype=torch.float32)
    with torch.inference_mode():
        exact, coded = plain.full_logits(ids), decoder.full_logits(ids)
    # Steps of 1/127.5 of the largest, in two layers; e4m3 keeps 4 bits. Unequal, or nothing would have been rounded.
    assert 0 < float((coded - exact).norm() / exact.norm()) < 0.2


def _keys_and_values(checkpoint: Checkpoint, ids_RT: torch.Tensor) -> list[tuple[torch.Tensor, ...]]:
    decoder = load_decoder(checkpoint, device=CPU, dtype=torch.float32)
    batch, positions, (blocks, block_size) = independent(*ids_RT.shape, CPU, pages=False)
    kv = [decoder.new_kv(blocks, block_size) for _ in decoder.blocks]
    with torch.inference_mode():
        decoder.forward(ids_RT.flatten(), positions, kv, batch)
    return [(layer.keys, layer.values) for layer in kv]


def test_pages_that_are_not_full_count_for_what_is_in_them(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU, keys and values lie in pages of 16 tokens: of 20 tokens, 12 places are never written."""
    asked = recipe("w8a16", 'observer = "percentile"\npercentile = 99\nkv = "int8"')
    compress(tiny_llama, asked, tmp_path / "rows", rows=rows())

    def in_pages(
        num_sequences: int, length: int, device: torch.device, *, pages: bool
    ) -> tuple[AttentionBatch, torch.Tensor, tuple[int, int]]:
        positions, batch = step_of_equals(num_sequences, length, 0, 2, 16, device=device, pages=False)
        return batch, positions, (num_sequences * 2, 16)

    monkeypatch.setattr(streams, "independent", in_pages)
    compress(tiny_llama, asked, tmp_path / "pages", rows=rows())
    one, other = (Checkpoint.open(tmp_path / name) for name in ("rows", "pages"))
    for layer in range(2):
        assert torch.equal(torch.stack(one.kv_scales(layer)), torch.stack(other.kv_scales(layer)))


def _overflowing(tiny_llama: Path, path: Path, weight: str) -> Path:
    source = Path(shutil.copytree(tiny_llama, path))
    tensors = load_file(source / WEIGHTS)
    tensors[weight] = tensors[weight] * 1e38
    save_file(tensors, source / WEIGHTS)
    return source


@pytest.fixture(params=['use = "static"', 'use = "gptq"', 'use = "awq"', 'use = "smooth"'])
def passes(request: pytest.FixtureRequest) -> str:
    return f"[[pass]]\n{request.param}\n"


def test_a_source_that_overflows_is_refused_by_the_groups_name(tiny_llama: Path, tmp_path: Path, passes: str) -> None:
    scheme = "w8a8-static" if "static" in passes else "w8a8"
    asked = parse_recipe(f'{passes}[scheme]\n"*" = "{scheme}"\n', "recipe")
    source = _overflowing(tiny_llama, tmp_path / "source", "model.layers.0.mlp.up_proj.weight")
    with pytest.raises(ValueError, match=r"layers\.\d\.\w+: its inputs are not finite on the calibration text"):
        compress(source, asked, tmp_path / "out", rows=rows())
    assert not (tmp_path / "out").exists()


def test_values_that_overflow_are_refused_by_the_scales_name(tiny_llama: Path, tmp_path: Path) -> None:
    source = _overflowing(tiny_llama, tmp_path / "source", "model.layers.1.self_attn.v_proj.weight")
    with pytest.raises(ValueError, match=r"model\.layers\.1\.self_attn\.v_scale: keys or values are not finite"):
        compress(source, recipe("w8a16", 'kv = "int8"'), tmp_path / "out", rows=rows())
