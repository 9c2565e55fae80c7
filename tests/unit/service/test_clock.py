import pytest

from orchestrator.service.clock import LONGEST_GAP_S, MOST_JUMP_S, SETTLES_S, ClockJudge

NOW_S = 1_800_000_000.0
YEAR_S = 365 * 86_400.0


class Clocks:
    """A wall clock that can be set, and one that cannot."""

    def __init__(self) -> None:
        self.wall_s, self.steady_s = NOW_S, 1_000.0
        self.judge = ClockJudge()

    def pass_by(self, seconds: float) -> None:
        self.wall_s += seconds
        self.steady_s += seconds

    def is_believed(self, newest_s: float | None = None) -> bool:
        return not self.judge.look(self.wall_s, self.steady_s, newest_s=newest_s)


@pytest.fixture
def clocks() -> Clocks:
    return Clocks()


def test_a_clock_that_goes_on_is_believed_however_much_time_passes(clocks: Clocks) -> None:
    assert clocks.is_believed()
    clocks.pass_by(YEAR_S)
    assert clocks.is_believed()


def test_a_clock_that_is_slewed_or_sleeps_for_a_little_is_believed(clocks: Clocks) -> None:
    for _ in range(100):
        assert clocks.is_believed()
        clocks.wall_s += MOST_JUMP_S / 2
        clocks.pass_by(600)


@pytest.mark.parametrize("jump_s", [YEAR_S, -YEAR_S, 2 * MOST_JUMP_S])
def test_a_clock_that_jumps_is_not_believed_until_it_jumps_back(clocks: Clocks, jump_s: float) -> None:
    assert clocks.is_believed()
    clocks.wall_s += jump_s
    assert "jumped by" in clocks.judge.look(clocks.wall_s, clocks.steady_s)
    clocks.pass_by(600)
    assert not clocks.is_believed()
    clocks.wall_s -= jump_s
    assert clocks.is_believed()


def test_a_clock_that_was_set_for_good_is_believed_after_a_day(clocks: Clocks) -> None:
    assert clocks.is_believed()
    clocks.wall_s += YEAR_S
    assert not clocks.is_believed()
    clocks.pass_by(SETTLES_S - 1)
    assert not clocks.is_believed()
    clocks.pass_by(1)
    assert clocks.is_believed()


def test_a_clock_that_keeps_jumping_is_never_believed(clocks: Clocks) -> None:
    assert clocks.is_believed()
    for _ in range(10):
        clocks.wall_s += YEAR_S
        clocks.pass_by(SETTLES_S)
        assert not clocks.is_believed()


@pytest.mark.parametrize(
    ("newest_s", "believed"),
    [
        (None, True),
        (NOW_S - 60, True),
        (NOW_S - LONGEST_GAP_S, True),
        (NOW_S - LONGEST_GAP_S - 1, False),
        (NOW_S + YEAR_S, False),
    ],
)
def test_a_server_that_starts_believes_a_date_that_fits_its_books(
    clocks: Clocks, newest_s: float | None, believed: bool
) -> None:
    assert clocks.is_believed(newest_s) is believed
    clocks.pass_by(SETTLES_S)
    assert clocks.is_believed()
