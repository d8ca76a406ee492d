"""llama.cpp through llama-cpp-python's bindings, one GGUF file: worker.py says what it answers."""

import sys
import time
from typing import Any

import llama_cpp as lc
from worker import serve

CONTEXT, CHUNK, SEQUENCES, ROOM = 2304, 512, 16, 64


class Contender:
    """A context for single prompts, and one whose 16 sequences keep what they have computed."""

    def __init__(self, path: str, threads: int) -> None:
        lc.llama_backend_init()
        self._threads = threads
        self._model = lc.llama_model_load_from_file(path.encode(), lc.llama_model_default_params())
        self._single = self._context(CONTEXT, 1)
        # By the length of prompts: a context, and the prompts that it holds.
        self._many: dict[int, tuple[Any, list[list[int]]]] = {}
        self._sampler = lc.llama_sampler_init_greedy()

    def first_token(self, prompt: list[int]) -> None:
        lc.llama_memory_clear(lc.llama_get_memory(self._single), True)
        self._feed(self._single, prompt, 0)
        self._greedy(self._single, 1)

    def decode(self, prompts: list[list[int]], steps: int) -> list[float]:
        """Prompts that it holds already are cut back to their length; others are computed."""
        length = len(prompts[0])
        context, held = self._many.get(length) or (self._context(SEQUENCES * (length + ROOM), SEQUENCES), [])
        memory = lc.llama_get_memory(context)
        if held[: len(prompts)] != prompts:
            lc.llama_memory_clear(memory, True)
            for number, prompt in enumerate(prompts):
                self._feed(context, prompt, number)
            held = prompts
        self._many[length] = context, held
        for number, prompt in enumerate(prompts):
            lc.llama_memory_seq_rm(memory, number, len(prompt), -1)
        seconds = []
        for step in range(steps):
            began = time.perf_counter()
            self._decode(
                context,
                [(9, len(prompt) + step, number, True) for number, prompt in enumerate(prompts)],
            )
            self._greedy(context, len(prompts))
            seconds.append(time.perf_counter() - began)
        return seconds

    def _context(self, length: int, sequences: int) -> Any:
        told = lc.llama_context_default_params()
        told.n_ctx, told.n_batch, told.n_ubatch, told.n_seq_max = length, CHUNK, CHUNK, sequences
        told.n_threads = told.n_threads_batch = self._threads
        return lc.llama_init_from_model(self._model, told)

    def _feed(self, context: Any, prompt: list[int], sequence: int) -> None:
        for start in range(0, len(prompt), CHUNK):
            part = prompt[start : start + CHUNK]
            is_last = start + CHUNK >= len(prompt)
            self._decode(
                context,
                [
                    (token, start + place, sequence, is_last and place == len(part) - 1)
                    for place, token in enumerate(part)
                ],
            )

    def _decode(self, context: Any, tokens: list[tuple[int, int, int, bool]]) -> None:
        batch = lc.llama_batch_init(len(tokens), 0, 1)
        batch.n_tokens = len(tokens)
        for place, (token, position, sequence, wanted) in enumerate(tokens):
            batch.token[place], batch.pos[place], batch.n_seq_id[place] = token, position, 1
            batch.seq_id[place][0], batch.logits[place] = sequence, int(wanted)
        failed = lc.llama_decode(context, batch)
        lc.llama_synchronize(context)
        lc.llama_batch_free(batch)
        assert not failed, failed

    def _greedy(self, context: Any, count: int) -> None:
        """Draw as a server would, with its own sampler."""
        for place in range(count):
            lc.llama_sampler_sample(self._sampler, context, -1 if count == 1 else place)


if __name__ == "__main__":
    serve("llama.cpp", lc.__version__, lambda: Contender(sys.argv[1], int(sys.argv[2])))
