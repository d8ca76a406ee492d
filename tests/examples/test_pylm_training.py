"""The parts of pylm's training script that could be wrong without the loss telling."""

import importlib.util
import itertools
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

SCRIPT = Path(__file__).parents[2] / "examples" / "pylm" / "train.py"


@pytest.fixture(scope="module")
def train() -> ModuleType:
    spec = importlib.util.spec_from_file_location("pylm_train", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["pylm_train"] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("shape", [(3, 16, 16), (2, 24, 8), (2, 8, 24)])
def test_orthogonalise_keeps_directions_and_flattens_sizes(train: ModuleType, shape: tuple[int, ...]) -> None:
    update = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    flat = train.orthogonalise(update)
    u, s, v = torch.linalg.svd(flat, full_matrices=False)
    # Five iterations with these coefficients bring singular values that are not tiny into about [0.7, 1.2]; they do
    # not converge to 1. Values start at s / ||X||_F, and below a few hundredths are still on their way up.
    start = torch.linalg.svdvals(update) / update.norm(dim=(1, 2))[:, None]
    assert (s < 1.3).all()
    assert (s[start > 0.05] > 0.6).all()
    expected_u, _, expected_v = torch.linalg.svd(update, full_matrices=False)
    # The iteration is a polynomial of the singular values: the singular vectors, hence U V^T, stay.
    torch.testing.assert_close(u @ v, expected_u @ expected_v, atol=1e-3, rtol=0)


def test_stream_reads_every_piece_once_an_epoch_and_resumes(train: ModuleType) -> None:
    tokens = torch.arange(101, dtype=torch.int32)
    stream = train.Stream(tokens, 7)
    first = torch.cat([stream.take(3, 5) for _ in range(6)] + [stream.take(2, 5)])
    assert sorted(first[:, 0].tolist()) == list(range(0, 100, 5))
    assert all((row[1:] - row[:-1] == 1).all() for row in first)
    resumed = train.Stream(tokens, 7)
    resumed.tokens_read = stream.tokens_read
    assert torch.equal(resumed.take(4, 5), stream.take(4, 5))
    assert first[:, 0].tolist() != list(range(0, 100, 5)), "in a random order"


def test_learning_rate_warms_up_holds_and_decays(train: ModuleType) -> None:
    rates = [train.learning_rate(step, 1000) for step in range(1000)]
    assert rates[0] == pytest.approx(1 / train.WARMUP_STEPS)
    assert rates[train.WARMUP_STEPS] == rates[600] == 1.0
    assert rates[-1] == pytest.approx(1 / (1000 * train.DECAY_SHARE))
    assert all(later <= earlier for earlier, later in itertools.pairwise(rates[600:]))
