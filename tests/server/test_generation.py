"""One request between engine and reader: what is read at once, and who hears first that it has ended."""

import asyncio
from collections.abc import Callable
from pathlib import Path

import pytest

from pressd.runtime.request import FinishReason, RequestOutput
from pressd.server import door as door_module
from pressd.server.admission import Admission
from pressd.server.asked import Asked, Output, TokenPrompt
from pressd.server.door import STEP_WATCHDOG, Door
from pressd.server.errors import late
from pressd.server.generation import MAX_READ, Ended, Generation, Said
from pressd.server.metrics import Metrics
from pressd.server.settings import Settings

TEXT_OF = {7: b"a", 8: b"!"}


def generation(*, num_sequences: int = 1, stop: tuple[str, ...] = (), aborted: list[int] | None = None) -> Generation:
    return Generation(
        Asked(
            request_id="r",
            model="",
            prompt=TokenPrompt((1,)),
            sampling={"n": num_sequences},
            stop=stop,
            output=Output(ids=True),
        ),
        engine_id="0",
        prompt_token_ids=(1,),
        seed=0,
        arrival=0.0,
        bytes_of_token=TEXT_OF,
        abort=[].append if aborted is None else aborted.append,
    )


def said(*ids: int, index: int = 0, reason: FinishReason | None = None) -> RequestOutput:
    return RequestOutput(request_id="0", index=index, token_ids=ids, finish_reason=reason, scheduled_at=1.0)


@pytest.mark.parametrize("num_sequences", [1, 3])
def test_a_backlog_is_read_in_parts_and_all_of_it(num_sequences: int) -> None:
    made, num_tokens = generation(num_sequences=num_sequences), 3 * MAX_READ + 1
    for index in range(num_sequences):
        made.push(said(*(7,) * num_tokens, index=index, reason=FinishReason.EOS), 1.0)

    async def read() -> list[int]:
        parts = []
        while updates := await made.next():
            parts.append(sum(len(update.pieces) for update in updates if isinstance(update, Said)))
        return parts

    parts = asyncio.run(read())
    assert max(parts) <= MAX_READ
    assert sum(parts) == num_sequences * num_tokens


def test_reading_goes_on_while_a_stop_text_may_swallow_all_that_was_read() -> None:
    made = generation(stop=("a" * (2 * MAX_READ) + "!",))
    made.push(said(*(7,) * (2 * MAX_READ), 8, *(7,) * MAX_READ), 1.0)

    async def read() -> list[str]:
        return [type(update).__name__ for update in await made.next()]

    assert asyncio.run(read()) == ["Ended"]
    assert made.strands[0].end is not None
    assert made.strands[0].end.reason is FinishReason.STOP
    assert made.strands[0].num_unread == 0


@pytest.mark.parametrize(
    "finish",
    [
        lambda made: made.end(FinishReason.CANCELLED),
        lambda made: made.end(FinishReason.TIME_LIMIT),
        lambda made: made.fail(late("QUEUE_TIMEOUT", "late")),
    ],
    ids=["cancelled", "time limit", "failed"],
)
def test_the_engine_lets_go_at_once_however_slow_the_reader(finish: Callable[[Generation], None]) -> None:
    aborted: list[int] = []
    made = generation(num_sequences=3, aborted=aborted)
    made.push(said(7, index=1, reason=FinishReason.EOS), 1.0)
    finish(made)
    assert aborted == [0, 2]  # nobody has read anything; and what is done needs no abort
    assert made.engine_is_done
    finish(made)
    assert aborted == [0, 2]


def test_what_exists_is_still_told_after_the_engine_let_go() -> None:
    made = generation(num_sequences=2)
    made.push(said(7, 7), 1.0)
    made.end(FinishReason.CANCELLED)
    made.push(said(7, 7), 2.0)  # it was on its way
    updates = asyncio.run(made.next())
    assert [len(update.pieces) for update in updates if isinstance(update, Said)] == [2]
    ends = [update.strand.end for update in updates if isinstance(update, Ended)]
    assert [end.reason for end in ends if end is not None] == 2 * [FinishReason.CANCELLED]


def test_a_reader_that_is_slow_is_no_step_that_hangs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr(door_module.time, "monotonic", lambda: now)
    door = Door(Settings(model=tmp_path, served_name="m"), Metrics("m"), "none:none")
    admission = Admission(max_requests=9, max_waiting_tokens=9)

    async def look() -> tuple[float, float]:
        nonlocal now
        made = generation()
        with admission.enter() as ticket, door.live.hold(made, ticket):
            now += STEP_WATCHDOG
            waiting = door.step_age()
            made.push(said(7, reason=FinishReason.EOS), now)  # all is here, and nobody reads it
            return waiting, door.step_age()

    assert asyncio.run(look()) == (STEP_WATCHDOG, 0.0)
