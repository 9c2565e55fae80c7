from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import TypeAlias

import pytest

from orchestrator.limits import RunLimits
from orchestrator.models.port import ModelClient
from orchestrator.runs.admission import SandboxSlots
from orchestrator.runs.call_slots import CallSlots
from tests.fakes.leases import FakeLeases
from tests.fakes.tree import FakeTree

MakeTree: TypeAlias = Callable[..., FakeTree]


@pytest.fixture
async def make_tree(tmp_path: Path) -> AsyncIterator[MakeTree]:
    """Makes the trees of a test; afterwards their books must be closed and their contexts given back."""
    made: list[FakeTree] = []
    async with SandboxSlots(8).admit(2) as slots:

        def make(
            client: ModelClient,
            *,
            leases: FakeLeases | None = None,
            limits: RunLimits = RunLimits(),  # noqa: B008 - frozen
            memoise: bool = False,
            call_slots: CallSlots | None = None,
        ) -> FakeTree:
            directory = tmp_path / str(len(made))
            directory.mkdir()
            made.append(
                FakeTree(
                    directory,
                    slots,
                    client,
                    leases=leases,
                    limits=limits,
                    memoise=memoise,
                    call_slots=call_slots,
                )
            )
            return made[-1]

        yield make
        for tree in made:
            tree.assert_books_are_closed()
            assert tree.leases.live == 0
