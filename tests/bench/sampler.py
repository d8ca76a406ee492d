"""Time the sampler: settings by batch by vocabulary, beside a full sort and transformers' logits processors.

    python tests/bench/sampler.py [--vocab 32000 151936] [--batch 1 16 64] [--settings greedy top_p] [--json]

Logits fall with the rank of a token by a power law, and a step is a whole call of `Sampler.sample` in steady state. The
naive way sorts every row that is drawn, as a few lines of PyTorch do; transformers' way is its processors in its order,
then a softmax and torch.multinomial. Each has its time on its own, and the table holds medians in milliseconds.
OMP_WAIT_POLICY=PASSIVE keeps waiting threads from taking processors that others need, at the price of waking them.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable

import torch
from transformers.generation import logits_process

from pressd.runtime.params import SamplingParams
from pressd.runtime.request import Request
from pressd.runtime.sampling import Sampler

SETTINGS = {
    "greedy": SamplingParams(temperature=0.0),
    "temperature": SamplingParams(temperature=0.8),
    "top_p": SamplingParams(temperature=0.8, top_p=0.95),
    "top_k": SamplingParams(temperature=0.8, top_k=50),
    "top_k top_p": SamplingParams(temperature=0.8, top_k=50, top_p=0.95),
    "min_p": SamplingParams(temperature=0.8, min_p=0.05),
    "typical_p": SamplingParams(temperature=0.8, typical_p=0.95),
    "greedy repetition": SamplingParams(temperature=0.0, repetition_penalty=1.1),
    "top_p repetition": SamplingParams(temperature=0.8, top_p=0.95, repetition_penalty=1.1),
    "greedy bad_words": SamplingParams(temperature=0.0, bad_words=tuple((a, a + 1, a + 2) for a in range(64))),
    "greedy logprobs 5": SamplingParams(temperature=0.0, logprobs=True, top_logprobs=5),
}
PROMPT, LENGTH = 100, 300


def some_logits(batch: int, vocab: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    ranks = torch.stack([torch.randperm(vocab, generator=generator) for _ in range(batch)])
    return -1.1 * torch.log(ranks + 2.0) + 0.3 * torch.randn(batch, vocab, generator=generator)


def ours(sampling: SamplingParams, logits: torch.Tensor, tokens: torch.Tensor) -> Callable[[], object]:
    batch, vocab = logits.shape
    sampler = Sampler(num_rows=batch, vocab_size=vocab, eos_token_ids=[0], device=logits.device, token_table=tokens)
    for row in range(batch):
        prompt = tuple(tokens[row, :PROMPT].tolist())
        sampler.admit(row, Request(request_id=str(row), prompt_token_ids=prompt, sampling=sampling), row, LENGTH)
    rows, positions = list(range(batch)), torch.full((batch,), LENGTH)

    def step() -> object:
        positions.add_(1)
        return sampler.sample(logits, rows, positions.clamp(max=tokens.shape[1]))

    return step


def naive(sampling: SamplingParams, logits: torch.Tensor, tokens: torch.Tensor) -> Callable[[], object] | None:
    if sampling.bad_words or sampling.logprobs or sampling.repetition_penalty != 1:
        return None

    def step() -> object:
        if sampling.temperature == 0:
            return logits.argmax(-1)
        p, order = (logits / sampling.temperature).softmax(-1).sort(dim=-1, descending=True)
        if sampling.top_k is not None:
            p[:, sampling.top_k :] = 0
        if sampling.top_p < 1:
            p[p.cumsum(-1) - p >= sampling.top_p * p.sum(-1, keepdim=True)] = 0
        if sampling.min_p:
            p[p < sampling.min_p * p[:, :1]] = 0
        return order.gather(1, torch.multinomial(p, 1))

    return step if sampling.typical_p == 1 else None


def theirs(sampling: SamplingParams, logits: torch.Tensor, tokens: torch.Tensor) -> Callable[[], object] | None:
    if sampling.logprobs:
        return None
    steps = logits_process.LogitsProcessorList()
    if sampling.repetition_penalty != 1:
        steps.append(logits_process.RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty))
    if sampling.bad_words:
        steps.append(logits_process.NoBadWordsLogitsProcessor([list(word) for word in sampling.bad_words]))
    if sampling.temperature not in (0.0, 1.0):
        steps.append(logits_process.TemperatureLogitsWarper(sampling.temperature))
    if sampling.top_k is not None:
        steps.append(logits_process.TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        steps.append(logits_process.TopPLogitsWarper(sampling.top_p))
    if sampling.min_p:
        steps.append(logits_process.MinPLogitsWarper(sampling.min_p))
    if sampling.typical_p < 1:
        steps.append(logits_process.TypicalLogitsWarper(sampling.typical_p))
    ids = tokens[:, :LENGTH].contiguous()

    def step() -> object:
        scores = steps(ids, logits.clone())
        return torch.multinomial(scores.softmax(-1), 1) if sampling.temperature else scores.argmax(-1)

    return step


def measure(contenders: dict[str, Callable[[], object] | None], seconds: float) -> dict[str, float]:
    """Return the median milliseconds of each."""
    medians = {}
    for name, step in contenders.items():
        if step is None:
            continue
        step()
        times, end = [], time.perf_counter() + seconds
        while time.perf_counter() < end or len(times) < 5:
            began = time.perf_counter()
            step()
            times.append((time.perf_counter() - began) * 1e3)
        medians[name] = statistics.median(times)
    return medians


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocab", type=int, nargs="+", default=[32000, 151936])
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--settings", nargs="+", default=list(SETTINGS), choices=list(SETTINGS))
    parser.add_argument("--seconds", type=float, default=0.3, help="spent on each number")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    lines = []
    if not args.json:
        print(f"{'setting':20} {'batch':>5} {'vocab':>7} {'ours ms':>9} {'sort ms':>9} {'transformers ms':>16}")
    for vocab in args.vocab:
        for batch in args.batch:
            logits = some_logits(batch, vocab).to(args.device)
            tokens = torch.randint(vocab, (batch, 4096), generator=torch.Generator().manual_seed(1)).to(args.device)
            for name in args.settings:
                sampling = SETTINGS[name]
                ways = {"ours": ours, "sort": naive, "transformers": theirs}
                with torch.inference_mode():
                    found = measure({way: make(sampling, logits, tokens) for way, make in ways.items()}, args.seconds)
                lines.append({"setting": name, "batch": batch, "vocab": vocab} | found)
                if not args.json:
                    cells = [f"{found[way]:.3f}" if way in found else "-" for way in ways]
                    print(f"{name:20} {batch:5} {vocab:7} {cells[0]:>9} {cells[1]:>9} {cells[2]:>16}", flush=True)
    if args.json:
        print(json.dumps(lines, indent=1))


if __name__ == "__main__":
    main()
