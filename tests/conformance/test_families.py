"""Our decoder against transformers on the same weights, in float32: every family, and what its config can vary."""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from family_models import save_family

from pressd.compress import compress
from pressd.runtime.artifact.reader import ArtifactError, Checkpoint
from pressd.runtime.config import EngineConfig
from pressd.runtime.engine import Engine
from pressd.runtime.kernels.attention.batch import AttentionBatch, QueryRun
from pressd.runtime.layers.linear import Linear
from pressd.runtime.models import Decoder, load_decoder
from pressd.runtime.models.decoder import Block
from pressd.runtime.params import StoppingParams

CPU = torch.device("cpu")
PYLM = Path(__file__).parents[2] / "examples" / "pylm"
# More than twice every window, and than every trained context that a rope scaling below stretches.
LENGTH = 50

SHAPE: dict[str, Any] = {
    "vocab_size": 101,
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 112,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
    "pad_token_id": None,
    "eos_token_id": None,
    "bos_token_id": None,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 1000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN = {"rope_type": "yarn", "rope_theta": 1000.0, "factor": 4.0, "original_max_position_embeddings": 24}
FLAT = {"rope_type": "default", "rope_theta": 1000.0}
MIXED = ["sliding_attention", "full_attention", "sliding_attention"]
QWEN_WINDOW = {"use_sliding_window": True, "sliding_window": 16}

# "family.variant": what differs from SHAPE and the family's defaults.
VARIANTS: dict[str, dict[str, Any]] = {
    "Llama.grouped": {},
    "Llama.one-kv-head": {"num_key_value_heads": 1},
    "Llama.all-heads": {"num_key_value_heads": 4},
    "Llama.wide-heads": {"head_dim": 24},
    "Llama.biases": {"attention_bias": True, "mlp_bias": True},
    "Llama.tied": {"tie_word_embeddings": True},
    "Llama.theta": {"rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}},
    "Llama.rope-linear": {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}},
    "Llama.rope-llama3": {"rope_parameters": LLAMA3},
    "Mistral.window": {"sliding_window": 16},
    "Mistral.no-window": {"sliding_window": None, "num_key_value_heads": 1},
    "Mistral.short-window": {
        "sliding_window": 3,
        "num_key_value_heads": 1,
        "head_dim": 24,
        "tie_word_embeddings": True,
    },
    "Mistral.window-of-one": {"sliding_window": 1},
    "Mistral.yarn": {"sliding_window": 20, "rope_parameters": YARN},
    "Qwen2.plain": {"max_window_layers": 0},
    "Qwen2.tied": {"tie_word_embeddings": True, "num_key_value_heads": 1},
    "Qwen2.window": QWEN_WINDOW | {"max_window_layers": 0},
    "Qwen2.window-above": QWEN_WINDOW | {"max_window_layers": 2, "num_key_value_heads": 4},
    "Qwen2.layer-types": QWEN_WINDOW | {"layer_types": MIXED, "head_dim": 24},
    "Qwen2.yarn": {"rope_parameters": YARN},
    "Qwen2.yarn-narrow": {"rope_parameters": YARN | {"beta_fast": 2, "beta_slow": 0.1, "truncate": False}},
    "Qwen3.plain": {"head_dim": 24},
    "Qwen3.biases": {"head_dim": 16, "attention_bias": True, "num_key_value_heads": 1},
    "Qwen3.tied-llama3": {"head_dim": 16, "tie_word_embeddings": True, "rope_parameters": LLAMA3},
    "Qwen3.layer-types": QWEN_WINDOW | {"head_dim": 32, "layer_types": MIXED},
    "Qwen3.window-yarn": QWEN_WINDOW | {"head_dim": 24, "max_window_layers": 1, "rope_parameters": YARN},
    "Qwen3.yarn-factor": {"head_dim": 32, "rope_parameters": YARN | {"attention_factor": 1.7}},
    "Qwen3.yarn-mscale": {"head_dim": 16, "rope_parameters": YARN | {"mscale": 2.0, "mscale_all_dim": 0.5}},
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """A directory, token ids [3, LENGTH] and transformers' logits of them in float32."""

    path: Path
    model: Any
    token_ids: torch.Tensor
    logits: torch.Tensor

    def decoder(self, prefer: Any = "fast") -> Decoder:
        return load_decoder(Checkpoint.open(self.path), device=CPU, dtype=torch.float32, prefer=prefer)

    def error(self, logits: torch.Tensor) -> float:
        return float((logits - self.logits).norm() / self.logits.norm())


@pytest.fixture(scope="module", params=[*VARIANTS, "pylm"])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    from transformers import AutoModelForCausalLM

    name: str = request.param
    path = PYLM if name == "pylm" else _save(name, tmp_path_factory.mktemp(name))
    # Read back from the files, so that both sides have only config.json to go by.
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager").eval()
    generator = torch.Generator().manual_seed(1)
    token_ids = torch.randint(0, model.config.vocab_size, (3, LENGTH), generator=generator)
    with torch.no_grad():
        logits = model(token_ids).logits
    return Pair(path=path, model=model, token_ids=token_ids, logits=logits)


def _save(name: str, path: Path) -> Path:
    save_family(name.partition(".")[0], SHAPE | VARIANTS[name], path)
    return path


@pytest.mark.parametrize("prefer", ["fast", "reference"])
def test_full_logits(pair: Pair, prefer: Any) -> None:
    with torch.inference_mode():
        assert pair.error(pair.decoder(prefer).full_logits(pair.token_ids)) < 1e-4


@pytest.mark.parametrize("chunk", [1, 7, 49])
def test_chunked_and_token_by_token_logits(pair: Pair, chunk: int) -> None:
    """The same sequence through the paged cache in pieces, on blocks in no particular order."""
    decoder = pair.decoder()
    with torch.inference_mode():
        ours = torch.cat([_paged(decoder, row, chunk)[None] for row in pair.token_ids])
    assert pair.error(ours) < 1e-4


def _paged(decoder: Decoder, token_ids: torch.Tensor, chunk: int) -> torch.Tensor:
    block_size, table = 8, (5, 1, 6, 0, 3, 2, 4)
    kv = [decoder.new_kv(len(table), block_size) for _ in decoder.blocks]
    slots = torch.tensor([table[p // block_size] * block_size + p % block_size for p in range(LENGTH)])
    pieces = []
    for start in range(0, LENGTH, chunk):
        stop = min(start + chunk, LENGTH)
        run = QueryRun(start=0, length=stop - start, kv_length=stop, block_table=table, first_block=None)
        batch = AttentionBatch(runs=(run,), slot_mapping=slots[start:stop])
        hidden = decoder.forward(token_ids[start:stop], torch.arange(start, stop), kv, batch)
        pieces.append(decoder.lm_head(hidden))
    return torch.cat(pieces)


def test_greedy_text_equals_transformers(pair: Pair) -> None:
    """Each token is transformers' favourite after those before it, which makes the text the one it would generate.

    Its own generate is no better an oracle: with a window of 1, its cache keeps everything (as of transformers 5.24).
    """
    engine = Engine.from_pretrained(pair.path, EngineConfig(dtype="float32", max_batch=3, max_step_tokens=16))
    prompts = [row[: 5 + 11 * index].tolist() for index, row in enumerate(pair.token_ids)]
    ours = engine.generate(prompts, stopping=StoppingParams(max_new_tokens=24, ignore_eos=True))
    for prompt, completion in zip(prompts, ours, strict=True):
        answer = list(completion.token_ids)
        with torch.no_grad():
            favourites = pair.model(torch.tensor([prompt + answer])).logits[0].argmax(dim=-1)
        assert answer == favourites[len(prompt) - 1 : -1].tolist()


def test_layers_may_run_in_two_goes(pair: Pair) -> None:
    """Up to any layer, and on from there: the same bits, in the hidden states and in the cache."""
    decoder = pair.decoder()
    run = QueryRun(start=0, length=LENGTH, kv_length=LENGTH, block_table=(0,), first_block=0)
    batch = AttentionBatch(runs=(run,), slot_mapping=torch.arange(LENGTH))
    positions, token_ids = torch.arange(LENGTH), pair.token_ids[0]
    with torch.inference_mode():
        kv = [decoder.new_kv(1, LENGTH) for _ in decoder.blocks]
        whole = decoder.forward(token_ids, positions, kv, batch)
        for split in range(len(decoder.blocks) + 1):
            kv_apart = [decoder.new_kv(1, LENGTH) for _ in decoder.blocks]
            x = decoder.embedding(token_ids)
            x = decoder.run_layers(x, positions, kv_apart, batch, range(split))
            x = decoder.run_layers(x, positions, kv_apart, batch, range(split, len(decoder.blocks)))
            assert torch.equal(decoder.final_norm(x), whole)
            for layer, layer_apart in zip(kv, kv_apart, strict=True):
                assert torch.equal(layer.keys, layer_apart.keys)
                assert torch.equal(layer.values, layer_apart.values)


@pytest.mark.parametrize(
    "pair", ["Mistral.window", "Qwen2.layer-types", "Qwen3.biases", "Qwen3.window-yarn"], indirect=True
)
def test_a_pressed_model_computes_what_transformers_makes_of_its_files(pair: Pair, tmp_path: Path) -> None:
    """Biases, windows and norms of heads come through the workshop as they were."""
    from transformers import AutoModelForCausalLM

    compress(pair.path, "w8a16", tmp_path / "out")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    pressed = replace(pair, path=tmp_path / "out", logits=theirs(pair.token_ids).logits.detach())
    with torch.inference_mode():
        assert pressed.error(pressed.decoder("reference").full_logits(pair.token_ids)) < 1e-4
    assert pair.error(pressed.logits) > 1e-4  # 8 bits are not the source


# Mistakes that the comparisons above must be able to see: changes of config.json alone, the weights being the same.
MISREAD: list[tuple[str, dict[str, Any]]] = [
    ("Llama.rope-linear", {"rope_parameters": FLAT | {"rope_theta": 10000.0}}),
    ("Llama.rope-llama3", {"rope_parameters": FLAT}),
    ("Mistral.window", {"sliding_window": None}),
    ("Mistral.window", {"sliding_window": 15}),
    ("Mistral.window", {"sliding_window": 17}),
    ("Mistral.no-window", {"sliding_window": 16}),
    ("Mistral.yarn", {"rope_parameters": FLAT}),
    ("Qwen2.window", {"use_sliding_window": False, "layer_types": None}),
    ("Qwen2.window-above", {"layer_types": None, "max_window_layers": 1}),
    ("Qwen2.layer-types", {"layer_types": ["full_attention", "sliding_attention", "full_attention"]}),
    ("Qwen2.yarn", {"rope_parameters": FLAT}),
    ("Qwen2.yarn", {"rope_parameters": YARN | {"attention_factor": 1.0}}),
    ("Qwen2.yarn-narrow", {"rope_parameters": YARN | {"beta_fast": 2, "beta_slow": 0.1}}),
    ("Qwen3.layer-types", {"use_sliding_window": False, "layer_types": None}),
    ("Qwen3.window-yarn", {"rope_parameters": FLAT}),
    ("Qwen3.yarn-factor", {"rope_parameters": YARN}),
    ("Qwen3.yarn-mscale", {"rope_parameters": YARN}),
]


@pytest.mark.parametrize(("pair", "changes"), MISREAD, indirect=["pair"], ids=str)
def test_a_config_read_wrongly_would_be_seen(pair: Pair, changes: dict[str, Any], tmp_path: Path) -> None:
    decoder = load_decoder(Checkpoint.open(_changed(pair.path, tmp_path, changes)), device=CPU, dtype=torch.float32)
    with torch.inference_mode():
        assert pair.error(decoder.full_logits(pair.token_ids)) > 1e-2


def _without_head_gain(block: Block) -> Block:
    assert block.attention.head_gain is not None
    return replace(block, attention=replace(block.attention, head_gain=None))


def _without_qkv_bias(block: Block) -> Block:
    qkv = block.attention.qkv
    assert isinstance(qkv, Linear)
    assert qkv.bias is not None
    return replace(block, attention=replace(block.attention, qkv=replace(qkv, bias=None)))


@pytest.mark.parametrize(
    ("pair", "without"),
    [
        ("Llama.biases", _without_qkv_bias),
        ("Qwen2.plain", _without_qkv_bias),
        ("Qwen3.biases", _without_qkv_bias),
        ("Qwen3.plain", _without_head_gain),
    ],
    indirect=["pair"],
)
def test_a_part_left_out_would_be_seen(pair: Pair, without: Callable[[Block], Block]) -> None:
    decoder = pair.decoder()
    decoder = replace(decoder, blocks=tuple(without(block) for block in decoder.blocks))
    with torch.inference_mode():
        assert pair.error(decoder.full_logits(pair.token_ids)) > 1e-2


@pytest.mark.parametrize(
    ("pair", "changes", "tensor"),
    [
        ("Llama.biases", {"attention_bias": False}, "k_proj.bias"),
        ("Qwen3.biases", {"attention_bias": False}, "k_proj.bias"),
        ("Qwen2.tied", {"architectures": ["LlamaForCausalLM"]}, "k_proj.bias"),
        ("Qwen3.plain", {"architectures": ["LlamaForCausalLM"]}, "k_norm.weight"),
    ],
    indirect=["pair"],
)
def test_weights_that_config_knows_nothing_of_are_refused(
    pair: Pair, changes: dict[str, Any], tensor: str, tmp_path: Path
) -> None:
    path = _changed(pair.path, tmp_path, changes)
    with pytest.raises(ArtifactError, match=rf"layers\.0\.self_attn\.{tensor}' is not one of this \w+'s"):
        Checkpoint.open(path)


def _changed(path: Path, tmp_path: Path, changes: dict[str, Any]) -> Path:
    copy = Path(shutil.copytree(path, tmp_path / "copy"))
    content = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(content | changes))
    return copy
