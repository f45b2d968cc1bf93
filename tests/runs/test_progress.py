"""The words of a run's progress."""

import re

from zofed.runs.progress import Progress


def test_progress_tells_losses_rate_time_left_and_memory() -> None:
    told = Progress("step", 10)
    memory = r"[\d,]+ MiB"
    assert re.fullmatch(
        rf"step 0/10  held-out 6\.2000  0\.0 s  {memory}", told.line({"step": 0, "eval_loss": 6.2, "seconds": 0.0})
    )
    line = told.line({"step": 2, "loss": 6.1, "seconds": 1.0})
    assert re.fullmatch(rf"step 2/10  loss 6\.1000  held-out 6\.2000  1\.0 s  2 steps/s  4 s left  {memory}", line)
    assert re.fullmatch(rf"25 s a step  {memory}", told.pace({"step": 10, "seconds": 250.0}))  # nothing is left


def test_a_run_that_goes_on_is_timed_from_where_it_does() -> None:
    told = Progress("round", 100)
    told.pace({"step": 51, "seconds": 1000.0})  # rounds before were another process's
    assert told.pace({"step": 53, "seconds": 1001.0}).startswith("2 rounds/s  24 s left  ")
