"""A run's progress in words: losses, how fast it goes, how long it will take, how much memory it has taken."""

from zofed.base.texts import duration
from zofed.runs import memory
from zofed.runs.tables import Row


class Progress:
    """What rows of a run's metrics say of its course, the same wherever the run is watched.

    what: a step or a round, of which there are `total`. is_own: whether this process is the run's, whose memory is then
    told. A run that goes on is timed from its first row here.
    """

    def __init__(self, what: str, total: int, *, is_own: bool = True) -> None:
        self.what, self.total, self.is_own = what, total, is_own
        self._began: tuple[int, float] | None = None
        self._held_out = ""

    def losses(self, row: Row) -> str:
        """The loss of a row, and the newest on held-out data."""
        if row.get("eval_loss") is not None:
            self._held_out = f"held-out {row['eval_loss']:.4f}"
        loss = f"loss {row['loss']:.4f}" if row.get("loss") is not None else ""
        return "  ".join(filter(None, [loss, self._held_out]))

    def pace(self, row: Row) -> str:
        """Steps a second (or seconds a step), time left, and the most memory held so far; the last alone at first."""
        step, seconds = int(row["step"]), float(row["seconds"])
        first, began = self._began = self._began or (step, seconds)
        held = f"{memory.peak_bytes() / 2**20:,.0f} MiB" if self.is_own else ""
        if step == first or seconds <= began:
            return held
        each = (seconds - began) / (step - first)
        rate = f"{1 / each:.3g} {self.what}s/s" if each < 1 else f"{duration(each)} a {self.what}"
        left = f"{duration(each * (self.total - step))} left" if step < self.total else ""
        return "  ".join(filter(None, [rate, left, held]))

    def line(self, row: Row) -> str:
        """All of it, for a reader who sees one line after the other."""
        at = f"{self.what} {row['step']}/{self.total}"
        return "  ".join(filter(None, [at, self.losses(row), f"{row['seconds']:.1f} s", self.pace(row)]))
