"""What every contender of tests/bench/peers.py speaks: JSON lines in, JSON lines out, one answer for each question.

A contender is a process with a Python of its own, since their pins clash. It has two methods: `first_token(ids)`, which
forgets what came before, computes a prompt and draws a token, and `decode(prompts, steps)`, which brings every prompt
to where its next tokens are drawn, one step for all of them, and returns the seconds of each step. Clocks are read
where the work is done, so that what is asked through a pipe costs nothing.
"""

import json
import os
import sys
import time
from typing import Any


def serve(name: str, version: str, make: Any) -> None:
    """Load, say so, and answer until stdin ends. Whatever libraries print goes to stderr."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    began = time.perf_counter()
    contender = make()
    contender.first_token(list(range(5, 37)))  # compile and allocate what the first prompt would wait for
    tell(answers, {"name": name, "version": version, "load_s": time.perf_counter() - began, "rss_bytes": resident()})
    for line in sys.stdin:
        asked = json.loads(line)
        if asked["what"] == "first_token":
            began = time.perf_counter()
            contender.first_token(asked["prompt"])
            tell(answers, {"seconds": time.perf_counter() - began})
        elif asked["what"] == "decode":
            tell(answers, {"steps": contender.decode(asked["prompts"], asked["steps"])})
        else:
            tell(answers, {"rss_bytes": resident()})


def tell(answers: Any, what: dict[str, Any]) -> None:
    answers.write(json.dumps(what) + "\n")
    answers.flush()


def resident() -> int:
    """Bytes of this process that are in memory."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
