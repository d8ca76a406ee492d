"""The measurement of the engine, small and on the CPU: its arithmetic, not its times."""

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

BENCH = Path(__file__).parents[1] / "bench"
HIDDEN, LAYERS, FFN, VOCAB = 128, 2, 256, 97
SHAPE = f"--hidden {HIDDEN} --layers {LAYERS} --heads 2 --kv-heads 1 --ffn {FFN} --vocab {VOCAB} --steps 2 --runs 1"


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCH))
    spec = importlib.util.spec_from_file_location("bench_gpu", BENCH / "gpu.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "bench_gpu", module)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "COPY_BYTES", {"cpu": 1 << 20})
    return module


def test_bytes_and_shares_add_up(
    bench: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--device=cpu", *SHAPE.split(), "--json", f"--out={tmp_path}"])
    bench.main()
    found = json.loads(capsys.readouterr().out)
    assert json.loads((tmp_path / "bench.json").read_text()) == found
    assert (tmp_path / "bench.md").read_text().count("random Llama") == len(bench.SCHEMES)
    # q and o [128, 128], k and v [64, 128], gate, up and down; norms in between; head, and the embedding beside it.
    linears = LAYERS * (2 * HIDDEN * HIDDEN + 2 * 64 * HIDDEN + 3 * HIDDEN * FFN)
    norms = (2 * LAYERS + 1) * HIDDEN
    dense = {row["scheme"]: row for row in found["rows"]}["bf16"]
    assert dense["parameters"] == linears + norms + 2 * VOCAB * HIDDEN
    assert dense["weights_bytes"] == 2 * dense["parameters"]
    read = 2 * (linears + norms + VOCAB * HIDDEN)
    kv = 2 * 2 * 64 * LAYERS * (bench.CONTEXTS[0] + bench.WARMUP_STEPS + 1)
    for item in dense["decode"]:
        assert item["bytes_per_step"] == read + item["batch"] * kv
        assert item["tokens_per_s"] == pytest.approx(item["batch"] / item["step_ms"] * 1e3)
        share = item["bytes_per_step"] / found["copy_bytes_per_s"] / item["step_ms"] * 1e3
        assert item["bandwidth_share"] == pytest.approx(share)
    assert dense["prefill"]["tflops"] == pytest.approx(2 * linears * 512 / dense["prefill"]["ms"] / 1e9)
    weights = [row["weights_bytes"] for row in found["rows"]]
    assert weights == sorted(weights, reverse=True), "bf16, 8 and 4 bits"


def test_without_a_gpu_it_says_so(
    bench: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["gpu.py"])
    with pytest.raises(SystemExit) as ended:
        bench.main()
    assert ended.value.code == 2
    assert "PyTorch sees no CUDA device" in capsys.readouterr().err
