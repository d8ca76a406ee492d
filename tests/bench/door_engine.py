"""The tests' scripted engine in step with a clock: `pace` of its script is how many seconds lie between two steps."""

import json
import sys
import time
from pathlib import Path

from scripted_engine import ScriptedEngine

from pressd.runtime.config import EngineConfig
from pressd.runtime.report import StepResult
from pressd.server.cli import main


class PacedEngine(ScriptedEngine):
    """A step that is late does not make the next one come sooner."""

    def __init__(self, folder: Path, config: EngineConfig) -> None:
        super().__init__(folder, config)
        self._pace = float(json.loads((folder / "script.json").read_text())["pace"])
        self._next = 0.0

    def step(self) -> StepResult:
        now = time.monotonic()
        time.sleep(max(0.0, self._next - now))
        self._next = max(now, self._next) + self._pace
        return super().step()


def create(path: str, config: EngineConfig) -> PacedEngine:
    """Make the engine of a directory."""
    return PacedEngine(Path(path), config)


if __name__ == "__main__":  # the `pressd` command with this engine in its server
    sys.exit(main(engine="door_engine:create"))
