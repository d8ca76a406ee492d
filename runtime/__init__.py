"""The engine: token ids in, token ids out; it knows no protocol."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pressd.runtime.engine import Engine as Engine

__all__ = ["Engine"]


def __getattr__(name: str) -> object:
    # Readers of manifests and configurations import this package too, and must not pay for torch.
    if name == "Engine":
        from pressd.runtime.engine import Engine

        return Engine
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
