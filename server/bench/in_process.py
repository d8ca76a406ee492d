"""An engine in this process as the target of a load."""

import time
from collections.abc import Sequence
from pathlib import Path

from pressd.runtime.config import EngineConfig
from pressd.runtime.engine import Engine
from pressd.runtime.errors import RequestError
from pressd.runtime.params import SamplingParams, StoppingParams
from pressd.runtime.report import EngineInfo
from pressd.runtime.request import Request
from pressd.server.bench.load import News
from pressd.server.bench.workload import Asked


class InProcess:
    """Steps its engine when it is polled. Answers are greedy and as long as was asked: EOS ends none."""

    def __init__(self, path: Path, config: EngineConfig) -> None:
        """Load the model; raises what Engine.from_pretrained raises."""
        self._engine = Engine.from_pretrained(path, config)
        self._refused: list[News] = []
        self._host_seconds, self._steps = 0.0, 0

    @property
    def info(self) -> EngineInfo:
        return self._engine.info

    def send(self, number: int, asked: Asked) -> None:
        now = time.monotonic()
        request = Request(
            request_id=str(number),
            prompt_token_ids=asked.prompt_token_ids,
            sampling=SamplingParams(temperature=0.0),
            stopping=StoppingParams(max_new_tokens=asked.output_tokens, ignore_eos=True),
            arrival=now,
        )
        try:
            self._engine.add(request)
        except RequestError as error:
            self._refused.append(News(number=number, at=now, error=str(error)))

    def poll(self, seconds: float) -> Sequence[News]:
        if self._refused:
            refused, self._refused = self._refused, []
            return refused
        if not self._engine.has_work:
            time.sleep(seconds)
            return ()
        result = self._engine.step()
        now = time.monotonic()
        if result.stats.num_rows:
            self._host_seconds += result.stats.host_seconds
            self._steps += 1
        return [
            News(
                number=int(output.request_id),
                at=now,
                num_tokens=len(output.token_ids),
                is_last=output.finish_reason is not None,
                error=output.error,
            )
            for output in result.outputs
        ]

    def facts(self) -> dict[str, float]:
        """Seconds in which no layer ran, and steps."""
        facts = {"host_seconds": self._host_seconds, "steps": float(self._steps)}
        self._host_seconds, self._steps = 0.0, 0
        return facts
