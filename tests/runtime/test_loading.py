"""What loading does with fused groups, tied heads and memory."""

from pathlib import Path
from typing import Any

import pytest
import torch

from pressd.compress import compress
from pressd.compress.encoding import decode
from pressd.compress.recipe import parse_recipe
from pressd.runtime.artifact.reader import Checkpoint
from pressd.runtime.layers.linear import ChainLinear, Linear, LinearLayer, SumLinear, UnfusedLinear
from pressd.runtime.models import load_decoder

CPU = torch.device("cpu")


def test_groups_are_fused_and_the_tied_head_is_the_embedding(tiny_llama_tied: Path) -> None:
    checkpoint = Checkpoint.open(tiny_llama_tied)
    decoder = load_decoder(checkpoint, device=CPU, dtype=torch.float32)
    assert decoder.unfused_groups == 0
    assert isinstance(decoder.head, Linear)
    assert decoder.head.packed is decoder.embedding.packed
    qkv = decoder.blocks[0].attention.qkv
    assert isinstance(qkv, Linear)
    assert (qkv.problem.out_features, qkv.problem.in_features) == (128, 64)
    # Nothing is held twice: what is in memory is what is on disk.
    assert decoder.weights_bytes == checkpoint.dense_bytes


def test_members_that_disagree_run_apart_and_agree_with_the_whole(tiny_llama: Path, tmp_path: Path) -> None:
    """A foreign file whose gate is stored otherwise than its up: counted, and computed all the same."""
    compress(tiny_llama, parse_recipe('[scheme]\n"*" = "w8a16"\n', "recipe"), tmp_path / "pressed")
    pressed = Checkpoint.open(tmp_path / "pressed")
    split = _Disagreeing(pressed, Checkpoint.open(tiny_llama))
    decoder = load_decoder(split, device=CPU, dtype=torch.float64)
    assert decoder.unfused_groups == 2
    gate_up = decoder.blocks[1].mlp.gate_up
    assert isinstance(gate_up, UnfusedLinear)
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    fused = load_decoder(pressed, device=CPU, dtype=torch.float64).blocks[1].mlp.gate_up
    dense = split.tensor("model.layers.1.mlp.gate_proj.weight").double()
    torch.testing.assert_close(gate_up(x)[:, :160], x @ dense.T)
    torch.testing.assert_close(gate_up(x)[:, 160:], fused(x)[:, 160:])


class _Disagreeing(Checkpoint):
    """`pressed` with the gate of every block taken from `dense`."""

    def __init__(self, pressed: Checkpoint, dense: Checkpoint) -> None:
        self.__dict__.update(pressed.__dict__)
        self._dense = dense

    def linear(self, prefix: str):  # type: ignore[no-untyped-def]
        return self._dense.linear(prefix) if "gate_proj" in prefix else super().linear(prefix)

    def linear_tensors(self, prefix: str) -> dict[str, torch.Tensor]:
        return self._dense.linear_tensors(prefix) if "gate_proj" in prefix else super().linear_tensors(prefix)

    def tensor(self, name: str) -> torch.Tensor:
        return self._dense.tensor(name) if "gate_proj" in name else super().tensor(name)


@pytest.mark.parametrize(("scheme", "bits"), [("w4a16g32", 4.5), ("w8a16", 8.0)])
def test_pressed_weights_stay_pressed_in_memory(
    tiny_llama_tied: Path, tmp_path: Path, scheme: str, bits: float
) -> None:
    compress(tiny_llama_tied, scheme, tmp_path / "out")
    checkpoint = Checkpoint.open(tmp_path / "out")
    decoder = load_decoder(checkpoint, device=CPU, dtype=torch.bfloat16)
    linears = 2 * (128 * 64 + 64 * 64 + 320 * 64 + 64 * 160)
    # Scales of the source's float32 count 32 bits, or 16 where the kernel keeps bfloat16; besides, at most a
    # sixteenth for what kernels note by row.
    kept_dense = 97 * 64 * 2 + 5 * 64 * 2
    assert kept_dense < decoder.weights_bytes <= kept_dense + linears * (bits + 0.5) / 8 * (1 + 1 / 16) + 4 * 1376


def random_llama(path: Path, dtype: torch.dtype, **shape: Any) -> Path:
    """Save a random Llama of one layer, its biases drawn as well."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=97, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2, dtype=dtype, **shape
    )
    with torch.random.fork_rng():
        torch.manual_seed(5)
        model = LlamaForCausalLM(config)
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                torch.nn.init.normal_(parameter)
    model.to(dtype).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def with_biases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose linears all have biases."""
    shape = {"hidden_size": 64, "intermediate_size": 96, "tie_word_embeddings": True}
    path = tmp_path_factory.mktemp("biases")
    return random_llama(path, torch.float32, attention_bias=True, mlp_bias=True, **shape)


@pytest.fixture(scope="module")
def wide_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose factors of rank 32 and groups of 32 fast kernels take."""
    return random_llama(tmp_path_factory.mktemp("wide"), torch.bfloat16, hidden_size=128, intermediate_size=256)


@pytest.mark.parametrize(
    ("scheme", "kind"),
    [
        ("bf16", Linear),
        ("w4a16g32", Linear),
        ("sparse24:w3a16", Linear),
        ("sparse24:bf16", Linear),
        ("lowrank20:bf16", ChainLinear),
        ("lowrank16:w8a16", ChainLinear),
        ("w2a16g32+residual5", SumLinear),
        ("sparse24:w8a16+residual5", SumLinear),
        ("lowrank16:w4a16+residual3", SumLinear),
    ],
)
def test_a_layer_computes_what_its_tensors_decode_to(
    with_biases: Path, scheme: str, kind: type[LinearLayer], tmp_path: Path
) -> None:
    compress(with_biases, scheme, tmp_path / "out")
    checkpoint = Checkpoint.open(tmp_path / "out")
    decoder = load_decoder(checkpoint, device=CPU, dtype=torch.float64, prefer="reference")
    assert decoder.unfused_groups == 0
    block = decoder.blocks[0]
    layers = {"qkv": block.attention.qkv, "o": block.attention.output, "gate_up": block.mlp.gate_up}
    for group in checkpoint.model.groups():
        if group.kind not in layers:
            continue
        layer = layers[group.kind]
        assert isinstance(layer, kind)
        x = torch.randn(5, group.shape[1], dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        for columns, member in zip(
            layer(x).split([m.out_features for m in group.members], -1), group.members, strict=True
        ):
            stored = checkpoint.linear_tensors(member.prefix)
            weight = decode(stored, checkpoint.linear(member.prefix), torch.float64)
            expected = x @ weight.T + checkpoint.tensor(f"{member.prefix}.bias").double()
            # float64 throughout, but for the products of two factors that a chain never forms.
            torch.testing.assert_close(columns, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("scheme", ["lowrank32:w4a16g32", "lowrank32:w8a8", "w4a16g32+residual3", "sparse24:w4a16g32"])
@pytest.mark.parametrize("rows", [0, 1, 2, 5, 100])
def test_every_layer_takes_any_number_of_rows_in_the_types_that_are_served(
    wide_llama: Path, scheme: str, rows: int, tmp_path: Path
) -> None:
    """Factors of a fused group are parts of one output, side by side: what a kernel gets must not show that."""
    compress(wide_llama, scheme, tmp_path / "out")
    decoder = load_decoder(Checkpoint.open(tmp_path / "out"), device=CPU, dtype=torch.bfloat16)
    exact = load_decoder(Checkpoint.open(tmp_path / "out"), device=CPU, dtype=torch.float64, prefer="reference")
    x = torch.randn(rows, 128, generator=torch.Generator().manual_seed(rows)).bfloat16()
    for layer, reference in (
        (decoder.blocks[0].attention.qkv, exact.blocks[0].attention.qkv),
        (decoder.blocks[0].mlp.gate_up, exact.blocks[0].mlp.gate_up),
    ):
        y, expected = layer(x).double(), reference(x.double())
        assert y.shape == expected.shape
        # A few roundings to bfloat16 (2^-9 each) on the way, and with int8 activations some of them a code further (one
        # of 127): a tenth of the whole would be a wrong weight.
        assert float((y - expected).norm()) <= 0.03 * float(expected.norm())


@pytest.mark.parametrize("rules", ['"embed" = "w8a16"', '"embed" = "w4a16g32"', '"*" = "w8a16"\n"embed" = "w3a16"'])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_pressed_embedding_is_looked_up_and_multiplied(
    tiny_llama_tied: Path, rules: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    compress(tiny_llama_tied, parse_recipe(f"[scheme]\n{rules}\n", "recipe"), tmp_path / "out")
    checkpoint = Checkpoint.open(tmp_path / "out")
    assert checkpoint.model.tied
    decoder = load_decoder(checkpoint, device=CPU, dtype=dtype)
    prefix = "model.embed_tokens"
    weight = decode(checkpoint.linear_tensors(prefix), checkpoint.linear(prefix), dtype)
    ids = torch.tensor([0, 96, 7, 7])
    assert torch.equal(decoder.embedding(ids), weight[ids])
    hidden = torch.randn(3, 64, dtype=dtype, generator=torch.Generator().manual_seed(1))
    # Sums of 64 products, each within an eps of the type they are summed in or rounded to.
    bound = 65 * torch.finfo(dtype).eps * (hidden.double().abs() @ weight.double().abs().T)
    assert bool(((decoder.lm_head(hidden).double() - hidden.double() @ weight.double().T).abs() <= bound).all())
    # One copy serves both.
    assert isinstance(decoder.head, Linear)
    assert {t.data_ptr() for t in decoder.head.tensors()} == {t.data_ptr() for t in decoder.embedding.tensors()}


def test_an_untied_head_is_pressed_by_itself(tiny_llama_tied: Path, tmp_path: Path) -> None:
    compress(tiny_llama_tied, parse_recipe('[scheme]\n"lm_head" = "w8a16"\n', "recipe"), tmp_path / "out")
    source, pressed = Checkpoint.open(tiny_llama_tied), Checkpoint.open(tmp_path / "out")
    assert not pressed.model.tied
    assert torch.equal(pressed.tensor("model.embed_tokens.weight"), source.tensor("lm_head.weight"))
    decoded = decode(pressed.linear_tensors("lm_head"), pressed.linear("lm_head"), torch.float32)
    # 8 bits: half a step is max|w| of the row / 255.
    error = (decoded - source.tensor("lm_head.weight")).abs().amax(1)
    assert bool((error <= source.tensor("lm_head.weight").abs().amax(1) / 255 * 1.01).all())
