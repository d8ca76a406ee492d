"""The engine: token ids in, token ids out; it knows no protocol.

from pressd.runtime import Engine

engine = Engine.from_pretrained("PRESSED")
for completion in engine.generate(["def main():", "import "]):
    print(completion.text)
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pressd.runtime.completion import Completion as Completion
    from pressd.runtime.completion import Piece as Piece
    from pressd.runtime.config import EngineConfig as EngineConfig
    from pressd.runtime.engine import Engine as Engine
    from pressd.runtime.errors import RequestError as RequestError
    from pressd.runtime.params import Constraint as Constraint
    from pressd.runtime.params import SamplingParams as SamplingParams
    from pressd.runtime.params import StoppingParams as StoppingParams
    from pressd.runtime.request import FinishReason as FinishReason

__all__ = [
    "Completion",
    "Constraint",
    "Engine",
    "EngineConfig",
    "FinishReason",
    "Piece",
    "RequestError",
    "SamplingParams",
    "StoppingParams",
]

_HOMES = {
    "completion": ("Completion", "Piece"),
    "config": ("EngineConfig",),
    "engine": ("Engine",),
    "errors": ("RequestError",),
    "params": ("Constraint", "SamplingParams", "StoppingParams"),
    "request": ("FinishReason",),
}


def __getattr__(name: str) -> object:
    # Readers of manifests and configurations import this package too, and must not pay for torch.
    for module, names in _HOMES.items():
        if name in names:
            return getattr(importlib.import_module(f"{__name__}.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
