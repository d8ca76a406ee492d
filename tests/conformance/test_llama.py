"""Our decoder against transformers on the same weights, in float32."""

from pathlib import Path
from typing import Any

import pytest
import torch

from pressd.runtime.artifact.reader import Checkpoint
from pressd.runtime.config import EngineConfig
from pressd.runtime.engine import Engine
from pressd.runtime.kernels.attention.batch import AttentionBatch, QueryRun
from pressd.runtime.models import Decoder, load_decoder
from pressd.runtime.request import StoppingParams

CPU = torch.device("cpu")
PYLM = Path(__file__).parents[2] / "examples" / "pylm"
LENGTH = 50

VARIANTS: dict[str, dict[str, Any]] = {
    "grouped": {},
    "one-kv-head": {"num_key_value_heads": 1},
    "all-heads": {"num_key_value_heads": 4},
    "wide-heads": {"head_dim": 24},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "tied": {"tie_word_embeddings": True},
    "theta": {"rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}},
    "rope-linear": {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}},
    "rope-llama3": {
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 1000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        }
    },
}


@pytest.fixture(scope="module", params=[*VARIANTS, "pylm"])
def pair(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, torch.Tensor, torch.Tensor]:
    """Return (directory, token ids [3, LENGTH], transformers' logits in float32)."""
    from transformers import LlamaConfig, LlamaForCausalLM

    generator = torch.Generator().manual_seed(1)
    if request.param == "pylm":
        path = PYLM
        model = LlamaForCausalLM.from_pretrained(path, dtype=torch.float32)
    else:
        shape = {
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
        }
        path = tmp_path_factory.mktemp(request.param)
        with torch.random.fork_rng():
            torch.manual_seed(2)
            model = LlamaForCausalLM(LlamaConfig(**(shape | VARIANTS[request.param])))
            for name, parameter in model.named_parameters():
                if name.endswith("bias") or "norm" in name:
                    torch.nn.init.normal_(parameter, mean=1.0, std=0.3)
        model.save_pretrained(path)
    token_ids = torch.randint(0, model.config.vocab_size, (3, LENGTH), generator=generator)
    with torch.no_grad():
        logits = model.eval()(token_ids).logits
    return path, token_ids, logits


def relative_error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours - theirs).norm() / theirs.norm())


@pytest.mark.parametrize("prefer", ["fast", "reference"])
def test_full_logits(pair: tuple[Path, torch.Tensor, torch.Tensor], prefer: Any) -> None:
    path, token_ids, theirs = pair
    decoder = load_decoder(Checkpoint.open(path), device=CPU, dtype=torch.float32, prefer=prefer)
    with torch.inference_mode():
        assert relative_error(decoder.full_logits(token_ids), theirs) < 1e-4


@pytest.mark.parametrize("chunk", [1, 7, 49])
def test_chunked_and_token_by_token_logits(pair: tuple[Path, torch.Tensor, torch.Tensor], chunk: int) -> None:
    """The same sequence through the paged cache in pieces, on blocks in no particular order."""
    path, token_ids, theirs = pair
    decoder = load_decoder(Checkpoint.open(path), device=CPU, dtype=torch.float32)
    with torch.inference_mode():
        ours = torch.cat([_paged(decoder, row, chunk)[None] for row in token_ids])
    assert relative_error(ours, theirs) < 1e-4


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


def test_greedy_text_equals_transformers(pair: tuple[Path, torch.Tensor, torch.Tensor]) -> None:
    from transformers import LlamaForCausalLM

    path, token_ids, _ = pair
    model = LlamaForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    engine = Engine.from_pretrained(path, EngineConfig(dtype="float32", max_batch=3, max_step_tokens=16))
    prompts = [row[: 5 + 11 * index].tolist() for index, row in enumerate(token_ids)]
    ours = engine.generate(prompts, stopping=StoppingParams(max_new_tokens=24, ignore_eos=True))
    for prompt, answer in zip(prompts, ours, strict=True):
        ids = torch.tensor([prompt])
        mask = torch.ones_like(ids)
        theirs = model.generate(
            ids,
            attention_mask=mask,
            do_sample=False,
            min_new_tokens=24,
            max_new_tokens=24,
            eos_token_id=None,
            pad_token_id=0,
        )
        assert answer == theirs[0, len(prompt) :].tolist()
