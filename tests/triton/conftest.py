"""Triton kernels run here: interpreted on the CPU where TRITON_INTERPRET=1 was set before Python began, or on a GPU."""

import os

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
collect_ignore_glob = [] if INTERPRETED or torch.cuda.is_available() else ["test_*.py"]


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cpu") if INTERPRETED else torch.device("cuda", 0)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Give `dtype` the types that this way of running computes in; the interpreter has no bfloat16 arithmetic."""
    if "dtype" in metafunc.fixturenames:
        types = [torch.float16, torch.float32] if INTERPRETED else [torch.bfloat16, torch.float16]
        metafunc.parametrize("dtype", types, ids=lambda dtype: str(dtype).removeprefix("torch."))
