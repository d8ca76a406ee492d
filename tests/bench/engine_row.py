"""One row of tests/bench/engine.py, in a process of its own: told by a JSON argument, answers with JSON on stdout."""

import gc
import json
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import torch
from random_weights import RandomCheckpoint
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.generation import StoppingCriteria, StoppingCriteriaList

from pressd.compress import compress
from pressd.runtime.config import EngineConfig
from pressd.runtime.engine import Engine
from pressd.runtime.params import SamplingParams, StoppingParams
from pressd.runtime.request import Request
from pressd.runtime.startup import start_from

PYLM = Path(__file__).resolve().parents[2] / "examples" / "pylm"
BILLION = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "vocab_size": 32000,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "eos_token_id": None,
    "bos_token_id": None,
}
Prompts = list[list[int]]


class Stamps(StoppingCriteria):  # type: ignore[misc]  # transformers has no types
    """Notes when each step of transformers' generate ended; ends nothing."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        self.times.append(time.perf_counter())
        return torch.zeros(input_ids.shape[0], dtype=torch.bool)


class Peer:
    """transformers' generate: a static batch of prompts of one length, bfloat16, greedy."""

    def __init__(self, model: Any) -> None:
        self._model = model.eval()
        self._model.generation_config.eos_token_id = None

    def times(self, prompts: Prompts, new_tokens: int) -> list[float]:
        """Return when it began and when each step's tokens were there, in seconds."""
        ids, stamps = torch.tensor(prompts), Stamps()
        began = time.perf_counter()
        with torch.inference_mode():
            made = self._model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                max_new_tokens=new_tokens,
                pad_token_id=0,
                stopping_criteria=StoppingCriteriaList([stamps]),
            )
        assert made.shape == (len(prompts), len(prompts[0]) + new_tokens)
        return [began, *stamps.times]


class Ours:
    """The engine, stepped until all prompts are done; keeps seconds of its decode steps, all and outside of layers."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.steps: dict[int, list[tuple[float, float]]] = {}

    def times(self, prompts: Prompts, new_tokens: int) -> list[float]:
        began = time.perf_counter()
        for index, prompt in enumerate(prompts):
            request = Request(
                request_id=str(index),
                prompt_token_ids=tuple(prompt),
                sampling=SamplingParams(temperature=0.0),
                stopping=StoppingParams(max_new_tokens=new_tokens, ignore_eos=True),
            )
            self.engine.add(request)
        times, num_tokens = [began], 0
        while self.engine.has_work:
            result = self.engine.step()
            times.append(time.perf_counter())
            num_tokens += sum(len(output.token_ids) for output in result.outputs)
            stats = result.stats
            if stats.num_prefill_tokens == 0:
                self.steps.setdefault(len(prompts), []).append((stats.seconds, stats.host_seconds))
        # All prompts fit the first step, so that from then on every step gives each of them a token.
        assert num_tokens == len(prompts) * new_tokens == len(prompts) * (len(times) - 1)
        return times


def random_prompts(count: int, length: int, vocab_size: int, rng: random.Random) -> Prompts:
    return [[rng.randrange(vocab_size) for _ in range(length)] for _ in range(count)]


def open_engine(
    model: str, scheme: str, plan: dict[str, Any], threads: int | None
) -> tuple[Engine, int, Callable[[], Any]]:
    """Return the engine, the bytes of its artifact's tensors, and what makes transformers' model of the same shape."""
    config = EngineConfig(
        dtype="bfloat16",
        max_batch=max(plan["batches"]),
        max_step_tokens=plan["prefill"],
        max_context=1024,
        threads=threads,
    )
    if model == "pylm":
        with tempfile.TemporaryDirectory() as folder:
            compress(PYLM, scheme, Path(folder, "pressed"))
            gc.collect()
            engine = Engine.from_pretrained(Path(folder, "pressed"), config)
            size = sum(path.stat().st_size for path in Path(folder, "pressed").glob("*.safetensors"))
        return engine, size, lambda: LlamaForCausalLM.from_pretrained(PYLM, dtype=torch.bfloat16)
    torch.manual_seed(0)
    # Pressed through and through, head and embedding too, as the files of other engines are.
    made: Any = RandomCheckpoint(BILLION, scheme, device=torch.device("cpu"), dtype=torch.bfloat16, whole=True)
    engine = Engine(start_from(made, config, verify_seconds=0.0), config)
    return (
        engine,
        made.stored_bytes,
        lambda: LlamaForCausalLM._from_config(LlamaConfig(**BILLION), dtype=torch.bfloat16),
    )


def measure(told: dict[str, Any]) -> dict[str, Any]:
    plan = told["plan"]
    before = resident()
    engine, artifact_bytes, make_peer = open_engine(told["model"], told["scheme"], plan, told["threads"])
    gc.collect()
    memory = {
        "weights_bytes": engine.info.weights_bytes,
        "artifact_bytes": artifact_bytes,
        "kv_bytes": engine.info.kv_bytes,
        "rss_bytes": resident() - before,
    }
    contenders = {"peer": Peer(make_peer()), "ours": Ours(engine)}
    cases = [(str(batch), batch, plan["prompt"], plan["new_tokens"]) for batch in plan["batches"]]
    cases.append(("prefill", 1, plan["prefill"], 1))
    rates: dict[str, dict[str, list[float]]] = {name: {case[0]: [] for case in cases} for name in contenders}
    rng = random.Random(0)
    for run in range(plan["runs"] + 1):
        for case, count, length, new_tokens in cases:
            # New ones every time: the prefix cache must find nothing.
            prompts = random_prompts(count, length, engine.info.vocab_size, rng)
            for name, contender in contenders.items():
                times = contender.times(prompts, new_tokens if run else min(new_tokens, 4))
                if run:  # the first run warms up
                    rates[name][case].append(_rate(case, times, count, length))
        if run == 0:
            contenders["ours"].steps.clear()
    return {
        "memory": memory,
        "parameters": sum(p.numel() for p in contenders["peer"]._model.parameters()),
        "torch_threads": torch.get_num_threads(),
        "kernels": sorted({f"{choice.storage}: {choice.implementation}" for choice in engine.info.kernels}),
        "tokens_per_s": rates,
        "steps": {str(batch): _split(steps) for batch, steps in contenders["ours"].steps.items()},
    }


def _rate(case: str, times: list[float], count: int, length: int) -> float:
    """Tokens per second: of the prompt until its first token, or of all steps but the first, which is the prompt's."""
    if case == "prefill":
        return length / (times[1] - times[0])
    return count * (len(times) - 2) / (times[-1] - times[1])


def _split(steps: list[tuple[float, float]]) -> dict[str, float]:
    return {
        "step_ms": 1e3 * statistics.median(seconds for seconds, _ in steps),
        "model_ms": 1e3 * statistics.median(seconds - host for seconds, host in steps),
        "host_ms": 1e3 * statistics.median(host for _, host in steps),
        "host_p95_ms": 1e3 * statistics.quantiles([host for _, host in steps], n=20)[-1],
    }


def resident() -> int:
    """Bytes of this process that are in memory."""
    return int(psutil.Process().memory_info().rss)


if __name__ == "__main__":
    print(json.dumps(measure(json.loads(sys.argv[1]))))
