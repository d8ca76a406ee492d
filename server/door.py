"""Everything between a well-formed request and the engine: readiness, admission, live requests. No protocol."""

import asyncio
import enum
import itertools
import logging
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from functools import partial
from typing import TypeVar

from pressd.runtime.report import EngineInfo, StepStats
from pressd.server import measure, wire
from pressd.server import metrics as m
from pressd.server.admission import Admission
from pressd.server.asked import Asked, engine_refusal, engine_request
from pressd.server.engine_client import EngineClient, EngineCommand, EngineGone
from pressd.server.errors import invalid, not_found, unavailable
from pressd.server.generation import Generation
from pressd.server.live import Live
from pressd.server.model_card import ModelCard, read_card
from pressd.server.prompts import Prepared, bad_words_of, bytes_of_token, prompt_of
from pressd.server.settings import Settings
from pressd.server.text import Text

log = logging.getLogger("pressd.door")
T = TypeVar("T")

# What a client is told to wait, in seconds: a model loads for many seconds; beside a draining server there are others.
STARTING_RETRY_AFTER = 5.0
DRAINING_RETRY_AFTER = 1.0
# Starts of the engine that may fail in a row, and seconds that a step may take, before the process counts as broken.
MAX_FAILED_STARTS = 5
STEP_WATCHDOG = 300.0


class Phase(enum.Enum):
    """Whether requests are taken."""

    STARTING = enum.auto()
    READY = enum.auto()
    ENGINE_DOWN = enum.auto()
    DRAINING = enum.auto()


class Door:
    """One served model. `changed` is set whenever `phase` may have changed."""

    def __init__(self, settings: Settings, metrics: m.Metrics, factory: str) -> None:
        self.settings = settings
        self.metrics = metrics
        self.changed = asyncio.Event()
        self.drain_requested = asyncio.Event()
        self.drain_timeout: float | None = None  # seconds; None: as the settings say
        self.live = Live()
        self.info: EngineInfo | None = None
        self.card: ModelCard | None = None
        self.text: Text | None = None
        command = EngineCommand(model=settings.model, config=settings.engine_config(), factory=factory)
        self.engine = EngineClient(command, self)
        self.admission = Admission(
            max_requests=settings.max_batch + settings.max_queue_requests, max_waiting_tokens=settings.max_queue_tokens
        )
        self._thread = ThreadPoolExecutor(max_workers=2, thread_name_prefix="text")
        self._engine_up = False
        self._draining = False
        self._retry_after = STARTING_RETRY_AFTER
        self._stats: StepStats | None = None
        self._last_report = time.monotonic()
        self._numbers = itertools.count()
        measure.begin(metrics)

    @property
    def phase(self) -> Phase:
        """Whether requests are taken now."""
        if self._draining:
            return Phase.DRAINING
        if self._engine_up and self.card is not None:
            return Phase.READY
        return Phase.ENGINE_DOWN if self.engine.num_starts and not self._engine_up else Phase.STARTING

    @property
    def is_alive(self) -> bool:
        """False when only a new process can help: the engine cannot be started, or hangs in a step."""
        return self.engine.num_failed_starts < MAX_FAILED_STARTS and self.step_age() < STEP_WATCHDOG

    def step_age(self) -> float:
        """Seconds since the engine's last report, 0 while nothing is asked of it."""
        return time.monotonic() - self._last_report if self._engine_is_asked else 0.0

    @property
    def _engine_is_asked(self) -> bool:
        """Whether a request waits for the engine: others have all they asked for, and wait for their readers."""
        return any(generation.is_open for generation in self.live)

    def require_ready(self) -> tuple[EngineInfo, ModelCard]:
        """Return what is served; raises Refusal while nothing is taken."""
        if self._draining:
            raise unavailable("DRAINING", "the server is shutting down; ask another one", DRAINING_RETRY_AFTER)
        if self.engine.num_starts and not self._engine_up:
            raise unavailable("ENGINE_DOWN", "the engine died and is being restarted", self._retry_after)
        if self.info is None or self.card is None:
            raise unavailable("STARTING", "the model is being loaded", self._retry_after)
        return self.info, self.card

    @property
    def stats(self) -> StepStats | None:
        """What the engine last said it holds; None while it is down."""
        return self._stats if self._engine_up else None

    @property
    def version(self) -> str:
        """Identity of the artifact, empty until it is loaded."""
        return self.info.artifact_id if self.info else ""

    def require_model(self, name: str) -> None:
        """Raise Refusal unless `name` is empty, the served name, or that with @version."""
        served = self.settings.served_name
        if name not in ("", served, f"{served}@{self.version}"):
            raise not_found("MODEL_NOT_FOUND", f"model {name!r} is not served here; {served!r} is")

    def require_text(self, field: str) -> Text:
        """Return the tokenizer; raises Refusal if the model has none."""
        if self.text is None:
            raise invalid(field, "this model has no tokenizer; send token_ids, and set output.text to false")
        return self.text

    async def in_thread(self, function: Callable[[], T]) -> T:
        """Run slow work on text beside the event loop."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, function)

    async def run(self) -> None:
        """Load the model and keep its engine alive until cancelled; raises EngineStartError or ValueError."""
        loading = asyncio.ensure_future(self._load())
        running = asyncio.ensure_future(self.engine.run())
        try:
            await asyncio.gather(loading, running)
        finally:
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)
            self._thread.shutdown(wait=False, cancel_futures=True)

    async def _load(self) -> None:
        card = await self.in_thread(lambda: read_card(self.settings.model))
        self.text = await self.in_thread(lambda: Text.load(self.settings.model))
        for name in card.not_applied:
            log.warning("generation_config.json asks for what this build does not do", extra={"field": name})
        self.card = card
        self._describe()

    @asynccontextmanager
    async def generation(self, asked: Asked, arrival: float) -> AsyncIterator[tuple[Generation, Prepared]]:
        """Queue a request for the length of a block; leaving the block frees all it holds. Raises Refusal."""
        self.require_ready()
        self.require_model(asked.model)
        self.live.require_free(asked.request_id)
        with self.admission.enter(asked.num_sequences) as ticket:
            table = bytes_of_token(asked, self.text)
            prompt = await prompt_of(self, asked)
            bad_words = await bad_words_of(self, asked.bad_words)
            info, card = self.require_ready()  # tokenising took a while
            self.live.require_free(asked.request_id)
            engine_id = str(next(self._numbers))
            request = engine_request(
                asked, prompt.ids, bad_words=bad_words, info=info, card=card, engine_id=engine_id, arrival=arrival
            )
            generation = Generation(
                asked,
                engine_id=engine_id,
                prompt_token_ids=prompt.ids,
                seed=request.sampling.seed,
                arrival=arrival,
                bytes_of_token=table,
                abort=partial(self.engine.abort, engine_id),
            )
            ticket.wait_with(len(prompt.ids))
            if not self._engine_is_asked:
                self._last_report = time.monotonic()
            with self.live.hold(generation, ticket):
                try:
                    self.engine.submit(request)
                    yield generation, prompt
                finally:
                    if not generation.engine_is_done:
                        self.engine.abort(engine_id)
                    measure.closed(self.metrics, generation)

    def request_drain(self, timeout: float | None) -> None:
        """Have the server end as SIGTERM would, after at most so many seconds; None: as the settings say."""
        self.drain_timeout = timeout
        self.drain_requested.set()
        self.drain()

    def drain(self) -> None:
        """Take nothing new from now on; `live.idle` is set when the last request has left."""
        self._draining = True
        self.changed.set()

    async def flush_prefix_cache(self) -> int:
        """Have the engine forget cached prefixes; return how many blocks held nothing else. Raises Refusal."""
        self.require_ready()
        try:
            return await self.engine.flush_prefix_cache()
        except EngineGone:
            raise unavailable("ENGINE_DOWN", "the engine died before it answered", self._retry_after) from None

    def engine_ready(self, info: EngineInfo) -> None:
        """The engine takes requests."""
        if self.engine.num_starts > 1:
            self.metrics.add(m.RESTARTS)
        self.info = info
        self._stats = None
        self._engine_up = True
        self._describe()
        log.info("engine is ready", extra={"device": info.device, "artifact": info.artifact_id})

    def engine_stepped(self, report: wire.Stepped) -> None:
        """The engine made a step, or obeyed while it had nothing to do."""
        assert self.info is not None
        self._last_report = now = time.monotonic()
        measure.step(self.metrics, report.step.stats, self._stats)
        measure.gauges(self.metrics, report.step.stats, self.info)
        self._stats = report.step.stats
        for output in report.step.outputs:
            held = self.live.of_engine(output.request_id)
            if held is None:
                continue  # it left while the step ran
            generation, ticket = held
            ticket.begun()
            if output.token_ids:
                strand = generation.strands[output.index]
                measure.tokens(self.metrics, generation, strand, len(output.token_ids), now)
            generation.push(output, now)
        for rejection in report.rejections:
            held = self.live.of_engine(rejection.request_id)
            if held is not None:
                field = held[0].asked.prompt.field
                held[0].fail(engine_refusal(rejection.field, rejection.message, field))

    def engine_down(self, cause: str, retry_after: float) -> None:
        """The engine died: so do its requests, and nothing is taken until it is back."""
        self._engine_up = False
        self._retry_after = retry_after + (sum(self.info.load_seconds.values()) if self.info else 0.0)
        # The cause is the operator's to know: it may name files.
        self.live.fail_all(unavailable("ENGINE_DOWN", "the engine died and is being restarted", self._retry_after))
        for series in (m.RUNNING, m.WAITING, m.SWAPPED, m.KV_USAGE, m.KV_BLOCKS, m.KV_USED):
            self.metrics.forget(series)
        self.changed.set()

    def _describe(self) -> None:
        if self._engine_up and self.info is not None and self.card is not None:
            measure.model(self.metrics, self.info, self.card)
        self.changed.set()
