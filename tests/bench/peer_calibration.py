"""Writes the token ids that every quantiser compared with ours is calibrated on, and those that all are measured on.

    python tests/bench/peer_calibration.py              # from the stored ids, under build/peers
    python tests/bench/peer_calibration.py --renew      # new ids from this Python's standard library, stored as well

Text is the standard library's, which differs between Pythons: so ids are stored (tests/compress/peer_tokens.npz) and
handed to the peers' own environments as .safetensors files, which need nothing of ours to read.
"""

import argparse
import hashlib
import json
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from pressd.compress import corpus
from pressd.compress.protocol import SEQ_LEN, TOKENS
from pressd.compress.token_rows import read_rows
from pressd.runtime.artifact.reader import Checkpoint

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "compress"))
from peer_fixtures import SOURCE, TOKENS_FILE, calibration_ids, heldout_ids

WORK = Path(__file__).resolve().parents[2] / "build" / "peers"
ROWS = 64
SEEDS = (0, 1, 2)


def calibration_rows(source: Path) -> Tensor:
    """Return the whole calibration split as rows, int64 [rows, 512], cut as an evaluation cuts the held-out text."""
    documents = corpus.load("stdlib", "calibration").documents
    with tempfile.TemporaryDirectory() as folder:
        # A file has no splits: its documents are cut into rows by the very function that cuts the held-out ones.
        file = Path(folder) / "calibration.jsonl"
        file.write_text("".join(json.dumps({"text": document}) + "\n" for document in documents))
        return read_rows(str(file), Checkpoint.open(source), tokens=1 << 24, seq_len=SEQ_LEN).ids


def choose(rows: Tensor, seed: int) -> Tensor:
    """Return 64 of the rows in their order, drawn without replacement by a generator seeded with `seed`."""
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))
    return rows[order[:ROWS].sort().values]


def digest(ids: Tensor) -> str:
    """SHA-256 of the ids as little-endian 16-bit integers, row by row."""
    return hashlib.sha256(ids.numpy().astype("<u2").tobytes()).hexdigest()


def write_ids(file: Path, ids: Tensor) -> None:
    """Write int64 `ids` [rows, tokens] as the tensor `ids` of a .safetensors file."""
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file({"ids": ids}, file)


def renew(source: Path) -> None:
    """Store new ids: `calibration` uint16 [distinct rows, 512], `chosen` [seeds, 64] of them, `heldout` [64, 512]."""
    rows = calibration_rows(source)
    chosen = [choose(rows, seed) for seed in SEEDS]
    # Rows that several seeds draw are stored once.
    distinct, where = torch.unique(torch.cat(chosen), dim=0, return_inverse=True)
    heldout = read_rows("stdlib", Checkpoint.open(source), tokens=TOKENS, seq_len=SEQ_LEN).ids
    np.savez_compressed(
        TOKENS_FILE,
        calibration=distinct.numpy().astype(np.uint16),
        chosen=where.view(len(SEEDS), ROWS).numpy().astype(np.uint16),
        heldout=heldout.numpy().astype(np.uint16),
    )
    print(f"{len(rows)} rows of calibration text, {len(distinct)} of them stored, {TOKENS_FILE.stat().st_size} bytes")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--renew", action="store_true", help="store new ids; every recorded result is then void")
    if parser.parse_args().renew:
        renew(SOURCE)
    named = {f"calibration-{seed}": calibration_ids(seed) for seed in SEEDS} | {"heldout": heldout_ids()}
    for name, ids in named.items():
        write_ids(WORK / f"{name}.safetensors", ids)
        print(name, digest(ids))


if __name__ == "__main__":
    main()
