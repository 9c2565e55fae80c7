"""Whether the wall clock may be believed by who deletes what is too old: a wrong date must not delete it all.

Rules:

1. A clock is believed while it goes like the steady one, which nobody sets: `MOST_JUMP_S` apart at most, from
   one look to the next.
2. What is seen first is believed unless the newest thing in the books is from later, or is older than
   `LONGEST_GAP_S`: a machine may come up with a wrong date.
3. A clock that jumped, or was not believed at first, is believed when it has gone steadily for `SETTLES_S` on
   its new course, and at once when it jumps back onto the old one. A restart begins with rule 2.

Nothing else needs to believe it. Deadlines and pauses are counted by the steady clock; a time in the books
only says and sorts; quotas are of whatever UTC day the wall clock says.

Pure: the clocks are read elsewhere.
"""

from dataclasses import dataclass

MOST_JUMP_S = 600.0
LONGEST_GAP_S = 7 * 86_400.0
SETTLES_S = 86_400.0


@dataclass(slots=True)
class ClockJudge:
    """What is held of one wall clock."""

    _offset_s: float | None = None
    """Of the wall clock to the steady one, as it is believed; None before anything was."""
    _doubted_offset_s: float | None = None
    """As it is not believed yet ..."""
    _doubted_since_s: float = 0.0
    """... since then, by the steady clock."""

    @property
    def has_looked(self) -> bool:
        """Whether `look` was called before."""
        return self._offset_s is not None or self._doubted_offset_s is not None

    def look(self, wall_s: float, steady_s: float, *, newest_s: float | None = None) -> str:
        """Why the wall clock is not believed; empty when it is.

        Args:
            wall_s: Unix time.
            steady_s: Of a clock that goes on while the machine sleeps, and that nobody sets.
            newest_s: Unix time of the newest thing in the books, at the first look; None for none.
        """
        offset_s = wall_s - steady_s
        if not self.has_looked:
            return self._look_first(offset_s, wall_s, steady_s, newest_s)
        if self._offset_s is not None and abs(offset_s - self._offset_s) <= MOST_JUMP_S:
            self._believe(offset_s)
            return ""
        if self._doubted_offset_s is None or abs(offset_s - self._doubted_offset_s) > MOST_JUMP_S:
            self._doubted_since_s = steady_s
        self._doubted_offset_s = offset_s
        if steady_s - self._doubted_since_s >= SETTLES_S:
            self._believe(offset_s)
            return ""
        if self._offset_s is None:
            return "the clock and the newest run are far apart"
        return f"the clock jumped by {offset_s - self._offset_s:+,.0f} s"

    def _look_first(self, offset_s: float, wall_s: float, steady_s: float, newest_s: float | None) -> str:
        if newest_s is None or -MOST_JUMP_S <= wall_s - newest_s <= LONGEST_GAP_S:
            self._believe(offset_s)
            return ""
        self._doubted_offset_s, self._doubted_since_s = offset_s, steady_s
        return "the clock and the newest run are far apart"

    def _believe(self, offset_s: float) -> None:
        self._offset_s, self._doubted_offset_s = offset_s, None
