"""One cell of tests/bench/quantise.py, in a process of its own: what pressing took and what it cost in quality."""

import hashlib
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from quantise_cells import PEERS

from pressd.compress import compress
from pressd.compress.calibration import CalibrationRows
from pressd.compress.cost import peak_rss_bytes
from pressd.compress.evaluate import evaluate
from pressd.compress.pass_options import Round
from pressd.compress.protocol import SEQ_LEN
from pressd.compress.recipe import parse_recipe
from pressd.compress.report import read_report

KEPT = ("ppl", "ppl_ratio", "kl_mean", "kl_median", "kl_p99", "top1_agreement", "stderr")


def measure(told: dict[str, Any]) -> dict[str, Any]:
    """Press and measure one cell; `told` has the cell, tokens (None: the peers' own), source, peers and threads."""
    if told["threads"]:
        torch.set_num_threads(told["threads"])
    cell, source = told["cell"], Path(told["source"])
    peers = _peer_fixtures(Path(told["peers"])) if cell["rows"] == PEERS else None
    rows = None if peers is None else _rows(peers.calibration_ids(cell["seed"]), cell["seed"])
    recipe = parse_recipe(_calibration(told) + cell["recipe"], cell["scheme"])
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "out")
        before, began = peak_rss_bytes(), time.process_time()
        manifest = compress(source, recipe, out, rows=rows)
        cpu_seconds = time.process_time() - began
        report = read_report(out)
        assert report is not None
        # The one pass that is not part of another: without seconds of its own it was planned, and not done.
        assert recipe.pass_of(Round) is None or "round" in report.cost.passes, "the pass 'round' was not done"
        if peers is None:
            quality = evaluate(out, source, tokens=told["tokens"]["evaluation"], seq_len=SEQ_LEN)
        else:
            quality = peers.measure(out, peers.heldout_ids())
    totals = manifest.totals
    return {
        "bytes": totals.bytes,
        "bpw": totals.bpw,
        "seconds": report.cost.wall_seconds,
        "cpu_seconds": cpu_seconds,
        "pass_seconds": report.cost.passes,
        "peak_rss_bytes": report.cost.peak_rss_bytes,
        "rss_bytes_before": before,
        "fallbacks": sorted({group.fallback for group in manifest.plan if group.fallback}),
        "torch_threads": torch.get_num_threads(),
        **{name: quality[name] for name in KEPT if name in quality},
    }


def _calibration(told: dict[str, Any]) -> str:
    """The recipe's section, where there is a seed and rows are not given."""
    if told["tokens"] is None or told["cell"]["seed"] is None:
        return ""
    tokens = told["tokens"]["calibration"]
    return f"[calibration]\ntokens = {tokens}\nseq_len = {SEQ_LEN}\nseed = {told['cell']['seed']}\n"


def _rows(ids: torch.Tensor, seed: int) -> CalibrationRows:
    """Rows that were kept as tokens: their text is not here, so that the digest is theirs."""
    digest = hashlib.sha256(ids.contiguous().numpy().tobytes()).hexdigest()
    return CalibrationRows(name=PEERS, text_sha256=digest, seed=seed, ids=ids)


def _peer_fixtures(results: Path) -> Any:
    """The tokens that other tools were given, which lie beside their results."""
    sys.path.insert(0, str(results.parent))
    import peer_fixtures

    return peer_fixtures


if __name__ == "__main__":
    print(json.dumps(measure(json.loads(sys.argv[1]))))
