"""The workshop: presses a dense checkpoint into an artifact and measures what that cost in fidelity."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pressd.compress.press import compress as compress


def __getattr__(name: str) -> object:
    """Import `compress` when it is asked for: verbs that read no weights must not wait for torch."""
    if name == "compress":
        from pressd.compress.press import compress

        return compress
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
