"""What an interpreter loads before the first cell: each sandbox pays for it with time and memory."""

from tests.unit.worker import host


async def test_asyncio_is_loaded_by_the_first_cell_that_awaits() -> None:
    async with host.started() as worker:
        loaded = await worker.run("import sys; print('asyncio' in sys.modules)")
        assert loaded.text == "False\n"
        awaited = await worker.run("import asyncio\nprint(await asyncio.sleep(0, 'awaited'))")
        assert awaited.text == "awaited\n"
