import resource
from collections.abc import Iterator

import pytest

from orchestrator.config import PoolSettings, SandboxSettings
from orchestrator.machine import allow_open_files, plans, resources
from orchestrator.sandbox.pool_rules import Plan, WhenEmpty


@pytest.fixture
def few_open_files() -> Iterator[None]:
    """The soft limit that most distributions begin with."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (1_024, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_a_gvisor_sandbox_has_room_for_gvisors_own_threads_beside_the_guests() -> None:
    """64 busy threads of a guest are 560 threads on the host; the guest's own limit alone would end it."""
    settings = SandboxSettings()
    assert resources(settings, "runc").pids == settings.pids
    assert resources(settings, "runsc").pids > 1_000


def test_only_the_runtime_that_is_used_has_its_sandboxes_made_ahead() -> None:
    settings = PoolSettings(runc=2, when_empty=WhenEmpty.QUEUE)
    assert plans(settings, "runc") == {"runc": Plan(size=2, when_empty=WhenEmpty.QUEUE)}
    assert plans(settings, "runsc") == {}


@pytest.mark.usefixtures("few_open_files")
def test_many_sandboxes_raise_the_limit_of_open_files_as_far_as_it_may_be() -> None:
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    allow_open_files(250)
    assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] >= min(hard, 250 * 10)
    allow_open_files(1)
    assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] >= min(hard, 250 * 10), "never lowered"
    allow_open_files(10**9)
    assert resource.getrlimit(resource.RLIMIT_NOFILE) == (hard, hard)
