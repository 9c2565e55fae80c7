"""Messages leave in the order they were posted in, whenever that was."""

import asyncio
from collections.abc import Callable

import pytest
from rlm_proto.v1.sandbox_pb2 import AttachRequest, CellEnded

from sandbox_image.worker.outbox import Outbox


def message(number: int) -> AttachRequest:
    return AttachRequest(cell_ended=CellEnded(cell_id=number))


class Stream:
    """Takes a turn of the loop for each message, or breaks."""

    def __init__(self, breaks_at: int | None = None) -> None:
        self.begun: list[int] = []
        self.written: list[int] = []
        self.after_write: Callable[[int], None] = lambda number: None
        self._breaks_at = breaks_at
        self._news = asyncio.Event()

    async def write(self, request: AttachRequest) -> None:
        number = request.cell_ended.cell_id
        self.begun.append(number)
        if number == self._breaks_at:
            raise asyncio.InvalidStateError("the call is over")
        await asyncio.sleep(0)
        self.written.append(number)
        self.after_write(number)
        self._news.set()

    async def until(self, count: int) -> None:
        async with asyncio.timeout(5):
            while len(self.written) < count:
                self._news.clear()
                await self._news.wait()


def never(held: bool) -> None:
    raise AssertionError(held)


async def test_a_message_with_none_before_it_is_on_its_way_when_post_returns() -> None:
    stream = Stream()
    Outbox(stream.write, never).post(message(1))
    assert stream.begun == [1]


async def test_messages_keep_their_order_and_never_overlap() -> None:
    stream = Stream()
    outbox = Outbox(stream.write, never)
    for number in range(10):
        outbox.post(message(number))
        assert len(stream.begun) - len(stream.written) == 1
    await stream.until(10)
    assert stream.written == list(range(10))


async def test_a_message_posted_as_the_last_one_leaves_is_sent_too() -> None:
    stream = Stream()
    outbox = Outbox(stream.write, never)
    loop = asyncio.get_running_loop()

    def post_next(number: int) -> None:
        # After the writer's last look, before anybody knows that it has ended.
        if number < 5:
            loop.call_soon(outbox.post, message(number + 1))

    stream.after_write = post_next
    outbox.post(message(1))
    await stream.until(5)
    assert stream.written == [1, 2, 3, 4, 5]


async def test_the_source_of_many_messages_is_held_back_and_let_go() -> None:
    stream = Stream()
    held: list[bool] = []
    outbox = Outbox(stream.write, held.append)
    for number in range(40):
        outbox.post(message(number))
    assert held == [True]
    await stream.until(40)
    assert held == [True, False]


@pytest.mark.parametrize("breaks_at", [1, 3])
async def test_a_broken_stream_is_told_once_and_nothing_more_is_written(breaks_at: int) -> None:
    stream = Stream(breaks_at)
    outbox = Outbox(stream.write, never)
    for number in (1, 2, 3, 4):
        outbox.post(message(number))
    async with asyncio.timeout(5):
        with pytest.raises(asyncio.InvalidStateError):
            await outbox.broken()
    outbox.post(message(5))
    await asyncio.sleep(0)
    assert max(stream.begun) == breaks_at
