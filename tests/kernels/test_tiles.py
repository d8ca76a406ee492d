"""The table of measured tiles, and what measures them, as far as that goes without a GPU."""

import json
import re
import subprocess
import sys

import torch

from pressd.runtime.kernels import tiles as table
from pressd.runtime.kernels.tiles import Tiles, tiles_for
from pressd.runtime.kernels.tune import KERNELS, SHAPES, TOKENS, Case


def test_every_row_says_where_and_when_it_was_measured() -> None:
    rows = json.loads(table.TABLE.read_text())["rows"]
    assert rows
    for row in rows:
        assert row["device"].startswith("NVIDIA")
        assert re.fullmatch(r"20\d\d-\d\d-\d\d", row["date"])
        assert row["us"] > 0
        assert row["kernel"] in KERNELS
        assert row["tokens"] in TOKENS
        assert row["num_warps"] in (4, 8)
    keys = [tuple(row[key] for key in ("kernel", "device", "out_features", "in_features", "tokens")) for row in rows]
    assert len(keys) == len(set(keys))


def test_a_device_that_was_not_measured_goes_by_rule() -> None:
    shape, cpu = (6144, 4096), torch.device("cpu")
    ruled = tiles_for("w4", None, *shape, 16)
    assert tiles_for("w4", cpu, *shape, 16) == ruled
    assert ruled.split is None


def test_tiles_can_be_tried() -> None:
    tried = Tiles(rows=128, num_warps=8, num_stages=2, split=1)
    table.use("w4", "a device", (8, 8), 16, tried)
    assert table._table()["w4", "a device", 8, 8, 16] == tried
    table.use("w4", "a device", (8, 8), 16, None)
    assert ("w4", "a device", 8, 8, 16) not in table._table()


def test_candidates_fill_the_device_and_are_few() -> None:
    for kernel in KERNELS:
        for tokens in TOKENS:
            for shape in SHAPES:
                candidates = list(Case(kernel, shape, tokens).candidates())
                assert 2 <= len(candidates) <= 24
                assert len(candidates) == len(set(candidates))


def test_without_a_gpu_tuning_says_so() -> None:
    if torch.cuda.is_available():
        return
    command = [sys.executable, "-m", "pressd.runtime.kernels.tune"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (ended.returncode, ended.stderr) == (2, "tune: PyTorch sees no CUDA device\n")
