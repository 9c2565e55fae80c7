"""What the record of a run says of how it goes on, after the orchestrator that drove it was killed.

Rules. What is read off the record is in `past.py`:

1. What the machine was fed is read off the events, in order, and fed to it again. So the conversation
   becomes what it was; nothing is asked and nothing paid for it.
2. A turn that was asked for and has no reply is asked for again. One that was asked for twice, with no
   restart in between, could not be paid the first time.
3. The namespace is restored by running cells again: those after its last loss, each with the answers that its
   sub-calls were recorded to have got. They are found by (turn, request hash, occurrence), and come back in
   the order in which they came first. What is fed to the machine stays the recorded result.
4. A cell that was interrupted is not run again, because nobody knows how far it came: with it the namespace
   is lost. One that ended its namespace needs no second run; nor does any before it.
5. A cell that ended is run again without asking for anything: a sub-call that is not in its record is
   refused, and one that it never heard of again is not answered. A cell that was running begins anew, and
   may ask for what it was not yet answered. When it was running at ten restarts and got no further
   it is not run again: it may be what brings them about, and its sandbox counts as lost.
6. A cell that makes other sub-calls than recorded, or ends otherwise, has diverged: the model is told. When
   it only prints something else, that is noted in the record.

Pure: no I/O, no clock.
"""

from collections.abc import Iterable, Mapping, Sequence

from orchestrator import turn
from orchestrator.cells import CellOutcome, CellResult, SandboxLoss
from orchestrator.errors import (
    InvariantError,
    ReplayError,
)
from orchestrator.runs.divergence import Namespace, diverged
from orchestrator.runs.past import PastCell, RunPast, Step
from orchestrator.trajectory import (
    ReplayDiverged,
)

STARTS_OF_A_CELL = 10
"""A cell that was running at so many restarts, with no sub-call answered in between, may be what brings them
about."""


def made_of(runs: Sequence[RunPast]) -> Sequence[RunPast]:
    """The runs whose cells a namespace is made of, of those that had it one after the other."""
    first = max((number for number, run in enumerate(runs) if run.began_anew), default=0)
    return runs[first:]


_TAKES: Mapping[type[turn.Action], tuple[type[turn.Event], ...]] = {
    turn.AskModel: (turn.ModelReplied, turn.BudgetShort, turn.Noted),
    turn.RunCell: (turn.CellEnded,),
    turn.ReplaceSandbox: (turn.SandboxReplaced,),
}


def fast_forward(
    state: turn.State, actions: tuple[turn.Action, ...], steps: Iterable[Step]
) -> tuple[turn.State, tuple[turn.Action, ...]]:
    """Feed the machine what it was fed before: its state at the end of the record, and what to do there.

    Raises:
        ReplayError: It asks for something else than it did.
    """
    for step in steps:
        wanted = actions[-1]
        if isinstance(wanted, turn.End):
            break
        if step.turn != state.turn or not isinstance(step.event, _TAKES[type(wanted)]):
            raise ReplayError(
                f"the run's events do not fit its course: at turn {state.turn} it wants "
                f"{type(wanted).__name__}, and the record has {type(step.event).__name__} of turn {step.turn}"
            )
        state, actions = turn.step(state, step.event)
    return state, actions


def compare(cell: PastCell, result: CellResult, *, other_calls: bool) -> ReplayDiverged | None:
    """What was different when a cell was run again; None when nothing was.

    Args:
        cell: As recorded; it had ended with its namespace kept, and was not interrupted.
        result: Of its second run.
        other_calls: Whether it made other sub-calls than recorded.
    """
    first = cell.result
    if first is None:
        raise InvariantError("a cell that never ended has nothing to be compared with")
    if not result.outcome.namespace_kept:
        return diverged(cell.turn, f"it ended as {result.outcome.value} this time", Namespace.LOST)
    if other_calls:
        return diverged(cell.turn, "it made other sub-calls than the first time", Namespace.UNCERTAIN)
    if result.outcome is not first.outcome:
        why = f"it ended as {result.outcome.value} this time, and as {first.outcome.value} the first time"
        return diverged(cell.turn, why, Namespace.UNCERTAIN)
    if (result.answer is None) is not (first.answer is None):
        return diverged(cell.turn, "it gave an answer at one time and not at the other", Namespace.UNCERTAIN)
    if (result.output, result.traceback) != (first.output, first.traceback):
        return diverged(cell.turn, "it printed something else than the first time", Namespace.KEPT)
    return None


def given_up(cell: PastCell) -> CellResult:
    """The result of a cell that was running at too many restarts."""
    if cell.starts < STARTS_OF_A_CELL:
        raise InvariantError("a cell that was running at one restart is run again")
    return CellResult(outcome=CellOutcome.SANDBOX_LOST, loss=SandboxLoss.ORCHESTRATOR_ENDED)
