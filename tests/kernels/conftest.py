"""What tests of generated kernels share."""

from collections.abc import Iterator

import pytest
from generated import narrow


@pytest.fixture(params=["widest", "256 bits"])
def vectors(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Run with the vectors of this machine, and with those of a smaller one."""
    if request.param == "widest":
        yield
        return
    with narrow(monkeypatch):
        yield
