"""The measurement of the engine against transformers: its arithmetic, not its times."""

import importlib
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

BENCH = Path(__file__).parents[1] / "bench"
PLAN = {"new_tokens": 3, "runs": 2, "batches": [1, 5], "prompt": 4, "prefill": 9}


def load(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCH))
    monkeypatch.delitem(sys.modules, name, raising=False)
    module = importlib.import_module(name)
    monkeypatch.setitem(sys.modules, name, module)
    return module


def test_both_make_the_same_number_of_steps(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch
    from transformers import LlamaForCausalLM

    from pressd.runtime import Engine, EngineConfig

    bench = load("engine_row", monkeypatch)
    engine = Engine.from_pretrained(tiny_llama, EngineConfig(max_batch=5, max_step_tokens=20))
    peer = bench.Peer(LlamaForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32))
    monkeypatch.setattr(bench, "open_engine", lambda *told: (engine, 1000, lambda: peer._model))
    found = bench.measure({"model": "tiny", "scheme": "none", "threads": None, "plan": PLAN})
    assert {
        name: {case: len(rates) for case, rates in cases.items()} for name, cases in found["tokens_per_s"].items()
    } == {
        "peer": {"1": 2, "5": 2, "prefill": 2},
        "ours": {"1": 2, "5": 2, "prefill": 2},
    }
    assert set(found["steps"]) == {"1", "5"}
    for split in found["steps"].values():
        assert 0 < split["host_ms"] < split["step_ms"]
        assert split["model_ms"] < split["step_ms"]
    assert found["memory"]["weights_bytes"] == engine.info.weights_bytes
    assert found["memory"]["artifact_bytes"] == 1000
    # The peer counts a tied head once; this one has its own.
    assert found["parameters"] == sum(p.numel() for p in peer._model.parameters())


def test_rates_are_of_the_steps_after_the_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = load("engine_row", monkeypatch)
    times = [10.0, 14.0, 14.5, 16.0]  # the prompts took 4 s, two more steps 2 s
    assert bench._rate("5", times, 5, 7) == 5.0
    assert bench._rate("prefill", times[:2], 1, 8) == 2.0


def test_document_holds_medians_and_ratios_of_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    report = load("engine_report", monkeypatch)
    split = {"step_ms": 3.0, "model_ms": 2.0, "host_ms": 1.0, "host_p95_ms": 1.5}
    row: dict[str, Any] = {
        "model": "tiny",
        "scheme": "w8a8",
        "plan": PLAN,
        "environment": {"processor": "Z", "torch": "1", "transformers": "2", "commit": "abc"},
        "date": "2026-01-01",
        "torch_threads": 2,
        "parameters": 1_500_000,
        "kernels": ["int8: fast"],
        "tokens_per_s": {"peer": {"1": [10.0, 20.0, 50.0]}, "ours": {"1": [30.0, 20.0, 100.0]}},
        "steps": {"1": split},
        "memory": {"weights_bytes": 3 << 20, "artifact_bytes": 2 << 20, "kv_bytes": 5 << 20, "rss_bytes": 7 << 20},
    }
    document = report.markdown([row, row | {"scheme": "bf16"}])
    # Ratios of the pairs are 3, 1 and 2, so that their median is not the ratio of the medians.
    assert "| w8a8 | 30.0 [20.0 to 100.0] **2.00x** | int8: fast |" in document
    assert "| transformers bf16 | 20.0 [10.0 to 50.0] |  |" in document
    assert "| bf16 | 2.00 + 1.00 (p95 1.50) |" in document
    assert "| w8a8 | 2.0 | 3.0 | 1.500 | 5.0 | 7.0 |" in document
    assert "## tiny (1.5 M parameters)" in document
