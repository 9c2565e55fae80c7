from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.contexts.keeping import KeepingLimits, Kept, to_go
from orchestrator.contexts.shelf import ContextShelf
from orchestrator.contexts.store import ContextStore
from orchestrator.ids import TenantId

ALICE, BOB = TenantId("alice"), TenantId("bob")
LIMITS = KeepingLimits(max_bytes=100, max_age_s=50)


class Clock:
    now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def store(tmp_path: Path) -> ContextStore:
    return ContextStore(tmp_path / "store")


@pytest.fixture
def shelf(store: ContextStore, clock: Clock) -> ContextShelf:
    return ContextShelf(store, LIMITS, clock_s=clock)


def blobs(tmp_path: Path) -> int:
    return len(list((tmp_path / "store").rglob("b-*")))


# --- The rules ---------------------------------------------------------------------------------------------


def kept(key: str, blob_bytes: int, asked_for_s: float, blob: str = "") -> Kept[str]:
    return Kept(key, blob or key, blob_bytes, asked_for_s)


def test_what_nobody_asked_for_in_time_goes() -> None:
    shelf = [kept("new", 1, 60), kept("old", 1, 9), kept("edge", 1, 10)]

    assert to_go(shelf, LIMITS, now_s=60) == ["old"]


def test_while_there_is_too_much_what_was_asked_for_longest_ago_goes() -> None:
    shelf = [kept("c", 60, 3), kept("a", 50, 1), kept("b", 30, 2)]

    assert to_go(shelf, LIMITS, now_s=10) == ["a"]


def test_one_that_is_too_large_alone_does_not_stay() -> None:
    assert to_go([kept("huge", 101, 5)], LIMITS, now_s=5) == ["huge"]


def test_contexts_over_one_blob_count_once_and_free_it_together() -> None:
    shelf = [kept("part", 60, 1, "x"), kept("whole", 60, 3, "x"), kept("other", 40, 2)]
    assert to_go(shelf, LIMITS, now_s=5) == []

    assert to_go([*shelf, kept("one more", 1, 4)], LIMITS, now_s=5) == ["part", "other"]


@given(
    st.lists(
        st.builds(kept, st.uuids().map(str), st.integers(0, 70), st.integers(0, 100), st.sampled_from("xyz"))
    )
)
def test_what_stays_is_young_and_fits_and_nothing_goes_without_need(shelf: list[Kept[str]]) -> None:
    sizes = {one.blob: one.blob_bytes for one in shelf}
    shelf = [kept(one.key, sizes[one.blob], one.asked_for_s, one.blob) for one in shelf]
    going = to_go(shelf, LIMITS, now_s=100)
    stay = [one for one in shelf if one.key not in going]

    assert all(100 - one.asked_for_s <= 50 for one in stay)
    assert sum({one.blob: one.blob_bytes for one in stay}.values()) <= 100
    if going:
        last = next(one for one in shelf if one.key == going[-1])
        with_last = {one.blob: one.blob_bytes for one in [*stay, last]}
        assert 100 - last.asked_for_s > 50 or sum(with_last.values()) > 100


# --- The shelf ---------------------------------------------------------------------------------------------


def test_a_context_is_there_for_the_next_run_without_staging(
    shelf: ContextShelf, store: ContextStore
) -> None:
    content_id = shelf.put(store.stage_text(ALICE, b"text"))

    context = shelf.take(ALICE, content_id)

    assert context is not None
    assert context.content_id == content_id
    assert context.files.blob.read_bytes() == b"text"


def test_another_tenant_does_not_get_it(shelf: ContextShelf, store: ContextStore) -> None:
    content_id = shelf.put(store.stage_text(ALICE, b"text"))

    assert shelf.take(BOB, content_id) is None


def test_a_run_keeps_what_the_shelf_has_given_up(
    shelf: ContextShelf, store: ContextStore, clock: Clock, tmp_path: Path
) -> None:
    content_id = shelf.put(store.stage_text(ALICE, b"text"))
    context = shelf.take(ALICE, content_id)
    assert context is not None

    clock.now_s = 51
    assert shelf.expire() == 1

    assert shelf.take(ALICE, content_id) is None
    assert context.files.blob.read_bytes() == b"text"
    store.release(context)
    assert blobs(tmp_path) == 0


def test_asking_for_a_context_keeps_it(shelf: ContextShelf, store: ContextStore, clock: Clock) -> None:
    content_id = shelf.put(store.stage_text(ALICE, b"text"))
    for clock.now_s in (40, 80, 120):
        context = shelf.take(ALICE, content_id)
        assert context is not None
        store.release(context)


def test_too_much_makes_the_oldest_go(
    shelf: ContextShelf, store: ContextStore, clock: Clock, tmp_path: Path
) -> None:
    ids = []
    for clock.now_s in range(4):
        ids.append(shelf.put(store.stage_text(ALICE, b"%d" % clock.now_s * 30)))

    assert blobs(tmp_path) == 3
    assert shelf.take(ALICE, ids[0]) is None


def test_the_same_context_twice_is_kept_once(
    shelf: ContextShelf, store: ContextStore, tmp_path: Path
) -> None:
    for _ in range(2):
        shelf.put(store.stage_text(ALICE, b"text"))

    shelf.close()

    assert blobs(tmp_path) == 0


def test_what_is_dropped_is_gone_for_its_tenant_alone(
    shelf: ContextShelf, store: ContextStore, tmp_path: Path
) -> None:
    ids = {tenant: shelf.put(store.stage_text(tenant, b"the same")) for tenant in (ALICE, BOB)}
    shelf.drop(ALICE, ids[ALICE])
    shelf.drop(ALICE, "never there")
    assert shelf.take(ALICE, ids[ALICE]) is None
    assert shelf.take(BOB, ids[BOB]) is not None
    assert blobs(tmp_path) == 1
