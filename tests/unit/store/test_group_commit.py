import asyncio
import sqlite3
from collections.abc import Callable
from typing import Any, cast

import pytest

from orchestrator.store.backend import Transaction, UnsureError, Work
from orchestrator.store.group_commit import MAX_TOGETHER, GroupCommit


class Disk:
    """Commits what works write to it, when it is let to."""

    def __init__(self) -> None:
        self.committed: list[list[str]] = []
        self.tried = 0
        self.may_go = asyncio.Event()
        self.fails_with: Exception | None = None
        self._written: list[str] = []

    async def transact(self, work: Work[Any]) -> Any:
        await self.may_go.wait()
        self.tried += 1
        self._written = []
        result = await work(cast(Transaction, self))
        if isinstance(self.fails_with, UnsureError):
            raise UnsureError(self.fails_with.mark, result)
        if self.fails_with is not None:
            raise self.fails_with
        self.committed.append(self._written)
        return result

    def writes(self, name: str, error: Exception | None = None) -> Work[str]:
        async def work(_: Transaction) -> str:
            self._written.append(name)
            if error is not None:
                raise error
            return name

        return work


Start = Callable[[Work[str]], asyncio.Task[str]]


@pytest.fixture
async def disk() -> Disk:
    return Disk()


@pytest.fixture
async def group(disk: Disk) -> GroupCommit:
    return GroupCommit(disk.transact)


async def begin(group: GroupCommit, *works: Work[str]) -> list[asyncio.Task[str]]:
    """The first is under way, and the others wait, when this returns."""
    tasks = [asyncio.create_task(group.run(work)) for work in works]
    for _ in range(3):
        await asyncio.sleep(0)
    return tasks


async def test_what_waits_meanwhile_is_committed_together_in_order(disk: Disk, group: GroupCommit) -> None:
    first = await begin(group, disk.writes("a"))
    others = await begin(group, *(disk.writes(name) for name in "bcd"))
    disk.may_go.set()
    assert await asyncio.gather(*first, *others) == ["a", "b", "c", "d"]
    assert disk.committed == [["a"], ["b", "c", "d"]]
    await group.close()
    assert group.is_idle


async def test_a_transaction_takes_so_many_and_no_more(disk: Disk, group: GroupCommit) -> None:
    tasks = await begin(group, disk.writes("first"))
    tasks += await begin(group, *(disk.writes(str(number)) for number in range(MAX_TOGETHER + 1)))
    disk.may_go.set()
    await asyncio.gather(*tasks)
    assert [len(names) for names in disk.committed] == [1, MAX_TOGETHER, 1]


async def test_one_failure_is_nobody_elses(disk: Disk, group: GroupCommit) -> None:
    await begin(group, disk.writes("a"))
    tasks = await begin(group, disk.writes("b"), disk.writes("c", KeyError("c")), disk.writes("d"))
    disk.may_go.set()
    done = await asyncio.gather(*tasks, return_exceptions=True)
    assert done[0] == "b"
    assert isinstance(done[1], KeyError)
    assert done[2] == "d"
    assert disk.committed == [["a"], ["b"], ["d"]]


async def test_when_the_database_is_away_all_are_told_after_one_attempt(
    disk: Disk, group: GroupCommit
) -> None:
    disk.fails_with = ConnectionResetError()
    first = await begin(group, disk.writes("a"))
    tasks = await begin(group, *(disk.writes(name) for name in "bcd"))
    disk.may_go.set()
    done = await asyncio.gather(*first, *tasks, return_exceptions=True)
    assert all(isinstance(one, ConnectionResetError) for one in done)
    assert disk.tried == 2


async def test_what_may_have_been_committed_is_not_tried_again_and_each_keeps_its_own_result(
    disk: Disk, group: GroupCommit
) -> None:
    disk.fails_with = UnsureError("77", None)
    first = await begin(group, disk.writes("a"))
    tasks = await begin(group, *(disk.writes(name) for name in "bcd"))
    disk.may_go.set()
    done = await asyncio.gather(*first, *tasks, return_exceptions=True)
    assert [(one.mark, one.result) for one in done if isinstance(one, UnsureError)] == [
        ("77", name) for name in "abcd"
    ]
    assert disk.tried == 2


async def test_who_stops_waiting_before_its_turn_is_left_out(disk: Disk, group: GroupCommit) -> None:
    first = await begin(group, disk.writes("a"))
    tasks = await begin(group, disk.writes("b"), disk.writes("c"))
    tasks[0].cancel()
    disk.may_go.set()
    await asyncio.gather(*first, *tasks, return_exceptions=True)
    assert disk.committed == [["a"], ["c"]]


async def test_a_lane_goes_on_after_a_failure(disk: Disk, group: GroupCommit) -> None:
    disk.may_go.set()
    disk.fails_with = sqlite3.OperationalError("disk I/O error")
    with pytest.raises(sqlite3.OperationalError):
        await group.run(disk.writes("a"))
    disk.fails_with = None
    assert await group.run(disk.writes("b")) == "b"
