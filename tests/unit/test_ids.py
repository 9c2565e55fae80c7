import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.ids import RunId, child_run_id, new_instance_id, new_run_id, new_sandbox_id

PARENT = RunId("r" + "0" * 20)
HASH = "ab" * 32


@pytest.mark.parametrize(
    ("make", "shape"),
    [(new_run_id, r"r\w{20}"), (new_sandbox_id, r"s\w{12}"), (new_instance_id, r"i\w{10}")],
)
def test_an_id_is_safe_in_a_path_a_label_and_a_container_name(make: object, shape: str) -> None:
    assert callable(make)
    ids = {make() for _ in range(1_000)}
    assert len(ids) == 1_000
    assert all(re.fullmatch(shape, one) and re.fullmatch(r"[0-9a-z]+", one) for one in ids)


def test_the_id_of_a_child_run_has_the_shape_of_any_run_id() -> None:
    assert re.fullmatch(r"r[0-9a-z]{20}", child_run_id(PARENT, 1, HASH, 0))


def test_a_replay_finds_the_child_it_paid_for() -> None:
    """Written down: a change of this value makes recorded runs lose their children."""
    assert child_run_id(PARENT, 1, HASH, 0) == "rrr5te0mktg245hb41hpz"


keys = st.tuples(
    st.sampled_from([PARENT, RunId("r" + "1" * 20)]),
    st.integers(0, 200),
    st.text(alphabet="0123456789abcdef", min_size=64, max_size=64),
    st.integers(0, 200),
)


@given(keys, keys)
def test_two_child_runs_share_an_id_only_if_everything_about_them_is_the_same(
    first: tuple[RunId, int, str, int], second: tuple[RunId, int, str, int]
) -> None:
    assert (child_run_id(*first) == child_run_id(*second)) is (first == second)
