"""Which runtime a root run gets: one rule.

A tenant whose documents come from strangers can be held to gVisor. For such a tenant `runc` is refused when
it is asked for, and gVisor is taken when nothing is. For everybody else `runc` is taken when nothing is asked
for. Child runs have their root's runtime.
"""

from collections.abc import Set

from orchestrator.errors import InvalidRequestError
from orchestrator.ids import TenantId

RUNC = "runc"
GVISOR = "runsc"
RUNTIMES = (RUNC, GVISOR)
EVERYBODY = "*"


def runtime_for(tenant_id: TenantId, asked: str | None, *, held_to_gvisor: Set[str]) -> str:
    """The runtime of a root run.

    Args:
        tenant_id: Who pays for it.
        asked: What the caller asked for; None for no wish.
        held_to_gvisor: Ids of tenants, or `*` for all of them (RLM_RUNSC_TENANTS).

    Raises:
        InvalidRequestError: There is no such runtime, or this tenant may not have it.
    """
    if asked is not None and asked not in RUNTIMES:
        raise InvalidRequestError(f"the runtime must be {' or '.join(RUNTIMES)}, not {asked!r}")
    if held_to_gvisor.isdisjoint({tenant_id, EVERYBODY}):
        return asked or RUNC
    if asked not in {None, GVISOR}:
        raise InvalidRequestError(
            f"RLM_RUNSC_TENANTS holds the tenant {tenant_id!r} to gVisor:"
            f" ask for the runtime {GVISOR}, or for none"
        )
    return GVISOR
