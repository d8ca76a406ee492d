"""`pressd bench --target`: what it counts is compared with what the server counts."""

import gc
import json
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pressd.server.bench.over_grpc import OverGrpc
from pressd.server.bench.workload import Asked

KEYS = [
    *("requests", "errors", "output_tokens", "wall_s", "output_tokens_per_s"),
    *("ttft_ms", "tpot_ms", "itl_ms", "e2e_ms", "wire_bytes_per_token"),
]
# Of the server below, all the requests it holds.
PLACES = 2 + 3


def without_progress(told: str) -> str:
    """What was told besides how far it is, which a busy machine has time to tell."""
    return re.sub(r"^.*: \d+ of \d+ requests, \d+ tokens, \d+ s\n", "", told, flags=re.MULTILINE)


def over_grpc(*arguments: str) -> tuple[int, str, str]:
    """Run `bench` in a fresh interpreter, which must not load torch."""
    program = (
        "import sys; from pressd.server.cli import main\n"
        "status = main(sys.argv[1:])\n"
        "assert not {'torch', 'transformers', 'zmq', 'uvloop'} & set(sys.modules)\n"
        "sys.exit(status)"
    )
    ended = subprocess.run(
        [sys.executable, "-c", program, "bench", *arguments], capture_output=True, text=True, timeout=120
    )
    return ended.returncode, ended.stdout, without_progress(ended.stderr)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, server_of: Any) -> Any:
    """A server of a model without a tokenizer, which takes two requests at a time and lets three wait."""
    model = tmp_path_factory.mktemp("models") / "ids"
    model.mkdir()
    (model / "script.json").write_text(json.dumps({"vocab_size": 100, "eos": 0}))
    yield from server_of(model, "--max-batch", "2", "--max-queue-requests", "3")


@pytest.mark.system
@pytest.mark.parametrize("load", [("--clients", "2"), ("--rate", "5")], ids=["closed", "open"])
def test_bench_of_a_server(server: Any, load: tuple[str, ...]) -> None:
    small = ["--requests", "5", "--prompt-tokens", "3-20", "--output-tokens", "70"]
    tokens = server.metric("pressd_generated_tokens_total")
    status, out, err = over_grpc("--target", server.target, *small, *load, "--json")
    assert (status, err) == (0, "")
    found = json.loads(out)
    assert list(found) == KEYS
    assert (found["requests"], found["errors"], found["output_tokens"]) == (5, 0, 350)
    assert found["output_tokens_per_s"] == pytest.approx(350 / found["wall_s"])
    for name in ("ttft_ms", "e2e_ms"):
        assert 0 < found[name]["p50"] <= found[name]["p95"] <= found[name]["p99"] <= 1e3 * found["wall_s"]
    # At least the tag and the byte of an id below 128; what is exact is tested below.
    assert 2 < found["wire_bytes_per_token"] < 200
    warm_up = 4 * (2 if load[0] == "--clients" else 1)
    assert server.metric("pressd_generated_tokens_total") - tokens == 350 + warm_up


@pytest.mark.system
def test_bytes_on_the_wire_are_those_of_the_messages(server: Any) -> None:
    sizes: list[int] = []
    with OverGrpc(server.target) as target:
        stream = target._client.stream

        async def spy(*args: Any, **options: Any) -> Any:
            async for event in stream(*args, **options):
                sizes.append(len(event.SerializeToString()))
                yield event

        target._client.stream = spy  # type: ignore[method-assign,assignment]
        target.send(0, Asked(prompt_token_ids=(1, 2, 3), output_tokens=70))
        while not any(news.is_last for news in target.poll(60)):
            pass
        assert len(sizes) >= 3, "accepted, deltas of what was ready, finished"
        assert target.facts() == {"wire_bytes": sum(sizes) + 5 * len(sizes)}
        assert target.facts() == {"wire_bytes": 0}


@pytest.mark.system
def test_server_that_refuses_is_asked_once(server: Any) -> None:
    """While others hold every place all are refused, those of the warm-up as well, and none calls twice."""
    server.allow_steps(0)
    with server.client() as client:
        holding = [client.stream([1], max_new_tokens=1, text=False) for _ in range(PLACES)]
        assert all(next(stream).HasField("accepted") for stream in holding)
        calls = server.metric("pressd_requests_total", method="GenerateStream")
        status, out, err = over_grpc("--target", server.target, "--requests", "3", "--clients", "3", "--json")
        server.allow_all_steps()
        assert all(len(list(stream)) > 0 for stream in holding)
    found = json.loads(out)
    assert (status, found["requests"], found["errors"], found["output_tokens"]) == (0, 3, 3, 0)
    assert err.startswith("3 requests failed; the first: RESOURCE_EXHAUSTED: ")
    assert server.metric("pressd_requests_total", method="GenerateStream") - calls == 3 + 3 + PLACES


@pytest.mark.system
def test_bench_of_no_server_or_too_small_a_model_is_one_line(server: Any) -> None:
    assert over_grpc("--target", "127.0.0.1:1") == (
        *(1, ""),
        "pressd bench: 127.0.0.1:1 does not answer; is `pressd serve` running there?\n",
    )
    needed = "--prompt-tokens and --output-tokens need a context of 564, and it has 512"
    assert over_grpc("--target", server.target, "--prompt-tokens", "500") == (
        *(1, ""),
        f"pressd bench: {server.target}: {needed}\n",
    )


@pytest.mark.system
def test_disconnecting_leaves_no_task(server: Any, caplog: pytest.LogCaptureFixture) -> None:
    """grpc.aio keeps a task for each call; one that its event loop leaves unfinished is reported when it is freed."""
    asked = Asked(prompt_token_ids=(1, 2, 3), output_tokens=70)
    for _ in range(30):
        with OverGrpc(server.target) as target:
            for number in range(2):
                target.send(number, asked)
            while not any(news.is_last for news in target.poll(60)):
                pass
    gc.collect()
    assert caplog.records == []


@pytest.mark.system
def test_ctrl_c_prints_what_a_server_did_and_calls_off_the_rest(serve: Any, echo: Path) -> None:
    server = serve(echo).await_ready()
    endless = ["--requests", "100000", "--prompt-tokens", "4", "--output-tokens", "8", "--clients", "3", "--json"]
    command = [sys.executable, "-m", "pressd.server.cli", "bench", "--target", server.target, *endless]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    assert process.stderr.readline().startswith(f"{server.target}: ")
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, "Traceback" in err) == (130, False)
    found = json.loads(out)
    assert 0 < found["requests"] < 100000
    assert found["output_tokens"] >= 8 * (found["requests"] - found["errors"])
    server.await_metric(0, "pressd_requests_running")
