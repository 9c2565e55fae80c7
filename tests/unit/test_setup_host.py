"""deploy/setup-host registers gVisor with the flags that the installed release knows."""

import subprocess
from pathlib import Path

import pytest

_SCRIPT = Path(__file__).parents[2] / "deploy" / "setup-host"
_SOCKETS = "  -host-uds value\n    \tcontrols permission: none, open, create\n"
OLDEST = "  -platform string\n    \tptrace (default), kvm\n  -fsgofer-host-uds\n    \tallow sockets\n"
DEBIAN_12 = (
    f"  -platform string\n    \tptrace (default), kvm\n  -fsgofer-host-uds\n    \tDEPRECATED\n{_SOCKETS}"
)
CURRENT = f"  -platform string\n    \tsystrap (default), ptrace, kvm\n{_SOCKETS}"


@pytest.mark.case("A14")
@pytest.mark.parametrize(
    ("flags", "arguments"),
    [
        (OLDEST, ["--platform=ptrace", "--network=none", "--fsgofer-host-uds"]),
        (DEBIAN_12, ["--platform=ptrace", "--network=none", "--host-uds=open"]),
        (CURRENT, ["--platform=systrap", "--network=none", "--host-uds=open"]),
    ],
)
def test_gvisor_is_registered_with_the_flags_of_its_release(
    tmp_path: Path, flags: str, arguments: list[str]
) -> None:
    (tmp_path / "flags").write_text(flags)
    program = tmp_path / "runsc"
    program.write_text(f'#!/bin/sh\n[ "$1" = flags ] && cat {tmp_path}/flags >&2\nexit 128\n')
    program.chmod(0o755)
    function = f"eval \"$(sed -n '/^runsc_arguments()/,/^}}/p' {_SCRIPT})\"; set -e; runsc_arguments"
    done = subprocess.run(
        ["/bin/bash", "-c", function],
        capture_output=True,
        text=True,
        check=True,
        env={"PATH": f"{tmp_path}:/usr/bin:/bin"},
    )
    assert done.stdout.split() == arguments
