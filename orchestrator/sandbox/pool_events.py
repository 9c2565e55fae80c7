"""What happens to the sandboxes of a pool, and what is to be done about it; `pool_rules.py` has the rules.

A sandbox has a number from its start on, and a ticket is somebody's asking for one.
"""

from dataclasses import dataclass
from enum import Enum
from typing import TypeAlias

from orchestrator.ids import LOCAL_TENANT, TenantId


class Phase(Enum):
    """Where a sandbox stands."""

    STARTING = "starting"
    WAITING = "waiting"
    LENT = "lent"
    ENDING = "ending"


# --- What happens ----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Wanted:
    """Somebody asks for a sandbox."""

    ticket: int
    runtime: str
    own: bool = False
    """No pooled one will do."""
    tenant_id: TenantId = LOCAL_TENANT
    """Whose turn it takes."""


@dataclass(frozen=True, slots=True)
class GivenUp:
    """He asks no longer."""

    ticket: int


@dataclass(frozen=True, slots=True)
class Started:
    """A starting one is ready."""

    number: int


@dataclass(frozen=True, slots=True)
class Died:
    """A sandbox ended by itself; it is not gone yet."""

    number: int


@dataclass(frozen=True, slots=True)
class Gone:
    """Nothing is left of it. For one that was starting: its start failed."""

    number: int


@dataclass(frozen=True, slots=True)
class Withheld:
    """So many leaked: they take room, and nothing can be done with them."""

    count: int


@dataclass(frozen=True, slots=True)
class TimePassed:
    """Nothing happened but that."""


@dataclass(frozen=True, slots=True)
class Closed:
    """Everything is to end, lent ones too."""


Event: TypeAlias = Wanted | GivenUp | Started | Died | Gone | Withheld | TimePassed | Closed


# --- What is to be done ----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Start:
    """Make one; then Started, or Gone."""

    number: int
    runtime: str


@dataclass(frozen=True, slots=True)
class HandOut:
    """It is his. When he has ended it: Gone."""

    ticket: int
    number: int


@dataclass(frozen=True, slots=True)
class MakeOwn:
    """He makes one himself, under this number. When he has ended it, or could not make it: Gone."""

    ticket: int
    number: int


@dataclass(frozen=True, slots=True)
class Fail:
    """Tell him that this one did not start."""

    ticket: int
    number: int


@dataclass(frozen=True, slots=True)
class Refuse:
    """There is none for him."""

    ticket: int


@dataclass(frozen=True, slots=True)
class End:
    """End one that is starting or waiting; then Gone."""

    number: int


Action: TypeAlias = Start | HandOut | MakeOwn | Fail | Refuse | End
