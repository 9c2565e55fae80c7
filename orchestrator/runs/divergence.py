"""How a cell that was run again differed from its first time, and what its model is told of that."""

from collections.abc import Iterable
from enum import StrEnum

from orchestrator import prompts
from orchestrator.trajectory import ReplayDiverged


class Namespace(StrEnum):
    """What became of a run's variables when its cells were run again."""

    KEPT = "kept"
    UNCERTAIN = "uncertain"
    LOST = "lost"


def diverged(turn: int, why: str, namespace: Namespace) -> ReplayDiverged:
    """The cell of that turn did not come to the same."""
    return ReplayDiverged(turn=turn, why=why, namespace=namespace.value)


def cannot_run_again(interrupted_turn: int) -> ReplayDiverged:
    """The cell of that turn was interrupted: how far it came nobody knows."""
    why = "it was interrupted, so it cannot be run again"
    return ReplayDiverged(turn=interrupted_turn, why=why, namespace=Namespace.LOST.value)


def note_of(diverged: Iterable[ReplayDiverged]) -> str:
    """What the model is told about its namespace before it goes on; empty when it is as it was."""
    worst = {Namespace(one.namespace): one for one in diverged}
    if (lost := worst.get(Namespace.LOST)) is not None:
        is_interrupted = lost == cannot_run_again(lost.turn)
        return prompts.NAMESPACE_LOST_AT_RESTART if is_interrupted else prompts.NAMESPACE_LOST_IN_REPLAY
    return prompts.NAMESPACE_UNCERTAIN if Namespace.UNCERTAIN in worst else ""
