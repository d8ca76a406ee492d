"""Measures what llm-compressor and auto-round make of examples/pylm beside our round-to-nearest, into peers.json.

    python tests/bench/peer_results.py                                          # round-to-nearest alone
    python tests/bench/peer_results.py --llmcompressor-python L/bin/python --seeds 0 1 2
    python tests/bench/peer_results.py --autoround-python A/bin/python --schemes w4a16g128 w3a16g32 --seeds 0

Each is a Python that has that tool (and compressed-tensors). Every quantiser reads the stored calibration rows, every
result is measured on the stored held-out rows, one run after another; each replaces its entry of an earlier run.
"""

import argparse
import hashlib
import json
import platform
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from engine import processor
from peer_calibration import SEEDS, WORK, digest
from peer_task import Stopwatch

from pressd.compress import compress, corpus
from pressd.runtime.artifact.reader import Checkpoint
from pressd.runtime.kernels.packed_int import format as packed_int

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "compress"))
from peer_fixtures import (
    LAYER_FILE,
    LAYER_PREFIX,
    RESULTS_FILE,
    SOURCE,
    calibration_ids,
    heldout_ids,
    measure,
    run_peer,
)

SCHEMES = ("w4a16g128", "w4a16g32", "w3a16g32", "w2a16g32")
METHODS = {"llmcompressor": "gptq", "auto-round": "signround"}
THREADS = 2


def measured(artifact: Path) -> dict[str, float]:
    """Return what is kept of an artifact's fidelity on the held-out rows."""
    quality = measure(artifact, heldout_ids())
    kept = {name: quality[name] for name in ("kl_mean", "ppl", "top1_agreement")}
    return kept | {"kl_stderr": quality["stderr"]["kl_mean"]}


def ours(scheme: str) -> dict[str, Any]:
    """Press and measure our round-to-nearest."""
    with tempfile.TemporaryDirectory() as folder:
        stopwatch = Stopwatch()
        compress(SOURCE, scheme, Path(folder) / "out")
        facts = stopwatch.read() | {"threads": torch.get_num_threads(), "dtype": "float32"}
        facts["versions"] = {"torch": torch.__version__}
        key = {"tool": "pressd", "method": "rtn", "scheme": scheme, "seed": None}
        return key | facts | measured(Path(folder) / "out")


def peers(tool: str, python: Path, scheme: str, seed: int) -> dict[str, Any]:
    """Press with a peer and measure; the layer that is kept for a look is written on the way."""
    out = WORK / f"{tool}-{scheme}-{seed}"
    shutil.rmtree(out, ignore_errors=True)
    method = METHODS[tool]
    facts = run_peer(python, tool, method=method, scheme=scheme, ids=calibration_ids(seed), out=out, threads=THREADS)
    if (tool, scheme, seed) == ("llmcompressor", "w4a16g128", 0):
        keep_layer(out)
    key = {"tool": tool, "method": method, "scheme": scheme, "seed": seed}
    return key | facts | measured(out)


def keep_layer(artifact: Path) -> None:
    """Store codes and scales of one layer."""
    checkpoint = Checkpoint.open(artifact)
    spec, tensors = checkpoint.linear(LAYER_PREFIX), checkpoint.linear_tensors(LAYER_PREFIX)
    codes = packed_int.unpack(tensors["weight_packed"], 4, spec.in_features)
    np.savez_compressed(LAYER_FILE, codes=codes.to(torch.int8).numpy(), scale=tensors["weight_scale"].float().numpy())


def record(result: dict[str, Any]) -> None:
    """Put a result into the file in place of an older one of the same tool, scheme and seed."""
    results = json.loads(RESULTS_FILE.read_text())["results"] if RESULTS_FILE.exists() else []
    key = ("tool", "method", "scheme", "seed")
    kept = [old for old in results if any(old[name] != result[name] for name in key)]
    results = sorted([*kept, result], key=lambda one: [str(one[name]) for name in key])
    RESULTS_FILE.write_text(json.dumps({**provenance(), "results": results}, indent=1) + "\n")


def provenance() -> dict[str, Any]:
    """Return what the results stand on."""
    digests = {f"calibration-{seed}": digest(calibration_ids(seed)) for seed in SEEDS}
    return {
        "source_sha256": hashlib.sha256((SOURCE / "model.safetensors").read_bytes()).hexdigest(),
        "python": platform.python_version(),
        "text_sha256": {split: corpus.load("stdlib", split).sha256 for split in corpus.SPLITS},
        "ids_sha256": digests | {"heldout": digest(heldout_ids())},
        "processor": processor(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--llmcompressor-python", type=Path)
    parser.add_argument("--autoround-python", type=Path)
    parser.add_argument("--schemes", nargs="+", choices=SCHEMES, default=SCHEMES)
    parser.add_argument("--seeds", nargs="+", type=int, choices=SEEDS, default=SEEDS)
    arguments = parser.parse_args()
    pythons = {"llmcompressor": arguments.llmcompressor_python, "auto-round": arguments.autoround_python}
    given = {tool: python for tool, python in pythons.items() if python is not None}
    for seed in arguments.seeds:
        for scheme in arguments.schemes:
            for tool, python in given.items():
                report(peers(tool, python, scheme, seed))
    if not given:
        for scheme in arguments.schemes:
            report(ours(scheme))


def report(result: dict[str, Any]) -> None:
    record(result)
    label = f"{result['tool']} {result['scheme']} seed {result['seed']}"
    print(f"{label}: KL {result['kl_mean']:.6f} +- {result['kl_stderr']:.6f}, {result['seconds']:.1f} s", flush=True)


if __name__ == "__main__":
    main()
