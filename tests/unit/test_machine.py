from orchestrator.config import SandboxSettings
from orchestrator.machine import resources


def test_a_gvisor_sandbox_has_room_for_gvisors_own_threads_beside_the_guests() -> None:
    """64 busy threads of a guest are 560 threads on the host; the guest's own limit alone would end it."""
    settings = SandboxSettings()
    assert resources(settings, "runc").pids == settings.pids
    assert resources(settings, "runsc").pids > 1_000
