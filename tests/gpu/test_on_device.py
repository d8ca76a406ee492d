"""The engine on a GPU computes what it computes on the CPU: the same tests, on both.

The reference is our own decoder on reference kernels in float64 on the CPU, which tests/conformance holds against
transformers. Run with `make gpu`; without a GPU only the half on the CPU runs, so that the tests stay alive.
"""

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from pressd.compress import compress
from pressd.runtime.artifact.reader import Checkpoint
from pressd.runtime.config import DeviceName, EngineConfig
from pressd.runtime.engine import Engine
from pressd.runtime.kernels.attention.batch import AttentionBatch, QueryRun, page
from pressd.runtime.models import Decoder, load_decoder
from pressd.runtime.params import SamplingParams, StoppingParams
from pressd.runtime.request import Request
from pressd.runtime.sampling import Drawn, Sampler, TokenMasks
from pressd.runtime.sampling.noise import exact_times, position_keys, sequence_key

PYLM = Path(__file__).parents[2] / "examples" / "pylm"
CPU = torch.device("cpu")
SEQUENCES, LENGTH = 2, 40
MODELS = ("pylm", "tiny_llama")
# 128 does not divide the tiny model's 160 columns.
SCHEMES = {"pylm": ("dense", "w8a8", "w8a16", "w4a16g128", "w3a16g32"), "tiny_llama": ("dense", "w8a8", "w4a16g32")}
CASES = [(model, scheme) for model in MODELS for scheme in SCHEMES[model]]


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> torch.device:
    # TF32 would round the inputs of float32 products to 11 bits; off is PyTorch's default, and the bounds rely on it.
    assert torch.get_float32_matmul_precision() == "highest"
    return torch.device("cuda", 0) if request.param == "cuda" else CPU


@pytest.fixture(scope="module")
def pressed(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Path]:
    """Directory of every model in every scheme."""
    sources = {"pylm": PYLM, "tiny_llama": tiny_llama}
    paths = {}
    for model, scheme in CASES:
        paths[model, scheme] = sources[model]
        if scheme != "dense":
            paths[model, scheme] = tmp_path_factory.mktemp(model) / scheme
            compress(sources[model], scheme, paths[model, scheme])
    return paths


@pytest.fixture(scope="module")
def expected(pressed: dict[tuple[str, str], Path]) -> dict[tuple[str, str], tuple[torch.Tensor, torch.Tensor]]:
    """Token ids [SEQUENCES, LENGTH] and their logits, by the reference."""
    found = {}
    for case, path in pressed.items():
        decoder = load_decoder(Checkpoint.open(path), device=CPU, dtype=torch.float64, prefer="reference")
        generator = torch.Generator().manual_seed(4)
        ids = torch.randint(0, decoder.config.vocab_size, (SEQUENCES, LENGTH), generator=generator)
        with torch.inference_mode():
            found[case] = ids, decoder.full_logits(ids)
    return found


def bound(dtype: torch.dtype, scheme: str, decoder: Decoder) -> float:
    """Largest relative error, as norm of the difference over norm of the reference, that rounding explains."""
    num_layers, hidden = len(decoder.blocks), decoder.config.hidden_size
    # How much a layer's error may have grown when it reaches the logits: attention sharpens differences.
    growth = 4
    if scheme == "w8a8" and dtype != torch.float64:
        # Whatever of a row lies half way between two codes is decided by the last bits of a sum: in float32, one value
        # may be off by a step, that is by 1 / 127.5 of some 3.5 root mean squares, in one of `hidden` columns; float64
        # has 29 more bits, and no value was ever that close. bfloat16 moves all values, by up to a tenth of a step:
        # rounded to codes, two such inputs differ by up to two independent roundings, sqrt(2 / 12) of a step each.
        steps = (2 / 12) ** 0.5 if dtype == torch.bfloat16 else hidden**-0.5
        return growth * 3.5 / 127.5 * steps * (4 * num_layers) ** 0.5  # four linears a layer, in quadrature
    if dtype == torch.bfloat16:
        # 14 roundings a layer (two norms, two gains, qkv, rotation, attention, o, gate and up, silu, product, down, two
        # sums) of at most 2^-9, in quadrature as they are independent. Those of decoded weights average out in a sum.
        return growth * 2**-9 * (14 * num_layers) ** 0.5
    # The bound of every family's conformance test, and its counterpart for 29 more bits.
    return 1e-4 if dtype == torch.float32 else 1e-4 * 2**-29


def relative_error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours.cpu().double() - theirs).norm() / theirs.norm())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_logits(
    device: torch.device,
    dtype: torch.dtype,
    case: tuple[str, str],
    pressed: dict[tuple[str, str], Path],
    expected: dict[tuple[str, str], tuple[torch.Tensor, torch.Tensor]],
) -> None:
    """At once, and through the paged cache in pieces on blocks in no particular order."""
    ids, logits = expected[case]
    decoder = load_decoder(Checkpoint.open(pressed[case]), device=device, dtype=dtype)
    limit = bound(dtype, case[1], decoder)
    with torch.inference_mode():
        ours = decoder.full_logits(ids)
        assert ours.device == device
        assert relative_error(ours, logits) < limit
        assert relative_error(_paged(decoder, ids[0], chunk=17), logits[0]) < limit
    misplaced = [tensor.device for tensor in _tensors(decoder) if tensor.device != device]
    assert misplaced == []


def _paged(decoder: Decoder, token_ids: torch.Tensor, chunk: int) -> torch.Tensor:
    block_size, table = 8, (5, 1, 4, 0, 3)
    kv = [decoder.new_kv(len(table) + 1, block_size) for _ in decoder.blocks]
    assert all(layer.keys.device == layer.values.device == decoder.device for layer in kv)
    pieces = []
    for start in range(0, LENGTH, chunk):
        stop = min(start + chunk, LENGTH)
        slots = [table[p // block_size] * block_size + p % block_size for p in range(start, stop)]
        run = QueryRun(start=0, length=stop - start, kv_length=stop, block_table=table, first_block=None)
        decoding, prompts = page((run,), block_size, decoder.device)
        batch = AttentionBatch(
            runs=(run,),
            slot_mapping=torch.tensor(slots, device=decoder.device),
            decoding=decoding,
            prompts=prompts,
        )
        positions = torch.arange(start, stop, device=decoder.device)
        pieces.append(decoder.lm_head(decoder.forward(token_ids[start:stop].to(decoder.device), positions, kv, batch)))
    return torch.cat(pieces)


def _tensors(part: object) -> Iterator[torch.Tensor]:
    """Every tensor a layer holds, wherever; a stored weight's shape (two numbers, read by the host) is left out."""
    if isinstance(part, torch.Tensor):
        if part.numel() > 2:
            yield part
    elif isinstance(part, dict):
        for value in part.values():
            yield from _tensors(value)
    elif isinstance(part, (tuple, list)):
        for value in part:
            yield from _tensors(value)
    elif dataclasses.is_dataclass(part) and not isinstance(part, type):
        for field in dataclasses.fields(part):
            yield from _tensors(getattr(part, field.name))
    elif type(part).__module__.startswith("pressd."):
        yield from _tensors(list(vars(part).values()))


@pytest.mark.parametrize("model", MODELS)
def test_greedy_tokens_equal_transformers_on_the_cpu(
    device: torch.device, model: str, pressed: dict[tuple[str, str], Path]
) -> None:
    from transformers import LlamaForCausalLM

    path = pressed[model, "dense"]
    theirs = LlamaForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    engine = _engine(path, device, "float32")
    prompts = _prompts(engine)
    ours = engine.generate(prompts, stopping=StoppingParams(max_new_tokens=16, ignore_eos=True))
    for prompt, completion in zip(prompts, ours, strict=True):
        ids = torch.tensor([prompt])
        lengths = {"min_new_tokens": 16, "max_new_tokens": 16, "eos_token_id": None, "pad_token_id": 0}
        whole = theirs.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, **lengths)
        assert list(completion.token_ids) == whole[0, len(prompt) :].tolist()


# Without w8a8: on another device the last bits of a sum differ, and with them a code may (see bound).
@pytest.mark.parametrize("case", [("pylm", "dense"), ("pylm", "w4a16g128"), ("tiny_llama", "w4a16g32")], ids="-".join)
def test_drawn_tokens_equal_those_of_the_cpu(
    device: torch.device, case: tuple[str, str], pressed: dict[tuple[str, str], Path]
) -> None:
    """In float64, where no draw is near enough to another to depend on the order of a sum; together and alone."""
    engine, reference = _engine(pressed[case], device, "float64"), _engine(pressed[case], CPU, "float64")
    prompts = _prompts(engine)
    sampling, stopping = SamplingParams(temperature=1.0, top_p=0.9, seed=7), StoppingParams(max_new_tokens=6)
    answers = engine.generate(prompts, sampling, stopping)
    assert answers == reference.generate(prompts, sampling, stopping)
    assert answers[-1:] == engine.generate(prompts[-1:], sampling, stopping)


def _engine(path: Path, device: torch.device, dtype: str) -> Engine:
    name: DeviceName = "cuda" if device.type == "cuda" else "cpu"
    settings = EngineConfig(device=name, dtype=dtype, max_batch=3, max_step_tokens=16, kv_memory=1 << 24)
    engine = Engine.from_pretrained(path, settings)
    assert engine.info.device == str(device)
    on_cpu = {choice.implementation for choice in engine.info.kernels if choice.implementation.startswith("cpu")}
    assert device.type == "cpu" or not on_cpu
    for layer in engine._runner.kv:
        assert layer.keys.device == layer.values.device == device
    return engine


def _prompts(engine: Engine) -> list[list[int]]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(0, engine.info.vocab_size, (n,), generator=generator).tolist() for n in (1, 9, 37)]


DRAWN = (
    SamplingParams(temperature=0.0),
    SamplingParams(temperature=0.7, seed=1),
    SamplingParams(temperature=1.3, top_p=0.8, seed=2),
    SamplingParams(top_k=50, top_p=0.9, min_p=0.01, seed=3),
    SamplingParams(top_k=900, typical_p=0.8, seed=4),
    SamplingParams(repetition_penalty=1.3, frequency_penalty=0.2, presence_penalty=0.1, seed=5),
    SamplingParams(bad_words=((2, 3), (4,)), logit_bias=((7, 2.0),), allowed_token_ids=tuple(range(3000)), seed=6),
    SamplingParams(temperature=0.9, logprobs=True, top_logprobs=5, seed=7),
)


def _drawn(device: torch.device, steps: int) -> list[Drawn]:
    """What every setting draws from logits float64 [rows, 4099], the last row masked by a constraint."""
    vocab, generator = 4099, torch.Generator().manual_seed(8)
    table = torch.randint(vocab, (len(DRAWN), 80), generator=generator).to(device)
    sampler = Sampler(num_rows=len(DRAWN), vocab_size=vocab, eos_token_ids=[0], device=device, token_table=table)
    for row, sampling in enumerate(DRAWN):
        stopping = StoppingParams(min_new_tokens=30)
        request = Request(request_id="x", prompt_token_ids=(5,) * 20, sampling=sampling, stopping=stopping)
        sampler.admit(row, request, row % 2, 40)
    results = []
    for step in range(steps):
        logits = 3 * torch.randn(len(DRAWN), vocab, generator=generator, dtype=torch.float64)
        bits = torch.randint(-(2**31), 2**31, (1, -(-vocab // 32)), generator=generator).to(torch.int32)
        masks = TokenMasks([len(DRAWN) - 1], bits.to(device))
        positions = torch.full((len(DRAWN),), 40 + step, device=device)
        results.append(sampler.sample(logits.to(device), list(range(len(DRAWN))), positions, masks))
        table[:, 40 + step] = results[-1].token_ids
    return results


def test_noise_and_draws_are_the_cpus(device: torch.device) -> None:
    """Settings that the GPU filters in another way included."""
    sequences = torch.tensor([sequence_key(seed, index) for seed, index in ((0, 0), (1, 5), (2**64 - 1, 63))])
    positions, tokens = torch.tensor([0, 5, 2**31]), torch.arange(4099).expand(3, -1)
    ours = exact_times(position_keys(sequences.to(device), positions.to(device)), tokens.to(device))
    theirs = exact_times(position_keys(sequences, positions), tokens)
    # The hash is in integers and the uniform number exact; one float64 logarithm, within two ulps each.
    torch.testing.assert_close(ours.cpu(), theirs, rtol=4 * 2.0**-52, atol=0)
    for here, there in zip(_drawn(device, 30), _drawn(CPU, 30), strict=True):
        assert here.token_ids.device == device
        assert torch.equal(here.token_ids.cpu(), there.token_ids)
        assert here.finite.all()
        assert here.possible.all()
        assert here.logprobs is not None
        assert there.logprobs is not None
        # Sums of 4,099 numbers up to 1 in float64, and a difference of numbers below 40.
        torch.testing.assert_close(here.logprobs.top_logprobs.cpu(), there.logprobs.top_logprobs, rtol=0, atol=1e-13)
        assert torch.equal(here.logprobs.top_ids.cpu(), there.logprobs.top_ids)


@pytest.mark.gpu
def test_sampling_does_not_wait_for_the_gpu() -> None:
    """Under a mode in which every wait raises, after a first step that builds what is kept."""
    device = torch.device("cuda", 0)
    vocab, rows = 4099, list(range(len(DRAWN)))
    table = torch.zeros(len(DRAWN), 80, dtype=torch.int64, device=device)
    sampler = Sampler(num_rows=len(DRAWN), vocab_size=vocab, eos_token_ids=[0], device=device, token_table=table)
    for row, sampling in enumerate(DRAWN):
        sampler.admit(row, Request(request_id="x", prompt_token_ids=(5,) * 20, sampling=sampling), 0, 40)
    logits, positions = torch.randn(len(DRAWN), vocab, device=device), torch.full((len(DRAWN),), 40, device=device)
    sampler.sample(logits, rows, positions)
    torch.cuda.set_sync_debug_mode("error")
    try:
        sampler.sample(logits, rows, positions)
        sampler.sample(logits[:4], rows[2:6], positions[:4])
    finally:
        torch.cuda.set_sync_debug_mode("default")
