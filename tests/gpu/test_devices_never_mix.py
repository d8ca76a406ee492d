"""The whole engine on a GPU that is not there: tensors without data that know their device and refuse to meet others.

PyTorch's FakeTensorMode runs every operator on shapes, types and devices alone, and raises where tensors of two devices
meet, as CUDA would. Weights come from the CPU, as they do from a file.
"""

import importlib.util
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import _disable_current_modes

from pressd.runtime import runner, startup
from pressd.runtime.config import EngineConfig
from pressd.runtime.engine import Engine
from pressd.runtime.kernels.registry import Device
from pressd.runtime.models import loading
from pressd.runtime.params import SamplingParams, StoppingParams
from pressd.runtime.request import FinishReason, Request
from pressd.runtime.sampling import Sampler, TokenMasks

CUDA = torch.device("cuda", 0)
SCHEMES = (
    *("bf16", "w8a8", "w8a16", "w4a16g32", "w3a16g32", "w4a8g32"),
    *("sparse24:w4a16", "sparse24:bf16", "lowrank8:bf16", "w4a16g32+residual4"),
)
SHAPE = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 97,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-6,
    "attention_bias": True,
    "mlp_bias": True,
    "tie_word_embeddings": False,
}


@pytest.fixture(scope="module")
def random_weights() -> ModuleType:
    path = Path(__file__).parents[1] / "bench" / "random_weights.py"
    spec = importlib.util.spec_from_file_location("random_weights", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Detours(TorchFunctionMode):
    """Does by operators what Python methods of PyTorch do only after they have found a driver for the device."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return DETOURS.get(func, func)(*args, **(kwargs or {}))


def indices(key: list[int] | torch.Tensor) -> torch.Tensor:
    return key if isinstance(key, torch.Tensor) else literal(key)


def pick(tensor: torch.Tensor, key: Any) -> torch.Tensor:
    """Return tensor[key] for integers, slices, None, an ellipsis, and one list or tensor of indices."""
    keys = list(key) if isinstance(key, tuple) else [key]
    if Ellipsis in [item for item in keys if not isinstance(item, torch.Tensor)]:
        at = keys.index(Ellipsis)
        given = len(keys) - 1 - sum(item is None for item in keys)
        keys[at : at + 1] = [slice(None)] * (tensor.dim() - given)
    dim = 0
    for item in keys:
        if item is None:
            tensor = tensor.unsqueeze(dim)
        elif isinstance(item, slice):
            tensor = torch.ops.aten.slice(tensor, dim, item.start, item.stop, item.step or 1)
        elif isinstance(item, int):
            tensor, dim = tensor.select(dim, item), dim - 1
        else:
            tensor = torch.ops.aten.index(tensor, [*[None] * dim, indices(item)])
        dim += 1
    return tensor


def put(tensor: torch.Tensor, key: Any, value: torch.Tensor) -> None:
    """Do tensor[key] = value."""
    if isinstance(key, (list, torch.Tensor)):
        torch.ops.aten.index_put_(tensor, [indices(key)], value)
    else:
        torch.ops.aten.copy_(pick(tensor, key), value)


def literal(
    values: Any, *, dtype: torch.dtype | None = None, device: torch.device | None = None, pin_memory: bool = False
) -> torch.Tensor:
    """Do torch.tensor(values); the values can be read back. Nothing is pinned: that takes a driver."""
    with _disable_current_modes():
        known = torch.tensor(values, dtype=dtype)
    tensor = torch.empty(tuple(known.shape), dtype=known.dtype, device=device)
    tensor.known = known
    return tensor


DETOURS: dict[Any, Callable[..., Any]] = {
    torch.tensor: literal,
    torch.Tensor.__getitem__: pick,
    torch.Tensor.__setitem__: put,
    torch.Tensor.__invert__: torch.bitwise_not,
    torch.Tensor.contiguous: torch.ops.aten.contiguous,
    torch.Tensor.copy_: torch.ops.aten.copy_,
}


class NoReadback:
    """Tensors stay where they are: an event takes a driver."""

    def __init__(self, tensors: Sequence[torch.Tensor]) -> None:
        self._tensors = tensors

    def wait(self) -> Sequence[torch.Tensor]:
        return self._tensors


@pytest.fixture(autouse=True)
def fake_cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A GPU of compute capability 9.0 without data; what the host reads back from it is made up."""
    device = Device(torch_device=CUDA, features=frozenset({"sm_90"}))
    monkeypatch.setattr(startup, "pick_device", lambda config: CUDA)
    monkeypatch.setattr(loading, "describe_device", lambda torch_device: device)

    def read_back(tensor: FakeTensor) -> list[Any]:
        with _disable_current_modes():
            if (known := getattr(tensor, "known", None)) is None:
                # That logits are finite is true, and what was drawn is token 0.
                known = torch.full(tuple(tensor.shape), tensor.dtype == torch.bool, dtype=tensor.dtype)
            return known.tolist()

    monkeypatch.setattr(FakeTensor, "tolist", read_back)
    monkeypatch.setattr(runner, "Readback", NoReadback)
    with FakeTensorMode(), Detours():
        yield


def start(random_weights: ModuleType, scheme: str, dtype: torch.dtype, *, whole: bool = False, **shape: Any) -> Engine:
    cpu = torch.device("cpu")
    checkpoint = random_weights.RandomCheckpoint(SHAPE | shape, scheme, device=cpu, dtype=dtype, whole=whole)
    config = EngineConfig(
        kernels="reference", block_size=4, max_batch=3, max_step_tokens=8, kv_memory=1 << 16, overlap=False
    )
    return Engine(startup.start_from(checkpoint, config, verify_seconds=0.0), config)


def add(engine: Engine) -> None:
    """Prompts of 1, 6 and 13 tokens in steps of 8; greedy, drawn, and drawn within top_p."""
    settings = (
        SamplingParams(temperature=0.0),
        SamplingParams(temperature=0.7, seed=5),
        SamplingParams(temperature=1.0, top_p=0.8, seed=6),
    )
    for length, sampling in zip((1, 6, 13), settings, strict=True):
        stopping = StoppingParams(max_new_tokens=2, ignore_eos=True)
        request_id, prompt = f"r{length}", tuple(range(length))
        engine.add(Request(request_id=request_id, prompt_token_ids=prompt, sampling=sampling, stopping=stopping))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_engine_keeps_everything_on_one_device(random_weights: ModuleType, scheme: str) -> None:
    check(start(random_weights, scheme, torch.bfloat16))


@pytest.mark.parametrize(("scheme", "tied"), [("w8a8", True), ("w4a16g32", False)])
def test_pressed_embeddings_and_heads_do(random_weights: ModuleType, scheme: str, tied: bool) -> None:
    check(start(random_weights, scheme, torch.bfloat16, whole=True, tie_word_embeddings=tied))


@pytest.mark.parametrize("architecture", sorted(loading.FAMILIES))
def test_every_family_does(random_weights: ModuleType, architecture: str) -> None:
    """With tied embeddings, in float32, where a family has one with a window, and on scattered blocks."""
    shape = {"architectures": [architecture], "num_hidden_layers": 2, "sliding_window": 7, "tie_word_embeddings": True}
    engine = start(random_weights, "bf16", torch.float32, **shape)
    for pool in engine._kv.pools:
        blocks = pool.allocate(1, pool.num_blocks)
        assert blocks is not None
        pool.release(blocks[::2], -1)
    check(engine)
    assert engine.stats().kv_gathers > 0


def check(engine: Engine) -> None:
    add(engine)
    outputs = [output for _ in range(8) for output in engine.step().outputs]
    assert [output.finish_reason for output in outputs if output.finish_reason] == 3 * [FinishReason.MAX_TOKENS]
    assert engine.info.device == "cuda:0"
    for layer in engine._runner.kv:
        assert layer.keys.device == layer.values.device == CUDA


def misplace(engine: Engine, what: str) -> None:
    """Leave one tensor of the engine on the CPU."""
    runner, decoder = engine._runner, engine._runner.decoder
    block = decoder.blocks[0]
    if what == "keys":
        runner.kv[0] = replace(runner.kv[0], keys=runner.kv[0].keys.cpu())
    elif what == "rotary":
        decoder.rotary.cos = decoder.rotary.cos.cpu()
    elif what == "weight":
        packed = block.mlp.down.packed
        packed.update({name: tensor.cpu() for name, tensor in packed.items()})
    else:
        owner = block.attention.qkv if what == "bias" else block.input_norm
        object.__setattr__(owner, what, getattr(owner, what).cpu())


@pytest.mark.parametrize("what", ["keys", "rotary", "weight", "bias", "gain"])
def test_a_tensor_left_on_the_cpu_is_found(random_weights: ModuleType, what: str) -> None:
    engine = start(random_weights, "w4a16g32", torch.float32)
    misplace(engine, what)
    add(engine)
    with pytest.raises(RuntimeError, match="device"):
        engine.step()


SAMPLED = {
    "top_k": SamplingParams(top_k=5),
    "top_k of hundreds": SamplingParams(top_k=300),
    "top_p and min_p": SamplingParams(top_p=0.9, min_p=0.1),
    "typical_p": SamplingParams(typical_p=0.9),
    "penalties": SamplingParams(repetition_penalty=1.2, presence_penalty=0.1, frequency_penalty=0.1),
    "words": SamplingParams(
        temperature=0.0, bad_words=((1,), (2, 3)), logit_bias=((1, 1.0),), allowed_token_ids=(1, 2)
    ),
    "logprobs": SamplingParams(temperature=0.0, logprobs=True, top_logprobs=5),
}


@pytest.mark.parametrize("setting", SAMPLED)
def test_the_sampler_does_in_every_setting(setting: str) -> None:
    """Beside a greedy row, and with a mask: all results on the device."""
    vocab, stopping = 1000, StoppingParams(min_new_tokens=3)
    table = torch.zeros(3, 16, dtype=torch.int64, device=CUDA)
    sampler = Sampler(num_rows=3, vocab_size=vocab, eos_token_ids=[0], device=CUDA, token_table=table)
    for row, sampling in enumerate((SAMPLED[setting], SamplingParams(temperature=0.0), SAMPLED[setting])):
        request = Request(request_id="x", prompt_token_ids=(1, 2), sampling=sampling, stopping=stopping)
        sampler.admit(row, request, 0, 4)
    masks = TokenMasks([1], torch.zeros(1, 32, dtype=torch.int32, device=CUDA))
    for rows in ([0, 1, 2], [2, 0]):
        logits = torch.zeros(len(rows), vocab, device=CUDA)
        positions = torch.full((len(rows),), 4, device=CUDA)
        drawn = sampler.sample(logits, rows, positions, masks)
        assert drawn.token_ids.device == drawn.finite.device == drawn.possible.device == CUDA
        assert drawn.token_ids.shape == drawn.finite.shape == drawn.possible.shape == (len(rows),)
        assert (drawn.logprobs is not None) == (setting == "logprobs")
    sampler.release(0)


def test_a_sampler_that_forgets_its_device_is_found(
    random_weights: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = start(random_weights, "bf16", torch.float32)
    monkeypatch.setattr(
        "pressd.runtime.sampling.plan.upload", lambda values, dtype, device: literal(values, dtype=dtype)
    )
    add(engine)
    with pytest.raises(RuntimeError, match="device"):
        engine.step()
