"""OpenVINO GenAI's continuous batching, one exported model: worker.py says what it answers."""

import sys
import time
from typing import Any

import numpy as np
import openvino as ov
import openvino_genai as genai
from worker import serve


class Contender:
    """Steps its pipeline until all prompts are done; what a prompt computed before is found in its prefix cache."""

    def __init__(self, folder: str, threads: int) -> None:
        scheduler = genai.SchedulerConfig()
        scheduler.max_num_batched_tokens, scheduler.cache_size, scheduler.max_num_seqs = 512, 2, 32
        scheduler.enable_prefix_caching = scheduler.dynamic_split_fuse = True
        told = {"INFERENCE_NUM_THREADS": threads}
        self._pipeline = genai.ContinuousBatchingPipeline(folder, scheduler, "CPU", told)
        self._count = 0
        self._known: set[tuple[int, ...]] = set()

    def first_token(self, prompt: list[int]) -> None:
        self._run([prompt], 1)

    def decode(self, prompts: list[list[int]], steps: int) -> list[float]:
        for prompt in prompts:  # one after the other, unless it is known: together the first would end before the last
            if tuple(prompt) not in self._known:
                self._known.add(tuple(prompt))
                self._run([prompt], 1)
        # Two steps more at both ends, in which some sequences may not decode.
        return self._run(prompts, steps + 4)[-steps - 2 : -2]

    def _run(self, prompts: list[list[int]], new_tokens: int) -> list[float]:
        config = genai.GenerationConfig()
        config.max_new_tokens, config.ignore_eos, config.do_sample = new_tokens, True, False
        handles: list[Any] = []
        for prompt in prompts:
            self._count += 1
            ids = ov.Tensor(np.array([prompt], dtype=np.int64))
            handles.append(self._pipeline.add_request(self._count, ids, config))
        seconds = []
        while self._pipeline.has_non_finished_requests():
            began = time.perf_counter()
            self._pipeline.step()
            seconds.append(time.perf_counter() - began)
        for handle in handles:
            handle.read_all()
        return seconds


if __name__ == "__main__":
    serve("OpenVINO GenAI", genai.__version__.split("-")[0], lambda: Contender(sys.argv[1], int(sys.argv[2])))
