"""The measuring itself is measured: against numpy, against a queue worked out by hand, and on a tiny model."""

import itertools
import json
import math
import re
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pressd.server import cli
from pressd.server.bench.load import News, Run, Sample, drive
from pressd.server.bench.measures import percentile, summarize
from pressd.server.bench.workload import Arrivals, Asked, Clients, Span, make_requests

KEYS = [
    *("requests", "errors", "output_tokens", "wall_s", "output_tokens_per_s"),
    *("ttft_ms", "tpot_ms", "itl_ms", "e2e_ms", "host_ms_per_step"),
]
SMALL = ["--requests", "5", "--prompt-tokens", "3-20", "--output-tokens", "7", "--threads", "2"]


class OneAtATime:
    """Answers requests one after the other, each token after `seconds`; its clock runs only while it is polled."""

    def __init__(self, seconds: float, interrupt_at: float = math.inf) -> None:
        self.now = 0.0
        self.seconds, self.interrupt_at = seconds, interrupt_at
        self.queue: list[tuple[int, int]] = []
        self.sent: list[float] = []
        self.most_live = 0

    def send(self, number: int, asked: Asked) -> None:
        self.queue.append((number, asked.output_tokens))
        self.sent.append(self.now)
        self.most_live = max(self.most_live, len(self.queue))

    def poll(self, seconds: float) -> Sequence[News]:
        if not self.queue:
            self.now += seconds
            return ()
        if self.now >= self.interrupt_at:
            raise KeyboardInterrupt
        self.now += self.seconds
        number, left = self.queue.pop(0)
        if left < 0:
            return [News(number=number, at=self.now, error="refused")]
        if left > 1:
            self.queue.insert(0, (number, left - 1))
        return [News(number=number, at=self.now, num_tokens=1, is_last=left == 1)]

    def facts(self) -> dict[str, float]:
        return {"host_seconds": 0.5 * self.seconds, "steps": 1.0}

    def load(self, requests: list[Asked], pace: Any) -> Run:
        return drive(self, requests, pace, clock=lambda: self.now)


def asked(*output_tokens: int) -> list[Asked]:
    return [Asked(prompt_token_ids=(1,), output_tokens=count) for count in output_tokens]


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=50), st.sampled_from([0, 1, 50, 95, 99, 100]))
def test_percentiles_are_numpys(values: list[float], share: int) -> None:
    # A rank below 50 is rounded by at most 2**-48 on each side, and moves the value by up to 2e6 of that; the other
    # roundings, of numbers below 2e6, are smaller.
    assert percentile(values, share) == pytest.approx(np.percentile(values, share), rel=0, abs=3 * 2e6 * 2**-48)


def test_closed_loop_keeps_its_clients_busy() -> None:
    target = OneAtATime(0.25)
    run = target.load(asked(2, 1, 3, 1, 1), Clients(3))
    assert target.most_live == 3
    # Three at once; the fourth when the first has its two tokens, the fifth with the second's one.
    assert target.sent == [0.0, 0.0, 0.0, 0.5, 0.75]
    assert [sample.intended for sample in run.samples] == target.sent
    assert [sample.ended for sample in run.samples] == [0.5, 0.75, 1.5, 1.75, 2.0]
    assert (run.seconds, run.is_whole) == (2.0, True)


@given(
    gaps=st.lists(st.floats(0, 3), min_size=1, max_size=12),
    lengths=st.lists(st.integers(1, 3), min_size=12, max_size=12),
)
def test_open_loop_counts_from_the_intended_arrival(gaps: list[float], lengths: list[int]) -> None:
    """Waiting behind a slow answer is part of the latency, sent late or not: Lindley's recursion is the oracle."""
    arrivals = list(itertools.accumulate(gaps))
    run = OneAtATime(1.0).load(asked(*lengths[: len(gaps)]), Arrivals(arrivals))
    free = 0.0
    for sample, arrival, length in zip(run.samples, arrivals, lengths, strict=False):
        begins = max(free, arrival)
        free = begins + length
        # At most 100 sums of numbers below 100, each rounded to 2**-47.
        assert sample.intended == arrival
        assert sample.times[0] == pytest.approx(begins + 1, abs=1e-9)
        assert sample.ended == pytest.approx(free, abs=1e-9)
    assert run.seconds == pytest.approx(free, abs=1e-9)


def test_arrivals_are_a_poisson_process() -> None:
    count, rate = 20000, 8.0
    times = Arrivals.poisson(rate, count, "x").times
    assert times == Arrivals.poisson(rate, count, "x").times
    assert times != Arrivals.poisson(rate, count, "y").times
    gaps = np.diff([0.0, *times])
    # Exponential gaps: mean and standard deviation are 1 / rate; five standard errors of each (kurtosis 9).
    assert abs(gaps.mean() * rate - 1) < 5 / math.sqrt(count)
    assert abs(gaps.std() * rate - 1) < 5 * math.sqrt(8 / 4 / count)


def test_requests_are_drawn_from_the_seed() -> None:
    def make(seed: str) -> list[Asked]:
        return make_requests(200, prompt=Span(5, 9), output=Span(3, 3), vocab_size=97, seed=seed)

    requests = make("0 0")
    assert requests == make("0 0")
    assert requests != make("0 1")
    assert {len(request.prompt_token_ids) for request in requests} == {5, 6, 7, 8, 9}
    assert {request.output_tokens for request in requests} == {3}
    tokens = {token for request in requests for token in request.prompt_token_ids}
    assert (min(tokens), max(tokens)) == (0, 96)  # 1,400 draws miss one of 97 values with probability 5e-7


def test_summary_is_what_numpy_says() -> None:
    samples = (
        Sample(intended=0.5, times=[1.0, 1.25, 1.75], num_tokens=3, ended=1.75),
        Sample(intended=0.0, times=[2.0], num_tokens=1, ended=2.0),
        Sample(intended=1.0, times=[1.5], num_tokens=1, ended=3.0, error="broken"),
        Sample(intended=1.0, times=[4.0, 4.5], num_tokens=4),
        Sample(intended=2.0),
    )
    runs = [
        Run(samples=samples, seconds=5.0, is_whole=False, facts={"host_seconds": 0.25, "steps": 5.0}),
        Run(samples=(), seconds=1.0, is_whole=True, facts={"host_seconds": 0.75, "steps": 5.0}),
    ]
    found: Any = summarize(runs)
    assert list(found) == KEYS
    assert [found[key] for key in KEYS[:5]] == [3, 1, 9, 6.0, 1.5]
    assert found["host_ms_per_step"] == 100.0
    expected = {
        "ttft_ms": [500.0, 2000.0, 3000.0],
        "tpot_ms": [375.0, 500 / 3],
        "itl_ms": [250.0, 500.0, 500.0],
        "e2e_ms": [1250.0, 2000.0],
    }
    for name, values in expected.items():
        for share in (50, 95, 99):
            assert found[name][f"p{share}"] == pytest.approx(np.percentile(values, share), rel=1e-12)
    wired: Any = summarize([Run(samples=samples, seconds=5.0, is_whole=True, facts={"wire_bytes": 270.0})])
    assert wired["wire_bytes_per_token"] == 270 / 9
    nothing: Any = summarize([])
    assert (nothing["requests"], nothing["output_tokens_per_s"], nothing["itl_ms"]["p50"]) == (0, None, None)


def test_what_came_before_an_interrupt_or_an_error_counts() -> None:
    run = OneAtATime(0.25, interrupt_at=1.0).load(asked(2, 9, 1), Clients(2))
    assert not run.is_whole
    assert [(sample.num_tokens, sample.ended) for sample in run.samples] == [(2, 0.5), (2, None), (0, None)]
    assert run.seconds == 1.0
    run = OneAtATime(0.25).load(asked(1, -1, 1), Clients(1))
    assert [sample.error for sample in run.samples] == [None, "refused", None]
    assert run.is_whole


def bench(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    status = cli.main(["bench", *arguments])
    out, err = capsys.readouterr()
    return status, out, without_progress(err)


def without_progress(told: str) -> str:
    """What was told besides how far it is, which a busy machine has time to tell."""
    return re.sub(r"^.*: \d+ of \d+ requests, \d+ tokens, \d+ s\n", "", told, flags=re.MULTILINE)


@pytest.mark.parametrize("load", [("--clients", "3"), ("--rate", "200")], ids=["closed", "open"])
def test_bench_of_an_engine_in_process(
    tiny_llama: Path, capsys: pytest.CaptureFixture[str], load: tuple[str, ...]
) -> None:
    status, out, err = bench(capsys, "--in-process", str(tiny_llama), *SMALL, *load, "--json", "--seed", "3")
    assert (status, err) == (0, "")
    found = json.loads(out)
    assert list(found) == KEYS
    assert (found["requests"], found["errors"], found["output_tokens"]) == (5, 0, 35)
    assert found["output_tokens_per_s"] == pytest.approx(35 / found["wall_s"])
    for name in ("ttft_ms", "tpot_ms", "itl_ms", "e2e_ms"):
        assert 0 < found[name]["p50"] <= found[name]["p95"] <= found[name]["p99"] <= 1e3 * found["wall_s"]
    assert found["ttft_ms"]["p50"] < found["e2e_ms"]["p50"]
    # A request's time per token is the mean of its gaps, so no percentile 99 of means is above the longest gap.
    assert 0 < found["host_ms_per_step"] < 1e3 * found["wall_s"]


def test_bench_prints_a_table(tiny_llama: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, err = bench(capsys, "--in-process", str(tiny_llama), *SMALL)
    assert (status, err) == (0, "")
    lines = out.splitlines()
    assert lines[0].startswith("5 requests (0 failed), 35 tokens in ")
    assert [line.split()[0] for line in lines[1:]] == ["ms", "ttft", "tpot", "itl", "e2e"]


def test_compare_sends_all_the_same(
    tiny_llama: Path, tiny_llama_tied: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from pressd.server.bench.in_process import InProcess

    sent: list[tuple[int, int, tuple[int, ...]]] = []
    send = InProcess.send

    def spy(self: InProcess, number: int, request: Asked) -> None:
        sent.append((id(self), number, request.prompt_token_ids))
        send(self, number, request)

    monkeypatch.setattr(InProcess, "send", spy)
    models = [str(tiny_llama), str(tiny_llama_tied)]
    status, out, err = bench(capsys, "--compare", *models, *SMALL, "--rounds", "2", "--json")
    assert (status, err) == (0, "")
    rows = json.loads(out)["artifacts"]
    assert [row["artifact"] for row in rows] == models
    assert all(list(row) == [*KEYS, "artifact", "weights_bytes", "rounds_tokens_per_s"] for row in rows)
    assert [(row["requests"], row["output_tokens"], len(row["rounds_tokens_per_s"])) for row in rows] == [
        (10, 70, 2)
    ] * 2
    assert rows[0]["weights_bytes"] > rows[1]["weights_bytes"] > 0
    order = [next(group)[0] for _, group in itertools.groupby(sent, key=lambda entry: entry[0])]
    assert order == [order[0], order[1]] * 2, "the models take turns"
    by_model = [[entry[1:] for entry in sent if entry[0] == model] for model in order[:2]]
    assert by_model[0] == by_model[1]
    assert len({prompt for _, prompt in by_model[0]}) == 11, "one to warm up, five in each round"

    status, out, err = bench(capsys, "--compare", *models, *SMALL, "--rounds", "1")
    assert [line.split()[0] for line in out.splitlines()] == ["weights", *models]


def test_requests_that_fail_are_counted_and_named(tiny_llama: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """8 KiB hold 16 tokens: keys and values of two layers with 2 heads of 16 in float32."""
    few = ["--requests", "9", "--prompt-tokens", "9-20", "--output-tokens", "2", "--kv-memory", "8KiB"]
    status, out, err = bench(capsys, "--in-process", str(tiny_llama), *few, "--json", "--max-batch", "1")
    found = json.loads(out)
    assert status == 0
    assert 0 < found["errors"] < found["requests"] == 9
    assert found["output_tokens"] == 2 * (9 - found["errors"])
    assert err.startswith(f"{found['errors']} requests failed; the first: max_new_tokens: the request may reach ")


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ([], "one of the arguments --target --in-process --compare is required"),
        (["--target", "x:1", "--in-process", "x"], "not allowed with argument"),
        (["--target", "x"], "--target: 'x' is no address of a server"),
        (["--target", "x:1", "--threads", "1", "--dtype", "float32"], "--dtype, --threads: these are settings of the"),
        (["--in-process", "x", "--tls"], "--tls: these are about a server: they need --target"),
        (["--in-process", "x", "--compare", "x", "y"], "not allowed with argument"),
        (["--in-process", "x", "--clients", "2", "--rate", "1"], "not allowed with argument"),
        (["--in-process", "x", "--clients", "0"], "--clients: '0' is not a whole number of at least 1"),
        (["--in-process", "x", "--rate", "inf"], "--rate: 'inf' is not a number above 0"),
        (["--in-process", "x", "--prompt-tokens", "9-3"], "--prompt-tokens: '9-3' is not a number of at least 1"),
        (["--in-process", "x", "--dtype", "int3"], "--dtype: choose one of auto, "),
        (["--in-process", "x", "--max-batch", "600"], "max_step_tokens (512) is below max_batch (600)"),
        (["--compare", "x"], "--compare has one directory; give two or more, or --in-process"),
    ],
)
def test_wrong_usage_is_status_2(capsys: pytest.CaptureFixture[str], arguments: list[str], complaint: str) -> None:
    try:
        status = cli.main(["bench", *arguments])
    except SystemExit as end:
        status = int(str(end.code))
    out, err = capsys.readouterr()
    assert (status, out) == (2, "")
    assert complaint in err


def test_lengths_that_the_model_cannot_have_are_refused(tiny_llama: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, err = bench(capsys, "--in-process", str(tiny_llama), "--prompt-tokens", "100-200")
    assert (status, out) == (1, "")
    needed = "--prompt-tokens and --output-tokens need a context of 264, and it has 256"
    assert err == f"pressd bench: {tiny_llama}: {needed}\n"


@pytest.mark.system
def test_ctrl_c_prints_what_was_measured_and_is_status_130(tiny_llama: Path) -> None:
    command = [sys.executable, "-m", "pressd.server.cli", "bench", "--in-process", str(tiny_llama), "--json"]
    endless = ["--requests", "100000", "--prompt-tokens", "4", "--output-tokens", "8", "--threads", "1"]
    process = subprocess.Popen([*command, *endless], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    told = process.stderr.readline()
    assert told.startswith(f"{tiny_llama}: "), told
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in err
    found = json.loads(out)
    assert int(told.split(" of 100000 ")[0].split()[-1]) <= found["requests"] < 100000
    assert found["output_tokens"] >= 8 * found["requests"]


def test_bench_needs_no_grpc() -> None:
    program = (
        "import sys; sys.modules.update(dict.fromkeys(('grpc', 'zmq', 'msgspec', 'uvloop', 'google.protobuf')))\n"
        "from pressd.server.bench import verb; assert 'torch' not in sys.modules\n"
        "from pressd.server.bench import in_process"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
