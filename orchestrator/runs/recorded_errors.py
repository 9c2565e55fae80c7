"""Errors of sub-calls, made again from what the record keeps of them."""

import re

from orchestrator import errors
from orchestrator.errors import (
    Billing,
    BudgetExceededError,
    ChildRunFailedError,
    InvariantError,
    ModelError,
    OrchestratorError,
)
from orchestrator.trajectory import SubCallEnded

_SHORT = re.compile(r"the budget of the (?P<account>.*) is too low: (?P<units>.*)", re.DOTALL)
_UNIT = re.compile(r"(-?[\d,]+) (\w+) wanted, (-?[\d,]+) left")
_OUTCOME = re.compile(r"\((\w+)\)")


def error_again(ended: SubCallEnded) -> OrchestratorError:
    """The error that a sub-call was recorded to have ended with: of the same type, with the same words."""
    kind = getattr(errors, ended.error_kind, None)
    if kind is BudgetExceededError and (short := _SHORT.fullmatch(ended.error)) is not None:
        units = _UNIT.findall(short["units"])
        wanted = {name: _number(amount) for amount, name, _ in units}
        return BudgetExceededError(short["account"], wanted, {name: _number(left) for _, name, left in units})
    if kind is ModelError:
        return ModelError(ended.error, billing=Billing.UNKNOWN, retryable=False)
    if kind is ChildRunFailedError:
        outcome = _OUTCOME.search(ended.error)
        return ChildRunFailedError(outcome[1] if outcome else "", ended.error)
    if isinstance(kind, type) and issubclass(kind, OrchestratorError) and kind is not BudgetExceededError:
        return kind(ended.error)
    return InvariantError(ended.error)


def _number(text: str) -> int:
    return int(text.replace(",", ""))
