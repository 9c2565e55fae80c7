"""A cell that is run again: its sub-calls are answered from its record (`replay.py` has the rules).

The answers come back in the order in which they came first, so that a cell that takes them as they come does
the same again. A sub-call that the cell never heard of again the first time, because it hung up or ended
before, is left waiting: to answer it, or to fail it, would be something new.
"""

import asyncio
from collections.abc import Awaitable, Callable
from typing import NamedTuple

from orchestrator.errors import RunCancelledError
from orchestrator.runs.past import PastCall, PastCell
from orchestrator.runs.recorded_errors import error_again
from orchestrator.trajectory import Text

ORDER_WAIT_S = 2.0
"""For an answer that came earlier the first time. A cell that does not ask for it any more has diverged."""
BETWEEN_ANSWERS_S = 0.002
"""Each is a call of its own to gRPC, and two that end at once may arrive in any order."""
UNHEARD_WAIT_S = 30.0
"""A cell that still waits for what it did not wait for the first time has diverged, too."""


WholeText = Callable[[Text], Awaitable[str]]
"""Gets the whole of a recorded text. Raises ReplayError when it is not there any more."""


class RecordedAnswer(NamedTuple):
    """What a sub-call was answered."""

    text: str
    truncated: bool


class ReplayedCell:
    """One cell's further run."""

    def __init__(self, cell: PastCell, whole: WholeText) -> None:
        """Begin it."""
        self.names = cell.names
        """So many names of sub-calls are taken."""
        self.may_ask = cell.result is None
        """Whether it may make sub-calls that are not in its record, because it never ended."""
        self._cell = cell
        self._whole = whole
        self._heard: set[PastCall] = set()
        self._others = 0
        self._keeps_order = True
        self._next_rank = 0
        self._passed: set[int] = set()
        self._waiting: dict[int, asyncio.Future[None]] = {}

    @property
    def made_other_calls(self) -> bool:
        """Whether it made sub-calls that it did not make the first time, or did not make some that it did."""
        wanted = {call for call in self._cell.calls.values() if call.rank is not None}
        return bool(self._others or wanted - self._heard)

    def recorded(self, request_hash: str, occurrence: int) -> PastCall | None:
        """The sub-call in its record; None when it has to be asked for."""
        call = self._cell.calls.get((request_hash, occurrence))
        if call is None or (call.ended is None and self.may_ask):
            return None
        self._heard.add(call)
        return call

    def refusal(self) -> RunCancelledError:
        """For a sub-call that is not in the record of a cell that ended."""
        self._others += 1
        return RunCancelledError("this cell is run again for its variables, and did not ask this before")

    async def answer(self, call: PastCall) -> RecordedAnswer:
        """What the sub-call was answered, when its turn has come.

        Raises:
            OrchestratorError: The error that it ended with; RunCancelledError when the cell did not wait for
                its end, and now does.
            ReplayError: The answer is not there any more.
        """
        if call.rank is None or call.ended is None:
            await asyncio.sleep(UNHEARD_WAIT_S)
            raise self.refusal()
        try:
            text = await self._whole(call.ended.answer)
            await self._wait_for(call.rank)
        finally:
            self._pass(call.rank)
        if call.ended.error:
            raise error_again(call.ended)
        return RecordedAnswer(text, call.ended.truncated)

    async def _wait_for(self, rank: int) -> None:
        if not self._keeps_order or rank <= self._next_rank:
            return
        turn = self._waiting[rank] = asyncio.get_running_loop().create_future()
        try:
            async with asyncio.timeout(ORDER_WAIT_S):
                await turn
        except TimeoutError:
            self._keeps_order = False
            for waiting in self._waiting.values():
                if not waiting.done():
                    waiting.set_result(None)
        finally:
            del self._waiting[rank]

    def _pass(self, rank: int) -> None:
        self._passed.add(rank)
        while self._next_rank in self._passed:
            self._next_rank += 1
        if self._next_rank in self._waiting:
            asyncio.get_running_loop().call_later(BETWEEN_ANSWERS_S, self._wake, self._next_rank)

    def _wake(self, rank: int) -> None:
        waiting = self._waiting.get(rank)
        if waiting is not None and not waiting.done():
            waiting.set_result(None)
