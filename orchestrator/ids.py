"""Identifiers. All are made here, by us; none is ever taken from a guest or used unchecked in a path."""

import hashlib
import secrets
from typing import NewType

TenantId = NewType("TenantId", str)
RunId = NewType("RunId", str)
SandboxId = NewType("SandboxId", str)
InstanceId = NewType("InstanceId", str)

LOCAL_TENANT = TenantId("local")
"""Who pays when the command line runs without a server."""

# Crockford's base 32 without look-alikes, lower case: safe as a path component, a label and a container name.
_ALPHABET = "0123456789abcdefghjkmnpqrstvwxyz"


def _random(length: int) -> str:
    return "".join(secrets.choice(_ALPHABET) for _ in range(length))


def new_run_id() -> RunId:
    """A run id of 100 random bits."""
    return RunId("r" + _random(20))


def child_run_id(parent: RunId, turn: int, request_hash: str, occurrence: int) -> RunId:
    """The id of a child run.

    It derives from the parent and from what was asked, so that a replay of the parent finds the child it
    already paid for (design, "Everything that happens is an event").

    Args:
        parent: The run whose cell asked.
        turn: The parent's turn, from 1.
        request_hash: Hex digest of question and context.
        occurrence: 0 for the first identical request of that turn, 1 for the second, and so on.
    """
    digest = hashlib.sha256(f"{parent}\0{turn}\0{request_hash}\0{occurrence}".encode()).digest()
    number = int.from_bytes(digest[:13], "big")
    return RunId("r" + "".join(_ALPHABET[(number >> (5 * i)) & 31] for i in range(20)))


def new_context_id() -> str:
    """The id of a context that a client of the service uploads, of 100 random bits."""
    return "c" + _random(20)


def new_tenant_id() -> TenantId:
    """A tenant id of 60 random bits. It is no secret, and there are few."""
    return TenantId("t" + _random(12))


def new_key_id() -> str:
    """What an API key is called, of 60 random bits. It tells nothing of the key."""
    return "k" + _random(12)


def new_sandbox_id() -> SandboxId:
    """A sandbox id of 60 random bits: short, because it is part of a socket's path (at most 107 bytes)."""
    return SandboxId("s" + _random(12))


def new_instance_id() -> InstanceId:
    """The id of one orchestrator process."""
    return InstanceId("i" + _random(10))
