import asyncio
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio
from rlm_proto.v1 import provider_pb2 as pb

from orchestrator.models.provider import frames


@pytest_asyncio.fixture
async def fed() -> AsyncIterator[asyncio.StreamReader]:
    yield asyncio.StreamReader()


MESSAGE = pb.ToProvider(cancel=pb.CancelModelCall(id=7))
FRAME = len(MESSAGE.SerializeToString()).to_bytes(4, "big") + MESSAGE.SerializeToString()


async def test_messages_come_out_one_by_one_whatever_pieces_they_come_in(fed: asyncio.StreamReader) -> None:
    async def feed() -> None:
        for byte in FRAME * 3:
            fed.feed_data(bytes((byte,)))
            await asyncio.sleep(0)
        fed.feed_eof()

    feeding = asyncio.create_task(feed())
    for _ in range(3):
        payload = await frames.receive(fed)
        assert payload is not None
        assert pb.ToProvider.FromString(payload) == MESSAGE
    assert await frames.receive(fed) is None
    await feeding


@pytest.mark.parametrize("cut", range(1, len(FRAME)))
async def test_a_message_that_is_cut_off_is_the_end(fed: asyncio.StreamReader, cut: int) -> None:
    fed.feed_data(FRAME[:cut])
    fed.feed_eof()
    assert await frames.receive(fed) is None


async def test_a_length_that_no_message_of_ours_has_is_refused_before_it_is_waited_for(
    fed: asyncio.StreamReader,
) -> None:
    fed.feed_data(b"\xff\xff\xff\xff")
    with pytest.raises(ValueError, match="a message of 4294967295 bytes"):
        await frames.receive(fed)
