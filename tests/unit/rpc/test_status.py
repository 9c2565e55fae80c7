import importlib
import pkgutil
from collections.abc import Iterator

import grpc
import pytest
from rlm_proto.v1 import types_pb2

import orchestrator
from orchestrator import errors
from orchestrator.errors import Billing, BudgetExceededError, ModelError, OrchestratorError
from orchestrator.rpc import status

AMOUNTS = {"tokens": 5_000, "cost_microusd": 7, "calls": 1, "child_runs": 0}
LEFT = {"tokens": 4_000, "cost_microusd": 9, "calls": 9, "child_runs": 9}


def everything_raised() -> Iterator[type[OrchestratorError]]:
    """Every error of the whole package, wherever it is defined."""
    for module in pkgutil.walk_packages(orchestrator.__path__, "orchestrator."):
        # A guest's probes run when they are loaded, and belong into a sandbox.
        if not module.name.endswith("__main__") and ".probes.guest" not in module.name:
            importlib.import_module(module.name)
    known: list[type[OrchestratorError]] = [OrchestratorError]
    for error in known:
        known += error.__subclasses__()
    yield from known[1:]


def make(error: type[OrchestratorError], message: str) -> OrchestratorError:
    if error is BudgetExceededError:
        return BudgetExceededError(message, AMOUNTS, LEFT)
    if error is ModelError:
        return ModelError(message, billing=Billing.NOTHING, retryable=False)
    if error is errors.ChildRunFailedError:
        return errors.ChildRunFailedError("deadline", message)
    return error(message)


def test_every_error_has_its_own_row() -> None:
    assert set(status.BY_ERROR) == set(everything_raised())


def test_the_base_of_all_is_never_raised_itself() -> None:
    assert OrchestratorError not in status.BY_ERROR


@pytest.mark.parametrize("error", status.BY_ERROR, ids=lambda error: error.__name__)
def test_every_error_becomes_a_failure_with_a_reason_and_a_short_sentence(
    error: type[OrchestratorError],
) -> None:
    code, detail = status.to_wire(make(error, "ä" * 1_000))
    assert code is not grpc.StatusCode.OK
    assert detail.reason != types_pb2.ERROR_REASON_UNSPECIFIED
    assert 0 < len(detail.message.encode()) <= 500


def test_a_cut_message_has_no_half_character() -> None:
    _, detail = status.to_wire(errors.InvalidRequestError("x" + "ä" * 1_000))
    assert detail.message == "x" + "ä" * 249


def test_a_lone_surrogate_in_a_message_can_be_sent() -> None:
    _, detail = status.to_wire(errors.InvalidRequestError("\ud800"))
    assert detail.message == "?"


@pytest.mark.parametrize(
    "error", [error for error, (code, _) in status.BY_ERROR.items() if code is grpc.StatusCode.INTERNAL]
)
def test_an_internal_error_keeps_its_sentence_to_itself(error: type[OrchestratorError]) -> None:
    _, detail = status.to_wire(error("/var/lib/secret"))
    assert detail.message == "the orchestrator failed"
    assert detail.reason == types_pb2.ERROR_REASON_INTERNAL


@pytest.mark.parametrize(
    "error",
    [error for error in status.BY_ERROR if issubclass(error, errors.MachineError | errors.InvariantError)],
)
def test_what_only_a_person_at_the_machine_can_mend_is_internal(error: type[OrchestratorError]) -> None:
    assert status.BY_ERROR[error][0] is grpc.StatusCode.INTERNAL


def test_a_budget_refusal_carries_its_arithmetic() -> None:
    code, detail = status.to_wire(BudgetExceededError("run tree", AMOUNTS, LEFT))
    assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert detail.shortfall.account == "run tree"
    assert detail.shortfall.wanted == types_pb2.Amounts(**AMOUNTS)
    assert detail.shortfall.left == types_pb2.Amounts(**LEFT)
    assert detail.message == "the budget of the run tree is too low: 5,000 tokens wanted, 4,000 left"


def test_a_unit_the_wire_does_not_know_is_named_in_the_sentence_alone() -> None:
    _, detail = status.to_wire(BudgetExceededError("run", {"bytes of uploads": 9}, {"bytes of uploads": 5}))
    assert detail.shortfall.wanted == types_pb2.Amounts()
    assert "9 bytes of uploads wanted, 5 left" in detail.message


def test_no_error_but_a_budget_refusal_has_a_shortfall_or_its_code() -> None:
    """A guest takes RESOURCE_EXHAUSTED with a detail for a refusal, and without one for back-pressure."""
    for error, (code, _) in status.BY_ERROR.items():
        is_refusal = error is BudgetExceededError
        assert (code is grpc.StatusCode.RESOURCE_EXHAUSTED) is is_refusal
        assert status.to_wire(make(error, "x"))[1].HasField("shortfall") is is_refusal
