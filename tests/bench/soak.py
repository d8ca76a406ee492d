"""Many short and various requests through one engine: does it keep anything?

    python tests/bench/soak.py [--requests 10000] [--model DIR] [--seed 0]

Prompts share beginnings; settings, lengths, numbers of sequences, cancellations and constraints are drawn from the
seed. Prints, every thousand requests, the process's resident memory, and at the end how many blocks are still held.
"""

import argparse
import gc
import random
import time
from collections.abc import Callable
from pathlib import Path

import psutil

from pressd.runtime.config import EngineConfig
from pressd.runtime.engine import Engine
from pressd.runtime.params import Constraint, SamplingParams, StoppingParams
from pressd.runtime.request import Request

PYLM = Path(__file__).resolve().parents[2] / "examples" / "pylm"
# Waiting requests never number more than this, so that memory does not depend on how many are still to come.
MOST_LIVE = 48
EVERY = 1000
CANCELLED = 0.1
CONSTRAINED = 0.02
CONFIG = EngineConfig(max_batch=16, max_step_tokens=64, kv_memory=1 << 22, block_size=4, max_context=96)


def draw_request(number: int, vocab_size: int, beginnings: list[tuple[int, ...]], rng: random.Random) -> Request:
    """One request; what is drawn for it uses every part of the sampler now and then."""

    def token() -> int:
        return rng.randrange(1, vocab_size)

    beginning = rng.choice(beginnings)
    prompt = beginning[: rng.randint(1, len(beginning))] + tuple(token() for _ in range(rng.randrange(4)))
    sampling = SamplingParams(
        temperature=rng.choice([0.0, 0.7, 1.0, 1.5]),
        top_k=rng.choice([None, None, 1, 20]),
        top_p=rng.choice([1.0, 1.0, 0.9]),
        min_p=rng.choice([0.0, 0.0, 0.05]),
        typical_p=rng.choice([1.0, 1.0, 0.9]),
        repetition_penalty=rng.choice([1.0, 1.0, 1.2]),
        presence_penalty=rng.choice([0.0, 0.0, 0.5]),
        frequency_penalty=rng.choice([0.0, 0.0, 0.5]),
        logit_bias=((token(), -5.0),) if rng.random() < 0.1 else (),
        bad_words=((token(), token()), (token(),)) if rng.random() < 0.1 else (),
        seed=rng.randrange(2**64),
        n=rng.choice([1] * 8 + [2, 3]),
        logprobs=rng.random() < 0.1,
        top_logprobs=rng.choice([0, 5]),
        prompt_logprobs=rng.random() < 0.05,
    )
    constraint = (
        Constraint(kind="choice", choices=("yes", f"no {rng.randrange(8)}")) if rng.random() < CONSTRAINED else None
    )
    return Request(
        request_id=str(number),
        prompt_token_ids=prompt,
        sampling=sampling,
        stopping=StoppingParams(max_new_tokens=rng.randint(1, 12), stop_token_ids=(token(),)),
        constraint=constraint,
        priority=rng.choice([0, 0, 0, 1]),
        cache_salt=rng.choice(["", "", "tenant"]),
        bypass_prefix_cache=rng.random() < 0.05,
        arrival=time.monotonic(),
    )


def soak(engine: Engine, count: int, *, seed: int, tell: Callable[[int, int], None]) -> None:
    """Run `count` requests; `tell` gets the number of those that ended and the resident bytes, every thousand.

    Raises AssertionError if a block, a sequence or a row is still held at the end, or a request fails.
    """
    rng = random.Random(seed)
    size = engine.info.vocab_size
    beginnings = [tuple(rng.randrange(1, size) for _ in range(rng.randint(8, 40))) for _ in range(20)]
    live: dict[str, int] = {}
    number = ended = 0
    while ended < count:
        while number < count and len(live) < MOST_LIVE:
            request = draw_request(number, size, beginnings, rng)
            engine.add(request)
            live[request.request_id] = request.sampling.n
            number += 1
        before = ended
        if rng.random() < CANCELLED:
            victim = rng.choice(list(live))
            assert engine.abort(victim)
            del live[victim]
            ended += 1
        for output in engine.step().outputs:
            assert output.error is None, f"{output.request_id}: {output.error}"
            if output.finish_reason is not None:
                live[output.request_id] -= 1
                if not live[output.request_id]:
                    del live[output.request_id]
                    ended += 1
        if ended // EVERY > before // EVERY:
            engine.check_integrity()
            gc.collect()
            tell(ended, resident())
    while engine.has_work:  # a step that was launched ahead
        engine.step()
    engine.check_integrity()
    stats = engine.stats()
    assert (stats.kv_blocks_used, stats.num_running, stats.num_waiting, stats.num_preempted) == (0, 0, 0, 0)


def resident() -> int:
    """Bytes of this process that are in memory."""
    return int(psutil.Process().memory_info().rss)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=10000)
    parser.add_argument("--model", type=Path, default=PYLM)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    engine = Engine.from_pretrained(arguments.model, CONFIG)
    began = time.monotonic()

    def tell(ended: int, size: int) -> None:
        print(f"{ended:>7} requests  {time.monotonic() - began:7.1f} s  {size / 2**20:8.1f} MiB resident", flush=True)

    tell(0, resident())
    soak(engine, arguments.requests, seed=arguments.seed, tell=tell)
    stats = engine.stats()
    print(
        f"{stats.kv_blocks_used} blocks leaked; {stats.preemptions} preemptions, {stats.prefix_hit_tokens} of "
        f"{stats.prefix_queried_tokens} prompt tokens found cached, {stats.evicted_blocks} blocks evicted"
    )


if __name__ == "__main__":
    main()
