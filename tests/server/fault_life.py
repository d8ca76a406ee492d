"""The life of one server among faults, and what must be true whenever there is peace."""

import os
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import grpc.aio
import psutil
from fault_kinds import Kind, Scene
from fault_ledger import Ledger

Eventually = Callable[[Callable[[], bool], str], None]
# After so many faults everything that is kept for good has been made: arenas, pools, series of metrics.
NUM_WARM = 50
# Memory that was needed for a while (messages of 17 MiB, tokens that nobody read) is given back late, and what is kept
# for good stays: the least of so many looks is what counts. Over 200 faults it may grow by this much: 41 KiB for each,
# less than the 64 KiB that gRPC buffers for a stream.
NUM_LOOKS = 5
RSS_SLACK = 8 << 20
# gRPC's pool may keep a thread for each core that was busy, and the door's own pool has two, of which loading used one.
THREAD_SLACK = (os.cpu_count() or 1) + 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Footprint:
    """What the door's process holds. `rss` in bytes."""

    num_fds: int
    num_threads: int
    rss: int


class Life:
    """One server process, all that is done to it, and what must be true between two blocks of faults and at its end."""

    def __init__(self, server: Any, eventually: Eventually) -> None:
        self.server = server
        self.ledger = Ledger()
        self.num_faults = 0
        self._eventually = eventually
        self._process = psutil.Process(server.process.pid)
        self._answer()  # the first text starts the tokenizer's pool of threads, which stays
        self._first = self._footprint()
        self._rss: list[int] = []  # since it was warm

    async def suffer(self, kinds: list[Kind], rng: random.Random, *, drain: bool) -> None:
        """Do a block of faults beside well-behaved traffic; at its end all calls are over."""
        async with grpc.aio.insecure_channel(self.server.target) as channel:
            scene = Scene(self.server, self.ledger, channel, rng)
            async with scene.traffic():
                for kind in [*kinds, Scene.drain] if drain else kinds:
                    await kind(scene)
                    self.num_faults += 1

    def check(self) -> None:
        """Nothing is left of calls that are over."""
        self.check_ends()
        server = self.server.await_ready()
        self._answer()  # places that were not given back would be missing now
        for gauge in ("pressd_requests_running", "pressd_requests_waiting"):
            server.await_metric(0, gauge)
        server.await_metric(0, "pressd_kv_cache_blocks", state="used")
        self._eventually(self._counts_agree, "calls begun are calls ended, in metrics and log")
        most = self._first.num_fds
        self._eventually(lambda: self._footprint().num_fds <= most, f"there are {most} file descriptors at most")
        most = self._first.num_threads + THREAD_SLACK
        self._eventually(lambda: self._footprint().num_threads <= most, f"there are {most} threads at most")
        if self.num_faults >= NUM_WARM:
            self._rss.append(self._footprint().rss)

    def check_memory(self) -> None:
        """The process is not larger than it was; needs a long life."""
        assert len(self._rss) >= 2 * NUM_LOOKS
        assert min(self._rss[-NUM_LOOKS:]) <= min(self._rss[:NUM_LOOKS]) + RSS_SLACK, self._rss

    def check_ends(self) -> None:
        """Every call got the end that was promised, in the eyes of both sides, and the server knows of no defect."""
        assert self.ledger.complaints(self.server.log_lines()) == []
        errors = [line for line in self.server.log_lines() if line["level"] == "error"]
        assert [line for line in errors if line["event"] != "engine is down"] == []
        assert "Traceback" not in self.server.log_text()

    def _answer(self) -> None:
        with self.server.client() as client:
            assert client.generate("the end").completions[0].text == "the end"

    def _counts_agree(self) -> bool:
        num_logged = sum(line["event"] == "call" for line in self.server.log_lines())
        started, handled = (self.server.metric(f"grpc_server_{name}_total") for name in ("started", "handled"))
        return bool(started == handled and self.server.metric("pressd_requests_total") == num_logged)

    def _footprint(self) -> Footprint:
        with self._process.oneshot():
            return Footprint(
                num_fds=self._process.num_fds(),
                num_threads=self._process.num_threads(),
                rss=self._process.memory_info().rss,
            )
