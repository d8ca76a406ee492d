"""pressd's engine in a process of its own, one artifact: worker.py says what it answers."""

import sys
import time
from pathlib import Path

import torch
from worker import serve

import pressd.runtime
from pressd.runtime.config import EngineConfig
from pressd.runtime.engine import Engine
from pressd.runtime.params import SamplingParams, StoppingParams
from pressd.runtime.request import Request


class Contender:
    """Steps the engine until all prompts are done; what a prompt computed before is found in the prefix cache."""

    def __init__(self, folder: str, threads: int) -> None:
        config = EngineConfig(
            max_batch=16,
            max_step_tokens=512,
            max_context=2304,
            threads=threads,
            code_cache=str(Path(folder).parent / "code"),
        )
        self._engine = Engine.from_pretrained(Path(folder), config)
        self._count = 0
        self._known: set[tuple[int, ...]] = set()

    def first_token(self, prompt: list[int]) -> None:
        self._run([prompt], 1)

    def decode(self, prompts: list[list[int]], steps: int) -> list[float]:
        for prompt in prompts:  # one after the other, unless it is known: together the first would end before the last
            if tuple(prompt) not in self._known:
                self._known.add(tuple(prompt))
                self._run([prompt], 1)
        return self._run(prompts, steps + 2)[-steps:]

    def _run(self, prompts: list[list[int]], new_tokens: int) -> list[float]:
        """Return the seconds of the steps in which every sequence got a token."""
        for prompt in prompts:
            self._count += 1
            request = Request(
                request_id=str(self._count),
                prompt_token_ids=tuple(prompt),
                sampling=SamplingParams(temperature=0.0),
                stopping=StoppingParams(max_new_tokens=new_tokens, ignore_eos=True),
            )
            self._engine.add(request)
        seconds = []
        while self._engine.has_work:
            began = time.perf_counter()
            result = self._engine.step()
            if result.stats.num_prefill_tokens == 0 and len(result.outputs) == len(prompts):
                seconds.append(time.perf_counter() - began)
        return seconds


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    serve("pressd", pressd.runtime.__name__, lambda: Contender(sys.argv[1], int(sys.argv[2])))
