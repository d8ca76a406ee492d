"""Keys and values in eight bits, in the engine: memory, choices, and that nothing else than rounding changes."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

from pressd.runtime.artifact.kv_scales import KVKind, KVScheme, scale_names
from pressd.runtime.artifact.reader import Checkpoint
from pressd.runtime.config import EngineConfig, KVDtypeName
from pressd.runtime.engine import Engine
from pressd.runtime.kernels.attention.batch import AttentionBatch, AttentionProblem, KVFormat, QueryRun
from pressd.runtime.kernels.attention.kv_codes import decode, encode
from pressd.runtime.kernels.catalogue import attention_kernels
from pressd.runtime.kernels.registry import Device, describe_device
from pressd.runtime.layers.attention import LayerKV
from pressd.runtime.models import Decoder, load_decoder, loading
from pressd.runtime.models.loading import KV_CODES
from pressd.runtime.params import SamplingParams, StoppingParams
from pressd.runtime.request import Request

CPU = torch.device("cpu")
KINDS: tuple[KVDtypeName, ...] = ("bf16", "int8", "fp8")
ROOT = Path(__file__).parents[2]
PYLM = ROOT / "examples" / "pylm"
WEIGHTS = "model.safetensors"
EXACT = EngineConfig(dtype="float64", kernels="reference", block_size=4, max_batch=4, max_step_tokens=64)


def calibrated(source: Path, path: Path, kind: KVKind) -> Path:
    """A copy of a dense model with scales that let the largest keys and values saturate."""
    shutil.copytree(source, path)
    config = json.loads((path / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
        "config_groups": {},
        "ignore": [],
        "kv_cache_scheme": KVScheme(kind=kind).to_config(),
    }
    (path / "config.json").write_text(json.dumps(config))
    tensors = load_file(path / WEIGHTS)
    for layer in range(config["num_hidden_layers"]):
        for place, name in enumerate(scale_names(layer)):
            tensors[name] = torch.tensor([(0.5 + layer + place / 4) / (20 if kind == "int8" else 60)])
    save_file(tensors, path / WEIGHTS)
    return path


@pytest.fixture(scope="module", params=["int8", "fp8", "calibrated int8", "calibrated fp8", "bf16"])
def stored(
    request: pytest.FixtureRequest, tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, KVDtypeName]:
    """A model, and the type to ask for."""
    how, _, kind = request.param.rpartition(" ")
    return (calibrated(tiny_llama, tmp_path_factory.mktemp("models") / kind, kind) if how else tiny_llama), kind


def forward_in_chunks(decoder: Decoder, ids: torch.Tensor, chunk: int) -> tuple[torch.Tensor, list[LayerKV]]:
    """Hidden states of one sequence in scattered blocks, computed so many tokens at a time; and what was stored."""
    table, block_size = (5, 0, 7, 2, 3, 9, 1, 8, 4, 6), 4
    kv = [decoder.new_kv(len(table), block_size) for _ in decoder.blocks]
    slots = torch.tensor([table[p // block_size] * block_size + p % block_size for p in range(len(ids))])
    parts = []
    for start in range(0, len(ids), chunk):
        stop = min(start + chunk, len(ids))
        run = QueryRun(start=0, length=stop - start, kv_length=stop, block_table=table, first_block=None)
        batch = AttentionBatch(runs=(run,), slot_mapping=slots[start:stop])
        parts.append(decoder.forward(ids[start:stop], torch.arange(start, stop), kv, batch))
    return torch.cat(parts), kv


@torch.inference_mode()
def test_chunks_store_the_same_codes_and_change_nothing(stored: tuple[Path, KVDtypeName]) -> None:
    path, kind = stored
    decoder = load_decoder(Checkpoint.open(path), device=CPU, dtype=torch.float64, prefer="reference", kv_dtype=kind)
    ids = torch.randint(0, 97, (33,), generator=torch.Generator().manual_seed(4))
    whole, kept = forward_in_chunks(decoder, ids, 33)
    # What is computed without a cache to keep is stored and read back just so.
    torch.testing.assert_close(decoder.hidden_states(ids[None])[0], whole, rtol=0, atol=1e-9)
    for chunk in (1, 5, 16):
        found, again = forward_in_chunks(decoder, ids, chunk)
        # Codes are equal, so that what is left is the order in which float64 sums; without the way through the pool,
        # a chunk's own keys would be exact, and differ by the codes' rounding: some 1e-2.
        torch.testing.assert_close(found, whole, rtol=0, atol=1e-9)
        for layer, other in zip(kept, again, strict=True):
            written = torch.tensor([5, 0, 7, 2, 3, 9, 1, 8])
            for mine, theirs in ((layer.keys, other.keys), (layer.values, other.values)):
                assert torch.equal(mine[written].double(), theirs[written].double())
    exact = load_decoder(Checkpoint.open(path), device=CPU, dtype=torch.float64, prefer="reference")
    assert (exact.hidden_states(ids[None])[0] - whole).abs().max() > 1e-4, "nothing was rounded"


def request(name: str, prompt: tuple[int, ...], **asked: Any) -> Request:
    return Request(
        request_id=name,
        prompt_token_ids=prompt,
        sampling=SamplingParams(temperature=0.0, **asked),
        stopping=StoppingParams(max_new_tokens=24, ignore_eos=True),
    )


def answers(engine: Engine, requests: list[Request]) -> dict[tuple[str, int], list[int]]:
    for asked in requests:
        engine.add(asked)
    found: dict[tuple[str, int], list[int]] = {}
    while engine.has_work:
        for output in engine.step().outputs:
            found.setdefault((output.request_id, output.index), []).extend(output.token_ids)
    return found


def test_neighbours_chunks_and_hits_change_no_token(stored: tuple[Path, KVDtypeName]) -> None:
    path, kind = stored
    generator = torch.Generator().manual_seed(9)
    stem = tuple(torch.randint(0, 97, (30,), generator=generator).tolist())
    prompts = [(*stem[: 30 - 7 * n], *torch.randint(0, 97, (5 * n + 1,), generator=generator)) for n in range(4)]
    requests = [request(f"r{n}", tuple(map(int, prompt))) for n, prompt in enumerate(prompts)]
    config = dataclasses.replace(EXACT, kv_dtype=kind)
    alone: dict[tuple[str, int], list[int]] = {}
    for asked in requests:
        alone |= answers(Engine.from_pretrained(path, dataclasses.replace(config, prefix_cache=False)), [asked])
    # The last is memory for one request in bfloat16: others wait, or are put back and computed again.
    for change in ({"max_step_tokens": 5}, {"max_step_tokens": 64}, {"kv_memory": 15 * 4 * 256}):
        engine = Engine.from_pretrained(path, dataclasses.replace(config, **change))
        assert answers(engine, requests) == alone
        again = [dataclasses.replace(asked, request_id=f"again {asked.request_id}") for asked in requests]
        assert {(name.removeprefix("again "), n): t for (name, n), t in answers(engine, again).items()} == alone
        assert engine.step().stats.prefix_hit_tokens > 0


@pytest.mark.parametrize("kind", KINDS)
def test_layers_with_a_window_too(kind: KVDtypeName, tmp_path: Path) -> None:
    """Each group of layers has blocks, and scales, of its own; those behind the window are given to others."""
    config = Qwen3Config(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=10,
        max_position_embeddings=128,
        use_sliding_window=True,
        sliding_window=7,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        bos_token_id=None,
        eos_token_id=None,
        initializer_range=0.2,
    )
    with torch.random.fork_rng():
        torch.manual_seed(6)
        Qwen3ForCausalLM(config).save_pretrained(tmp_path / "model")
    prompts = torch.randint(0, 97, (3, 40), generator=torch.Generator().manual_seed(2)).tolist()
    requests = [request(f"r{n}", tuple(prompt[: 40 - 9 * n])) for n, prompt in enumerate(prompts)]
    settings = dataclasses.replace(EXACT, kv_dtype=kind)
    alone: dict[tuple[str, int], list[int]] = {}
    for asked in requests:
        alone |= answers(Engine.from_pretrained(tmp_path / "model", settings), [asked])
    engine = Engine.from_pretrained(tmp_path / "model", dataclasses.replace(settings, max_step_tokens=6))
    assert len(engine._runner.groups) == 2
    assert answers(engine, requests) == alone


def test_blocks_that_move_keep_their_scales(stored: tuple[Path, KVDtypeName]) -> None:
    path, kind = stored
    decoder = load_decoder(Checkpoint.open(path), device=CPU, dtype=torch.float32, kv_dtype=kind)
    kv = decoder.new_kv(5, 2)
    for tensor in kv.tensors():
        tensor.copy_(torch.arange(5.0).view(-1, *[1] * (tensor.dim() - 1)).expand(tensor.shape))
    kv.copy_blocks(torch.tensor([1, 4]), torch.tensor([3, 0]))
    for tensor in kv.tensors():
        assert tensor.float().flatten(1).amax(1).tolist() == [4.0, 1.0, 2.0, 1.0, 4.0]
        assert tensor.float().flatten(1).amin(1).tolist() == [4.0, 1.0, 2.0, 1.0, 4.0]


@pytest.mark.parametrize(
    ("kind", "token_bytes", "blocks"), [("auto", 256, 40), ("bf16", 256, 40), ("int8", 160, 64), ("fp8", 160, 64)]
)
def test_memory_holds_as_many_blocks_as_it_says(
    tiny_llama: Path, kind: KVDtypeName, token_bytes: int, blocks: int
) -> None:
    """2 layers x 2 (K and V) x 2 heads x (16 numbers and a scale of 4 bytes); 16 tokens are a block."""
    config = EngineConfig(dtype="bfloat16", kv_dtype=kind, kv_memory=40 * 16 * 256)
    engine = Engine.from_pretrained(tiny_llama, config)
    assert engine._runner.decoder.kv_bytes_per_token == token_bytes
    assert engine.info.kv_blocks == blocks
    held = sum(tensor.untyped_storage().nbytes() for layer in engine._runner.kv for tensor in layer.tensors())
    assert held == engine.info.kv_bytes == blocks * 16 * token_bytes
    assert engine.info.kv_dtype == {"auto": "bfloat16", "bf16": "bfloat16"}.get(kind, kind)


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_scales_of_an_artifact_take_no_memory_for_tokens(tiny_llama: Path, kind: KVKind, tmp_path: Path) -> None:
    path = calibrated(tiny_llama, tmp_path / "model", kind)
    memory = 40 * 16 * 256
    engine = Engine.from_pretrained(path, EngineConfig(dtype="bfloat16", kv_dtype=kind, kv_memory=memory))
    assert (engine.info.kv_blocks, engine.info.kv_bytes) == (80, memory), "twice those of bfloat16"
    other: KVKind = "fp8" if kind == "int8" else "int8"
    engine = Engine.from_pretrained(path, EngineConfig(dtype="bfloat16", kv_dtype=other, kv_memory=memory))
    assert engine.info.kv_blocks == 64, "scales that were measured for other codes are not used"
    engine = Engine.from_pretrained(path, EngineConfig(dtype="bfloat16", kv_memory=memory))
    assert (engine.info.kv_blocks, engine.info.kv_dtype) == (40, "bfloat16"), "only who asks for it loses anything"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_generated_code_says_why_it_is_not_taken(tiny_llama: Path, kind: KVDtypeName, dtype: Any) -> None:
    engine = Engine.from_pretrained(tiny_llama, EngineConfig(dtype=dtype, kv_dtype=kind, max_batch=2))
    (choice,) = (choice for choice in engine.info.kernels if choice.op == "attention")
    assert choice.implementation == "cpu"
    generated = [kernel.name for kernel in attention_kernels(describe_device(CPU)) if kernel.is_generated]
    name = str(KV_CODES[kind]).removeprefix("torch.")
    for refusal in choice.refusals:
        assert refusal.split(":")[0] in generated
        assert "VNNI" in refusal or f"reads keys and values in {dtype}, as it computes, not in {name}" in refusal
    assert len(choice.refusals) == len(generated)
    assert not engine._runner.decoder.is_generated, "no step is recorded over a pool that recordings do not know"


def test_a_gpu_takes_it_by_the_reference_alone_and_says_so() -> None:
    gpu = Device(torch_device=torch.device("cuda", 0), features=frozenset({"sm_90"}))
    problem = AttentionProblem(
        num_heads=4,
        num_kv_heads=2,
        head_dim=64,
        dtype=torch.bfloat16,
        kv=KVFormat(dtype=torch.int8, scales="token"),
    )
    kernels, choices = loading.choose_attention([problem], gpu, "fast")
    assert [choice.implementation for choice in choices] == ["reference"]
    assert choices[0].refusals[0] == "triton: reads keys and values in bfloat16, as it computes, not in int8"
    with pytest.raises(ValueError, match=r"--kv-dtype int8: .*triton: reads .*; leave it out, or give --kernels refer"):
        loading.check_fast_attention(kernels, "int8", choices)
    same = dataclasses.replace(problem, kv=KVFormat(dtype=torch.bfloat16))
    kernels, choices = loading.choose_attention([same], gpu, "fast")
    assert [choice.implementation for choice in choices] == ["triton"]
    loading.check_fast_attention(kernels, "bf16", choices)


def divergence(exact: torch.Tensor, other: torch.Tensor) -> float:
    """Mean divergence of the tokens' distributions, in nats."""
    p, q = exact.double().log_softmax(-1), other.double().log_softmax(-1)
    return float((p.exp() * (p - q)).sum(-1).mean())


@torch.inference_mode()
def test_eight_bits_lose_what_their_rounding_says() -> None:
    """On text that the model was not trained on.

    Small errors move logits in proportion, and the divergence grows with their square: from one kind of rounding to
    another, it goes as the mean squared error of keys and values. That of bfloat16 is the yardstick.
    """
    text = (ROOT / "runtime" / "scheduler.py").read_text()[:1800]
    ids = torch.tensor([AutoTokenizer.from_pretrained(PYLM)(text)["input_ids"]])
    length = ids.size(1)
    checkpoint = Checkpoint.open(PYLM)
    exact = load_decoder(checkpoint, device=CPU, dtype=torch.float32)
    kv = [exact.new_kv(1, length) for _ in exact.blocks]
    run = QueryRun(start=0, length=length, kv_length=length, block_table=(0,), first_block=0)
    batch = AttentionBatch(runs=(run,), slot_mapping=torch.arange(length))
    dense = exact.lm_head(exact.forward(ids[0], torch.arange(length), kv, batch))
    rows = [tensor[0] for layer in kv for tensor in layer.tensors()]

    def lost(kind: KVDtypeName) -> float:
        other = load_decoder(checkpoint, device=CPU, dtype=torch.float32, kv_dtype=kind)
        return divergence(dense, other.full_logits(ids)[0])

    def noise(kind: KVDtypeName) -> float:
        """Mean squared error relative to the squares of what is stored, the mean of layers."""
        back = [
            row.bfloat16().float() if kind == "bf16" else decode(*encode(row, KV_CODES[kind], None), row.dtype)
            for row in rows
        ]
        errors = [(row - found).square().sum() / row.square().sum() for row, found in zip(rows, back, strict=True)]
        return float(torch.stack(errors).mean())

    losses = {kind: lost(kind) for kind in KINDS}
    for kind in ("int8", "fp8"):
        expected = losses["bf16"] * noise(kind) / noise("bf16")
        # Measured: 0.64 and 0.83. Errors of one token or layer weigh more than another's, by no more than twofold.
        assert expected / 4 < losses[kind] < 2 * expected
    assert losses["bf16"] < losses["int8"] < losses["fp8"]
