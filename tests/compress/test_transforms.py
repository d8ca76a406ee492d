"""Moving size between channels leaves what a layer computes as it was, whatever the family and the scales."""

from pathlib import Path
from typing import Any

import pytest
import torch
from family_models import save_family

from pressd.compress.block_work import BlockWork
from pressd.compress.plan import Plan, make_plan
from pressd.compress.recipe import recipe_of_scheme
from pressd.compress.streams import Lane, LayerPass, open_streams
from pressd.compress.transforms import fold_into_norm, fold_into_rows, shared_by_heads
from pressd.runtime.artifact.reader import Checkpoint
from pressd.runtime.models import decoder_config
from pressd.runtime.models.loading import GROUP_KINDS

CPU = torch.device("cpu")
ROWS, LENGTH = 3, 21
# Four heads and two of keys and values, or one; biases wherever a family has them; norms of heads.
FAMILIES: dict[str, dict[str, Any]] = {
    "Llama": {"attention_bias": True, "mlp_bias": True},
    "Llama.one-kv-head": {"num_key_value_heads": 1, "head_dim": 24},
    "Qwen2": {"num_key_value_heads": 4},
    "Qwen3": {"head_dim": 24, "attention_bias": True},
}


@pytest.fixture(scope="module", params=FAMILIES)
def path(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    name: str = request.param
    shape = {
        "vocab_size": 101,
        "hidden_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 112,
        "initializer_range": 0.2,
        "pad_token_id": None,
        "eos_token_id": None,
        "bos_token_id": None,
    }
    directory = tmp_path_factory.mktemp(name)
    save_family(name.partition(".")[0], shape | FAMILIES[name], directory)
    return directory


def open_layer(path: Path, dtype: torch.dtype = torch.float32) -> tuple[Plan, BlockWork]:
    checkpoint = Checkpoint.open(path)
    plan = make_plan(checkpoint, recipe_of_scheme("w8a8"))
    block = next(block for block in plan.blocks if block.block.name == "layers.0")
    return plan, BlockWork.begun(checkpoint, block, dtype)


def outputs(path: Path, work: BlockWork) -> torch.Tensor:
    """The residual stream [T, H] after the layer, in float32."""
    config = decoder_config(Checkpoint.open(path))
    lane = Lane.open(config, CPU, torch.float32, LENGTH)
    ids = torch.randint(0, 101, (ROWS, LENGTH), generator=torch.Generator().manual_seed(1))
    embedding = torch.randn(101, 64, generator=torch.Generator().manual_seed(2))
    streams = open_streams(ids, [lane], embedding)
    layer = LayerPass(config, 0, work, streams)
    with torch.inference_mode():
        for kind in GROUP_KINDS:
            layer.advance(kind)
    return torch.cat([stream.x for stream in streams]).clone()


def scales(columns: int, seed: int = 3) -> torch.Tensor:
    """From e^-6 to e^6, most of them near the middle."""
    return torch.exp(2 * torch.randn(columns, generator=torch.Generator().manual_seed(seed)).clamp(-3, 3))


def distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


# A gain, a weight and a bias are each rounded once more, by 2^-24 of their own size; a layer is four products of up to
# 112 terms and an attention in between, which stretches errors of its logits (here of size 30) by as much.
ROUNDING = 100 * 2.0**-24


@pytest.mark.parametrize("kind", ["qkv", "gate_up"])
def test_a_norms_gain_takes_what_weights_give(path: Path, kind: str) -> None:
    _, work = open_layer(path)
    before, expected = work.weight(work.group(kind)), outputs(path, work)
    fold_into_norm(work, work.group(kind), scales(64))
    assert distance(work.weight(work.group(kind)), before) > 0.5
    assert distance(outputs(path, work), expected) < ROUNDING
    divisor = work.divisor(work.group(kind))
    assert divisor is not None
    assert torch.allclose(divisor, scales(64), rtol=1e-6)


@pytest.mark.parametrize("kind", ["o", "down"])
def test_rows_of_the_linear_before_take_it(path: Path, kind: str) -> None:
    plan, work = open_layer(path)
    group, expected = work.group(kind), outputs(path, work)
    heads = plan.model.attention.num_kv_heads, plan.model.attention.num_heads
    wanted = scales(group.group.shape[1])
    if kind == "o":
        wanted = shared_by_heads(wanted, *heads)
    before = work.weight(group)
    fold_into_rows(work, group, wanted, *heads)
    assert distance(work.weight(group), before) > 0.5
    assert distance(outputs(path, work), expected) < ROUNDING


def test_all_of_them_one_after_the_other(path: Path) -> None:
    plan, work = open_layer(path)
    expected = outputs(path, work)
    heads = plan.model.attention.num_kv_heads, plan.model.attention.num_heads
    for kind in ("qkv", "o", "gate_up", "down"):
        group = work.group(kind)
        for seed in (1, 2):  # smooth, then awq: divisors multiply
            wanted = scales(group.group.shape[1], seed)
            if kind in ("qkv", "gate_up"):
                fold_into_norm(work, group, wanted)
            else:
                fold_into_rows(work, group, shared_by_heads(wanted, *heads) if kind == "o" else wanted, *heads)
    assert distance(outputs(path, work), expected) < 4 * ROUNDING
    divisor = work.divisor(work.group("qkv"))
    assert divisor is not None
    assert torch.allclose(divisor, scales(64, 1) * scales(64, 2), rtol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_gains_that_cannot_change_stay_and_what_rounds_is_made_up_for(path: Path, dtype: torch.dtype) -> None:
    """The stored gain has 8 bits in bfloat16; the weights get what the rounding left, in float32."""
    _, work = open_layer(path, dtype)
    gain = work.others["model.layers.0.input_layernorm.weight"]
    gain[[0, 5]] = 0
    before, expected = gain.clone(), outputs(path, work)
    wanted = scales(64)
    wanted[1], wanted[2] = 1e38, 1e-38  # gains of nothing, and of infinity in fp16
    wanted[5] = 1e30
    fold_into_norm(work, work.group("qkv"), wanted)
    folded = work.others["model.layers.0.input_layernorm.weight"]
    assert folded.dtype == dtype
    assert torch.equal(folded[[0, 5]], torch.zeros(2, dtype=dtype))
    assert bool((folded[1:5] != 0).all())
    assert bool(torch.isfinite(work.weight(work.group("qkv"))).all())
    if dtype == torch.float16:
        assert torch.equal(folded[[1, 2]], before[[1, 2]])
    assert distance(outputs(path, work), expected) < ROUNDING


def test_heads_that_share_values_share_scales() -> None:
    found = shared_by_heads(torch.tensor([1.0, 2.0, 3.0, 4.0, 4.0, 8.0, 27.0, 1.0]), 2, 4)
    expected = torch.tensor([3.0**0.5, 8**0.5, 3.0**0.5, 8**0.5, 108**0.5, 8**0.5, 108**0.5, 8**0.5])
    assert torch.allclose(found, expected, rtol=1e-6)
    assert torch.allclose(shared_by_heads(expected[:4], 4, 4), expected[:4], rtol=1e-6)
