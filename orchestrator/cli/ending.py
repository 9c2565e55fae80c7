"""How a run that was shown comes to its end: what is printed where, and the exit code."""

import traceback
from dataclasses import dataclass

from orchestrator.cli import exits, report
from orchestrator.cli.exits import Exit
from orchestrator.cli.json_line import json_line
from orchestrator.cli.tree import RunTree
from orchestrator.errors import CallerError, InvariantError, MachineError, OrchestratorError
from orchestrator.run_report import RunReport


@dataclass(frozen=True, slots=True)
class End:
    """How it ended, and the exit code that goes with it."""

    report: RunReport
    code: Exit
    failure: BaseException | None = None


def show(end: End, tree: RunTree, *, as_json: bool, live: bool) -> Exit:
    """Print it: the answer or the object to stdout, the rest to stderr."""
    began = tree.root is not None
    if isinstance(end.failure, CallerError | MachineError):
        exits.complain(end.failure)
        if not began:
            return end.code
    elif end.failure is not None:
        tell_bug(end.failure)
    for line in report.summary(end.report, scripted=is_scripted(tree), notes=live):
        exits.tell(line)
    if as_json:
        read = exits.put(json_line(report.as_json(end.report)))
    elif end.report.answer is not None:
        read = exits.put(end.report.answer)
    else:
        read = True
    if not read:
        exits.tell("rlm: the answer could not be written to stdout")
        return Exit.NO_ANSWER
    return end.code


def tell_bug(failure: BaseException) -> None:
    """What nobody foresaw, for a report; nothing of what was foreseen."""
    if isinstance(failure, InvariantError) or not isinstance(failure, OrchestratorError):
        exits.tell_block("".join(traceback.format_exception(failure)))
        exits.tell("rlm: this is a bug: please report the lines above, after removing what is confidential")


def is_scripted(tree: RunTree) -> bool:
    """Whether a script plays one of its models."""
    return tree.root is not None and tree.root.scripted
