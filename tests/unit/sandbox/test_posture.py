from pathlib import Path
from typing import Any

import pytest

from orchestrator.ids import SandboxId
from orchestrator.sandbox.port import SandboxSpec
from orchestrator.sandbox.posture import create_arguments
from tests.security.posture.golden import GOLDEN, RESOURCES, as_golden

SPEC = SandboxSpec(
    sandbox_id=SandboxId("s1"),
    socket_dir=Path("/state/sock"),
    context_dir=Path("/state/ctx"),
    uid=200_001,
    runtime="runsc",
    expires_at_s=1_700_000_600,
)
BODY: dict[str, Any] = create_arguments(SPEC, RESOURCES, image="sha256:abc", instance_id="i1")


@pytest.mark.case("A11")
def test_a_sandbox_is_created_with_exactly_this_and_nothing_else() -> None:
    assert as_golden(BODY, SPEC, image="sha256:abc", instance_id="i1") == GOLDEN


def test_nothing_in_it_names_a_tenant_or_a_run() -> None:
    text = str(BODY).lower()
    assert "tenant" not in text
    assert "run_id" not in text


@pytest.mark.case("B06")
def test_nothing_that_a_guest_can_write_is_on_the_host() -> None:
    """So no path can lead the host astray: scratch is in memory, and gone with the sandbox."""
    host_config = BODY["HostConfig"]
    assert all(mount["ReadOnly"] for mount in host_config["Mounts"])
    assert host_config["ReadonlyRootfs"]
    assert "Binds" not in host_config
    assert set(host_config["Tmpfs"]) == {"/tmp"}


@pytest.mark.case("A08")
def test_the_environment_is_written_down_and_holds_nothing_of_ours() -> None:
    assert BODY["Env"] == ["HOME=/tmp", "PATH=/usr/local/bin:/usr/bin:/bin", "LANG=C.UTF-8"]
