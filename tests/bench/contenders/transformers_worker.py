"""transformers' own forward in bfloat16 with its dynamic cache: worker.py says what it answers."""

import copy
import sys
import time
from typing import Any

import torch
import transformers
from worker import serve

CHUNK = 512


class Contender:
    """A static batch; what it has computed is kept, and copied for each run."""

    def __init__(self, folder: str, threads: int) -> None:
        torch.set_num_threads(threads)
        self._model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
        self._kept: tuple[list[list[int]], Any] = ([], None)

    def first_token(self, prompt: list[int]) -> None:
        self._prefill([prompt])

    def decode(self, prompts: list[list[int]], steps: int) -> list[float]:
        if self._kept[0] != prompts:
            self._kept = (prompts, self._prefill(prompts))
        cache = copy.deepcopy(self._kept[1])
        ids = torch.full((len(prompts), 1), 9)
        seconds = []
        for _ in range(steps):
            began = time.perf_counter()
            logits = self._model(ids, past_key_values=cache, use_cache=True).logits
            ids = logits[:, -1].argmax(-1, keepdim=True)
            seconds.append(time.perf_counter() - began)
        return seconds

    def _prefill(self, prompts: list[list[int]]) -> Any:
        ids = torch.tensor(prompts)
        cache = transformers.DynamicCache(config=self._model.config)
        for start in range(0, ids.size(1), CHUNK):
            part = ids[:, start : start + CHUNK]
            logits = self._model(part, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
        logits.argmax(-1)
        return cache


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    serve("transformers", transformers.__version__, lambda: Contender(sys.argv[1], int(sys.argv[2])))
