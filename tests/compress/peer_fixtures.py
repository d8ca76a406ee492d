"""What other quantisers made of examples/pylm, and the tokens they were given: stored, as both depend on a Python.

Written by tests/bench/peer_calibration.py (ids) and tests/bench/peer_results.py (measurements, one layer).
"""

import json
import os
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from pressd.compress.fidelity import PerToken, compare, summarise
from pressd.runtime.artifact.reader import Checkpoint
from pressd.runtime.models import load_decoder

HERE = Path(__file__).parent
SCRIPTS = HERE.parent / "bench"
SOURCE = HERE.parents[1] / "examples" / "pylm"
RESULTS_FILE, TOKENS_FILE, LAYER_FILE = (HERE / name for name in ("peers.json", "peer_tokens.npz", "peer_layer.npz"))
LAYER_PREFIX = "model.layers.0.self_attn.o_proj"


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerResult:
    """One quantiser's result on `heldout_ids`. `seed` chose the calibration rows; None where none were needed.

    `kl_mean` is KL(source || pressed) in nats per token, `kl_stderr` its standard error over rows. `seconds`, of the
    clock beside other work, and `cpu_seconds`, of all `threads`, are of the quantiser alone, without the evaluation.
    `dtype` is what its calibration computed in.
    """

    tool: str
    method: str
    scheme: str
    seed: int | None
    kl_mean: float
    kl_stderr: float
    ppl: float
    top1_agreement: float
    seconds: float
    cpu_seconds: float
    threads: int
    dtype: str
    versions: dict[str, str]


def peer_results() -> tuple[PeerResult, ...]:
    """Return everything that was measured; `tool` is llmcompressor, auto-round, or pressd for our round-to-nearest."""
    return tuple(PeerResult(**entry) for entry in json.loads(RESULTS_FILE.read_text())["results"])


def provenance() -> dict[str, Any]:
    """Return digests of what was read (source, texts, ids) and the machine, as recorded beside the results."""
    facts: dict[str, Any] = json.loads(RESULTS_FILE.read_text())
    del facts["results"]
    return facts


def calibration_ids(seed: int) -> Tensor:
    """Return the rows that every quantiser was calibrated on, int64 [64, 512]; seeds are 0, 1, 2."""
    with np.load(TOKENS_FILE) as stored:
        return torch.from_numpy(stored["calibration"][stored["chosen"][seed]].astype(np.int64))


def heldout_ids() -> Tensor:
    """Return the rows that every result was measured on, int64 [64, 512]: what an evaluation reads by default."""
    with np.load(TOKENS_FILE) as stored:
        return torch.from_numpy(stored["heldout"].astype(np.int64))


def peer_layer() -> tuple[Tensor, Tensor]:
    """Return codes int8 [256, 256] and scale float32 [256, 2] of LAYER_PREFIX by llm-compressor: w4a16g128, seed 0."""
    with np.load(LAYER_FILE) as stored:
        return torch.from_numpy(stored["codes"]), torch.from_numpy(stored["scale"])


@torch.inference_mode()
def measure(artifact: Path, ids: Tensor) -> dict[str, Any]:
    """Return fidelity metrics of `artifact` against examples/pylm on given rows, as `pressd eval` computes them.

    That command reads text, which another Python's standard library has other words of.
    """
    dense, pressed = (
        load_decoder(Checkpoint.open(path), device=torch.device("cpu"), dtype=torch.float32, prefer="fast")
        for path in (SOURCE, artifact)
    )
    parts: list[PerToken] = []
    for rows in torch.split(ids, 2):
        logits = [decoder.head(decoder.hidden_states(rows)[:, :-1].flatten(0, 1)) for decoder in (dense, pressed)]
        parts.append(compare(logits[0], logits[1], rows[:, 1:].flatten()))
    return summarise(PerToken.join(parts, len(ids)))


def run_peer(
    python: str | Path, tool: str, *, method: str, scheme: str, ids: Tensor, out: Path, threads: int
) -> dict[str, Any]:
    """Press examples/pylm into `out` with `tool` of another Python, and return its answer: seconds, dtype, versions.

    Raises RuntimeError with the end of what the tool said if it fails.
    """
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "OMP_"))}
    # Threads that spin while they wait make it six times as slow beside anything else.
    environment |= {"OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "PASSIVE"}
    with tempfile.TemporaryDirectory() as folder:
        save_file({"ids": ids}, Path(folder) / "ids.safetensors")
        script = SCRIPTS / f"peer_{tool.replace('-', '')}.py"
        command = [Path(python).absolute(), script, "--model", SOURCE, "--tokens", f"{folder}/ids.safetensors"]
        command += ["--scheme", scheme, "--method", method, "--out", out.absolute()]
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True, env=environment, cwd=folder)
    if done.returncode != 0:
        raise RuntimeError(f"{tool}: {done.stderr[-2000:]}")
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer
