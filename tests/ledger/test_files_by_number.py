"""Files of a run's own context that its cell names by number, as a guest may send them."""

import grpc
import pytest
from rlm_proto.v1 import broker_pb2 as pb

from orchestrator.limits import MAX_PATHS_IN_REQUEST
from tests.ledger.guests import code_of, sandbox
from tests.ledger.witness import Provider


@pytest.mark.parametrize("runs", [[], [0], [0, 1, 2], range(2 * MAX_PATHS_IN_REQUEST + 2)])
async def test_what_is_no_list_of_runs_is_refused(runs: list[int]) -> None:
    async with sandbox(Provider()) as played:
        guest = await played.dial()
        with played.cell():
            asked = guest.child("c1", files=pb.ContextFiles(runs=runs))
            assert await code_of(asked) is grpc.StatusCode.INVALID_ARGUMENT
