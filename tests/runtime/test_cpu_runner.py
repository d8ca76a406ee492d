"""Decoding steps that are replayed: the same tokens as without, and what a step costs in counts, not in time."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from pressd.compress import compress
from pressd.runtime.config import EngineConfig
from pressd.runtime.engine import Engine
from pressd.runtime.kernels.catalogue import pointwise_kernels
from pressd.runtime.kernels.registry import REFERENCE, describe_device
from pressd.runtime.params import SamplingParams, StoppingParams
from pressd.runtime.request import Request

CPU = describe_device(torch.device("cpu"))
pytestmark = pytest.mark.skipif(
    pointwise_kernels(CPU)[0].name == REFERENCE or pointwise_kernels(CPU)[0].why_not(torch.bfloat16, CPU) is not None,
    reason="this CPU has no VNNI to generate code for",
)
LAYERS, VOCABULARY = 3, 320
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": None,
    "eos_token_id": None,
}
# Kernels of a layer: norm, qkv, rotation, attention, codes, output, norm, gate and up, gate, down; and at the end the
# norm, codes and the head.
PER_LAYER, AT_THE_END = 10, 3


def pressed(
    folder: Path, scheme: str, *, layers: int = LAYERS, head: str | None = None, windowed: bool = False
) -> Path:
    """Press a random model, its head too."""
    torch.manual_seed(0)
    made: Any
    if windowed:
        config = Qwen3Config(
            **SIZES,
            head_dim=32,
            num_hidden_layers=layers,
            use_sliding_window=True,
            sliding_window=24,
            max_window_layers=1,
        )
        made = Qwen3ForCausalLM(config)
    else:
        made = LlamaForCausalLM(LlamaConfig(**SIZES, num_hidden_layers=layers))
    made.to(torch.bfloat16).save_pretrained(folder / "source")
    recipe = folder / "recipe.toml"
    recipe.write_text(f'[scheme]\n"*" = "{scheme}"\nlm_head = "{head or scheme}"\n')
    (folder / "source" / "generation_config.json").write_text(json.dumps({}))
    compress(folder / "source", recipe, folder / "pressed")
    return folder / "pressed"


def engine_of(path: Path, **settings: Any) -> Engine:
    defaults = {"dtype": "bfloat16", "max_batch": 4, "max_step_tokens": 32, "max_context": 200}
    return Engine.from_pretrained(path, EngineConfig(**(defaults | settings)))


def run(engine: Engine, *, temperature: float = 0.0, new: int = 20) -> dict[str, list[int]]:
    """Several sequences that come and go, prompts among them that are longer than a step."""
    for index, length in enumerate((3, 40, 17, 1, 70, 25)):
        request = Request(
            request_id=str(index),
            prompt_token_ids=tuple((7 * index + 13 * place) % VOCABULARY for place in range(length)),
            sampling=SamplingParams(temperature=temperature, seed=index),
            stopping=StoppingParams(max_new_tokens=new + index, ignore_eos=True),
        )
        engine.add(request)
    found: dict[str, list[int]] = {}
    while engine.has_work:
        for output in engine.step().outputs:
            found.setdefault(output.request_id, []).extend(output.token_ids)
    return found


@pytest.fixture(scope="module", params=["w4a8g32", "w8a8"])
def artifact(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pressed(tmp_path_factory.mktemp("pressed"), request.param)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_replayed_steps_give_the_same_tokens(artifact: Path, dtype: str, temperature: float) -> None:
    replaying, plain = engine_of(artifact, dtype=dtype), engine_of(artifact, dtype=dtype)
    plain._runner.why_not = "for comparison"  # type: ignore[attr-defined]
    assert run(replaying, temperature=temperature) == run(plain, temperature=temperature)
    recorded = replaying._runner._steps  # type: ignore[attr-defined]
    assert {1, 2, 3, 4} >= set(recorded) >= {1, 4}
    assert set(plain._runner._steps) == {1}, "what the start has recorded"  # type: ignore[attr-defined]
    # Again, with what was recorded before for other sequences.
    assert run(replaying, temperature=temperature) == run(plain, temperature=temperature)


def test_layers_with_windows_and_without(tmp_path: Path) -> None:
    path = pressed(tmp_path, "w8a8", windowed=True)
    replaying, plain = engine_of(path), engine_of(path)
    plain._runner.why_not = "for comparison"  # type: ignore[attr-defined]
    assert run(replaying, new=60) == run(plain, new=60)
    assert len(replaying._runner.groups) == 2
    assert replaying._runner._steps[4][1].num_kernels == PER_LAYER * LAYERS + AT_THE_END  # type: ignore[attr-defined]


def test_a_dense_head_is_computed_outside(tmp_path: Path) -> None:
    path = pressed(tmp_path, "w4a8g64", head="bf16")
    replaying, plain = engine_of(path), engine_of(path)
    plain._runner.why_not = "for comparison"  # type: ignore[attr-defined]
    assert run(replaying) == run(plain)
    (_, replay), *_ = replaying._runner._steps.values()  # type: ignore[attr-defined]
    assert replay.num_kernels == PER_LAYER * LAYERS + 1


def test_dense_layers_are_not_recorded_and_it_is_said_why(tmp_path: Path) -> None:
    engine = engine_of(pressed(tmp_path, "bf16"))
    assert len(run(engine)) == 6
    assert "no generated kernel" in str(engine._runner.why_not)  # type: ignore[attr-defined]
    assert not engine._runner._steps  # type: ignore[attr-defined]


def test_keys_and_values_in_pieces_are_gathered_as_before(artifact: Path) -> None:
    """A pool so small that runs are cut up."""
    tight = {"kv_memory": 26 * 16 * 2 * 2 * 32 * 2 * LAYERS, "prefix_cache": False}
    replaying, plain = engine_of(artifact, **tight), engine_of(artifact, **tight)
    plain._runner.why_not = "for comparison"  # type: ignore[attr-defined]
    assert run(replaying, new=60) == run(plain, new=60)


class Counting(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts PyTorch's operators and the bytes of what they make, views apart."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.operators: Counter[str] = Counter()
        self.bytes = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        self.operators[function.name()] += 1
        known = {t.untyped_storage().data_ptr() for t in args if isinstance(t, torch.Tensor)}
        for made in result if isinstance(result, (list, tuple)) else (result,):
            if isinstance(made, torch.Tensor) and made.untyped_storage().data_ptr() not in known:
                self.bytes += made.nbytes
        return result


def decoding_step(path: Path, batch: int) -> tuple[Counting, int]:
    """Return what one step counts that decodes a token of each sequence, and its generated kernels."""
    engine = engine_of(path)
    for index in range(batch):
        request = Request(
            request_id=str(index),
            prompt_token_ids=tuple(range(index, index + 5)),
            sampling=SamplingParams(temperature=0.0),
            stopping=StoppingParams(max_new_tokens=8, ignore_eos=True),
        )
        engine.add(request)
    for _ in range(3):
        engine.step()
    with Counting() as counting:
        result = engine.step()
    assert [len(output.token_ids) for output in result.outputs] == [1] * batch
    return counting, engine._runner._steps[batch][1].num_kernels  # type: ignore[attr-defined]


def test_what_a_decoding_step_costs(tmp_path: Path) -> None:
    """A guard that is no timing: operators do not grow with layers, kernels are those named above, bytes are bounded.

    Of each logit a step makes a float32, and compares it once or twice in blocks; of each sequence it makes some
    dozens of 8-byte numbers, and three vectors of the hidden size.
    """
    counts = {}
    for layers in (2, 4):
        (tmp_path / str(layers)).mkdir()
        path = pressed(tmp_path / str(layers), "w4a8g32", layers=layers)
        for batch in (1, 4):
            counting, kernels = decoding_step(path, batch)
            assert kernels == PER_LAYER * layers + AT_THE_END
            assert counting.bytes <= batch * (8 * VOCABULARY + 1024 + 16 * SIZES["hidden_size"])
            counts[layers, batch] = counting.operators
    assert counts[2, 1] == counts[4, 1]
    assert counts[2, 4] == counts[4, 4]
    assert sum(counts[4, 4].values()) <= 130
