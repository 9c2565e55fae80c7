"""Transactions that would wait for each other anyway, committed together: the disk is waited for once.

Rules:

1. What waits while a transaction is under way goes with the next one, in the order in which it came.
2. When a transaction of several fails, nothing of it was stored, and each is tried alone: one's failure is
   nobody else's. Only when the database is away are all told so at once.
3. Who stops waiting before its turn has come is left out. Nothing of it was stored.
"""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from orchestrator.store.backend import DATABASE_ERRORS, Transaction, UnsureError, Work
from orchestrator.store.failures import Retry, failure_of

T = TypeVar("T")

# Longer ones would keep the first of them waiting for nothing.
MAX_TOGETHER = 64


@dataclass(slots=True, eq=False)
class _Job:
    work: Work[Any]
    result: asyncio.Future[Any]

    def succeed(self, result: object) -> None:
        if not self.result.done():
            self.result.set_result(result)

    def fail(self, error: BaseException) -> None:
        if not self.result.done():
            self.result.set_exception(error)


class GroupCommit:
    """One lane of transactions.

    Args:
        transact: Runs one work in one transaction of its own.
    """

    def __init__(self, transact: Callable[[Work[Any]], Awaitable[Any]]) -> None:
        self._transact = transact
        self._jobs: list[_Job] = []
        self._running: asyncio.Task[None] | None = None

    @property
    def is_idle(self) -> bool:
        """Nothing waits and nothing is under way."""
        return self._running is None

    async def run(self, work: Work[T]) -> T:
        """Run it in a transaction, perhaps with others'. Raises what it, or the database, raised."""
        job = _Job(work, asyncio.get_running_loop().create_future())
        self._jobs.append(job)
        if self._running is None:
            self._running = asyncio.create_task(self._run())
        result: T = await job.result
        return result

    async def close(self) -> None:
        """Wait for what is under way."""
        if self._running is not None:
            await asyncio.wait({self._running})

    async def _run(self) -> None:
        try:
            while self._jobs:
                group, self._jobs = self._jobs[:MAX_TOGETHER], self._jobs[MAX_TOGETHER:]
                group = [job for job in group if not job.result.done()]
                if len(group) > 1 and await self._together(group):
                    continue
                for job in group:
                    await self._alone(job)
        finally:
            self._running = None
            for job in self._jobs:
                job.result.cancel()

    async def _together(self, group: list[_Job]) -> bool:
        """Whether that settled them all."""

        async def all_of_them(connection: Transaction) -> list[Any]:
            return [await job.work(connection) for job in group]

        try:
            results = await self._transact(all_of_them)
        except UnsureError as unsure:
            for job, result in zip(group, unsure.result, strict=True):
                job.fail(UnsureError(unsure.mark, result))
        except Exception as error:
            if not isinstance(error, DATABASE_ERRORS) or failure_of(error).retry is not Retry.WHEN_BACK:
                return False
            for job in group:
                job.fail(error)
        else:
            for job, result in zip(group, results, strict=True):
                job.succeed(result)
        return True

    async def _alone(self, job: _Job) -> None:
        if job.result.done():
            return
        try:
            job.succeed(await self._transact(job.work))
        except Exception as error:
            job.fail(error)
        except BaseException as error:
            job.fail(error)
            raise
