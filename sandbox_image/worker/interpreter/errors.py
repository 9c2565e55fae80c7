# ruff: noqa: N818 - the names are part of what a cell sees, and say what happened
"""The exceptions a cell sees, by what went wrong.

  SubCallError                 a sub-call failed; catch this to catch all of them
  |-- InvalidRequest           an argument is out of range; retrying unchanged cannot help
  |-- ModelNotAllowed          not a model of this run
  |-- BudgetExceeded           too little is left; has the amounts
  |-- DepthExceeded            this run may not start child runs
  |-- DeadlineExceeded         the run's time is up
  |-- NotExecuting             called while no cell was running
  |-- SubCallCancelled         the cell that made the call ended
  |-- ModelFailed              the provider failed after all retries; trying again may help
  `-- ChildRunFailed           the child run ended without an answer

All can be pickled, so that they cross `multiprocessing`.
"""

from collections.abc import Mapping
from typing import Any


class SubCallError(Exception):
    """A sub-call failed. The message says why."""


class InvalidRequest(SubCallError):
    """An argument of the call is missing or out of range. Retrying unchanged cannot help."""


class ModelNotAllowed(SubCallError):
    """This run may not use the model that was asked for."""


class BudgetExceeded(SubCallError):
    """Too little is left for the call. Retrying cannot help: finish with what you have.

    Attributes:
        account: Which account is short: "run", "run tree" or "tenant".
        wanted: What the call would have needed: tokens, cost_microusd, calls, child_runs.
        left: What the account has left, in the same units.
    """

    account: str = ""
    wanted: Mapping[str, int] = {}
    left: Mapping[str, int] = {}


class DepthExceeded(SubCallError):
    """This run may not start child runs. Use llm_query, or do it in this namespace."""


class DeadlineExceeded(SubCallError):
    """The run's time is up."""


class NotExecuting(SubCallError):
    """No cell is running, so no sub-call can be made. Threads that outlive their cell see this."""


class SubCallCancelled(SubCallError):
    """The cell that made the call has ended."""


class ModelFailed(SubCallError):
    """The model's provider failed after all retries. Trying again later may help."""


class ChildRunFailed(SubCallError):
    """The child run ended without an answer. The message says how."""


for _kind in (SubCallError, *SubCallError.__subclasses__()):
    # Where cells find them: a traceback then shows the name that an `except` takes, and pickle finds it too.
    _kind.__module__ = "__main__"

BY_REASON: dict[str, type[SubCallError]] = {
    "BUDGET_EXCEEDED": BudgetExceeded,
    "DEPTH_EXCEEDED": DepthExceeded,
    "NOT_EXECUTING": NotExecuting,
    "MODEL_NOT_ALLOWED": ModelNotAllowed,
    "MODEL_FAILED": ModelFailed,
    "INVALID_REQUEST": InvalidRequest,
    "DEADLINE_EXCEEDED": DeadlineExceeded,
    "CHILD_RUN_FAILED": ChildRunFailed,
    "CANCELLED": SubCallCancelled,
    "INTERNAL": SubCallError,
}


def from_reply(error: Mapping[str, Any]) -> SubCallError:
    """The exception for the `error` of a reply."""
    exception = BY_REASON.get(error["reason"], SubCallError)(error["message"])
    if isinstance(exception, BudgetExceeded):
        exception.account = error.get("account", "")
        exception.wanted = error.get("wanted", {})
        exception.left = error.get("left", {})
    return exception
