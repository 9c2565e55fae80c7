"""Every error this package raises, by the boundary it crossed.

  OrchestratorError
  |-- CallerError                  the caller's fault; retrying unchanged cannot help
  |   |-- InvalidRequestError        a value that makes no sense
  |   |-- ContextInputError          a context that cannot be read or staged
  |   |-- ModelNotAllowedError       a model this run may not use, or without a price
  |   |-- BudgetExceededError        an account on the path has too little left
  |   |-- DepthExceededError         a child run below the depth limit
  |   |-- NotExecutingError          a sub-call made while no cell runs
  |   |-- CallIdReusedError          one call id, two requests
  |   |-- UnauthenticatedError       a client of the service whose key is none
  |   |-- NotAllowedError            a key's role, or a tenant's rules, forbid it
  |   |-- NotFoundError              no such run or context of this tenant
  |   |-- ConflictError              what is there is in no state for that
  |   `-- HashMismatchError          what was uploaded is not what was said to come
  |-- RunOverError                 the run cannot go on, through nobody's fault
  |   |-- RunCancelledError
  |   `-- DeadlineExceededError
  |-- ChildRunFailedError          a child run ended without an answer
  |-- ModelError                   the model provider failed
  |-- ReplayError                  the record of a run does not say how it goes on
  |-- SandboxError                 the container or what runs in it failed
  |   |-- SandboxStartError
  |   |-- SandboxBusyError           none is made ahead, and none is to be started
  |   |-- SandboxLostError
  |   `-- GuestProtocolError         the guest broke the protocol; its sandbox is ended
  |-- MachineError                 the machine lacks something; a person has to act
  |   |-- EngineError                no container engine, or it does not do what it must
  |   |-- ImageMissingError          no sandbox image of the present sources
  |   |-- KeyMissingError            no provider key
  |   |-- ProviderUnreachableError   nothing answers at the provider's address
  |   |-- StoreError                 the database does not answer, or does not take what it is given
  |   |   `-- TakenOverError           this server was away too long: another has settled its runs
  |   |-- UnavailableError           the server drains, or waits for something; trying again later helps
  |   `-- ServerError                what answers a client is broken, or no server of ours
  `-- InvariantError               our own bug

An exception raised by model code in a cell is not here: it is an ordinary result (`cells.CellResult`).
"""

from collections.abc import Mapping
from enum import Enum


class OrchestratorError(Exception):
    """Base of all. `str(error)` is one sentence for a person; it never holds a key, a prompt or an output."""


class CallerError(OrchestratorError):
    """The caller's fault; retrying unchanged cannot help."""


class InvalidRequestError(CallerError):
    """A value that makes no sense."""


class ContextInputError(CallerError):
    """A context that cannot be read or staged."""


class ModelNotAllowedError(CallerError):
    """A model this run may not use, or one without a known price."""


class BudgetExceededError(CallerError):
    """An account on the path from the run up to the tenant has too little left, even if every hold came back.

    The outermost such account is named, so that a child never retries against a budget that only its parent
    could raise.

    Attributes:
        account: `run`, `run tree` or `tenant`.
        wanted: What the call would have had to hold, by unit.
        left: What the account would have left with no hold open, by unit.
    """

    def __init__(self, account: str, wanted: Mapping[str, int], left: Mapping[str, int]) -> None:
        short = [unit for unit, amount in wanted.items() if amount > left[unit]]
        details = ", ".join(f"{wanted[unit]:,} {unit} wanted, {left[unit]:,} left" for unit in short)
        super().__init__(f"the budget of the {account} is too low: {details}")
        self.account = account
        self.wanted = wanted
        self.left = left


class DepthExceededError(CallerError):
    """A child run would be deeper than the run tree's limit."""


class NotExecutingError(CallerError):
    """A sub-call arrived while no cell was running."""


class CallIdReusedError(CallerError):
    """One call id came with two different requests."""


class UnauthenticatedError(CallerError):
    """A client of the service has no key, or one that is unknown or revoked."""


class NotAllowedError(CallerError):
    """The key's role or the tenant's rules forbid it."""


class NotFoundError(CallerError):
    """This tenant has no such run, context or text. Whether another has is not said."""


class ConflictError(CallerError):
    """What is there is in no state for what was asked."""


class HashMismatchError(CallerError):
    """All bytes of an upload are there, and have another hash than was said."""


class RunOverError(OrchestratorError):
    """The run cannot go on, through nobody's fault."""


class RunCancelledError(RunOverError):
    """The run, or the cell that made the call, was cancelled or has ended."""


class DeadlineExceededError(RunOverError):
    """The run's deadline passed."""


class ChildRunFailedError(OrchestratorError):
    """A child run ended without an answer.

    Attributes:
        outcome: How it ended, one of the design's outcomes.
    """

    def __init__(self, outcome: str, message: str) -> None:
        super().__init__(message)
        self.outcome = outcome


class Billing(Enum):
    """What a failed attempt at a provider may have cost."""

    NOTHING = "nothing"
    """Refused before it could be billed: no connection, 429, 529, another 4xx."""
    UNKNOWN = "unknown"
    """Dropped, timed out, cancelled, a 500, no usage: charge the whole hold as unconfirmed."""


class ModelError(OrchestratorError):
    """One attempt at a model provider failed.

    Attributes:
        billing: What the attempt may have cost.
        retryable: Whether the same request may succeed later.
        retry_after_s: What the provider asked for, in seconds.
        status: The HTTP status, when there was one.
    """

    def __init__(
        self,
        message: str,
        *,
        billing: Billing,
        retryable: bool,
        retry_after_s: float | None = None,
        status: int | None = None,
    ) -> None:
        super().__init__(message)
        self.billing = billing
        self.retryable = retryable
        self.retry_after_s = retry_after_s
        self.status = status


class ReplayError(OrchestratorError):
    """A run's record is broken, so that it cannot be resumed."""


class SandboxError(OrchestratorError):
    """The container or what runs in it failed."""


class SandboxStartError(SandboxError):
    """The container did not start, or its worker did not dial in before its deadline."""


class SandboxBusyError(SandboxError):
    """No sandbox is ready, and the settings say to start none for it now. Later there may be one."""


class SandboxLostError(SandboxError):
    """The container, its worker or its stream went away while it was leased."""


class GuestProtocolError(SandboxError):
    """The guest sent something the protocol does not allow."""


class MachineError(OrchestratorError):
    """The machine lacks something; a person has to act. The sentence says how."""


class EngineError(MachineError):
    """No container engine answers, or it does not do what it must."""


class ImageMissingError(MachineError):
    """There is no sandbox image of the present sources."""


class KeyMissingError(MachineError):
    """There is no key for the model provider."""


class ProviderUnreachableError(MachineError):
    """Nothing answers at the model provider's address."""


class StoreError(MachineError):
    """The database does not answer, or does not take what it is given. Nothing was written."""


class TakenOverError(StoreError):
    """This server was not heard of for too long, and the database takes nothing more of what it was doing:
    another server has settled its runs. Nothing was written; what was under way is left as it stands.
    """


class UnavailableError(MachineError):
    """The server drains, or waits for something of its own. Trying again later helps."""


class ServerError(MachineError):
    """What answers a client of the service is broken, or no server of ours."""


class InvariantError(OrchestratorError):
    """Our own bug."""
