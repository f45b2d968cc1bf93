"""Runs begun, continued and read from Python: in a script, in a notebook."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from tqdm.auto import tqdm

from zofed import config
from zofed.base import log
from zofed.base.errors import UserError
from zofed.config import Settings
from zofed.experiments import plot_run
from zofed.runs import run_folder, run_result
from zofed.runs.progress import Progress
from zofed.runs.run_folder import RunFolder
from zofed.runs.tables import Row
from zofed.training import central

PathLike = str | Path


@dataclass(frozen=True)
class Picture:
    """A PNG file; a notebook shows it."""

    path: Path

    def _repr_png_(self) -> bytes:
        return self.path.read_bytes()


@dataclass(frozen=True)
class Run:
    """The folder of a run, however it ran: `zofed.Run("runs/first")`.

    path: of the folder, made absolute. Raises UserError for a folder that holds no run.
    """

    path: Path

    def __init__(self, path: PathLike) -> None:
        object.__setattr__(self, "path", RunFolder.open(Path(path)).path)

    @property
    def settings(self) -> Settings:
        """All settings, as attributes: `run.settings.learning_rate`."""
        return RunFolder(self.path).settings()

    @property
    def summary(self) -> dict[str, Any]:
        """What `summary.json` says: `summary["eval_loss_end"]` is the held-out loss at the end, in nats."""
        return RunFolder(self.path).summary()

    @property
    def metrics(self) -> pd.DataFrame:
        """`metrics.csv`: one row a step, step 0 before the first; NaN where a step has no such figure."""
        return pd.read_csv(self.path / "metrics.csv")

    def plot(self, path: PathLike | None = None) -> Picture:
        """A picture of the losses, the rate and the slopes' spread by step, written as PNG.

        path: of the file; None: quick.png in the run's folder. Raises UserError where it cannot be written.
        """
        target = Path(path or self.path / "quick.png").absolute()
        return Picture(plot_run.quick(run_result.read(self.path), target))


def train(file: PathLike | None = None, *, resume: PathLike | None = None, quiet: bool = False, **settings: Any) -> Run:
    """Train on this machine, as `zofed train` does, and wait for the end; the run.

    settings: by their names with underscores (`learning_rate=0.03`), each as an option that was typed. file: a TOML
    file of settings, which they override. resume: the folder of a run to go on with instead, by its own settings.
    quiet: print no line at each evaluation, and show no bar, which else stands in notebooks and on terminals. Raises
    UserError as the command does, KeyboardInterrupt for Ctrl-C.
    """
    if resume is None:
        asked = run_folder.with_out(_asked(file, settings, config.CENTRAL), "")
        with _Shown(quiet, asked.steps) as shown:
            central.train(asked, Path(asked.out), shown.show, shown.expect)
        return Run(asked.out)
    folder = run_folder.to_resume(Path(resume), file or settings, run_folder.CENTRAL)
    with _Shown(quiet, folder.settings().steps) as shown:
        central.resume(folder.path, shown.show, shown.expect)
    return Run(folder.path)


def simulate(file: PathLike | None = None, *, resume: PathLike | None = None, **settings: Any) -> Run:
    """Run a federation in this process, as `zofed simulate` does, and wait for the end; the run.

    Settings, file and resume are those of `zofed.train`. A line is printed for each round.
    """
    from zofed.federated import simulation

    if resume is None:
        asked, nodes = run_folder.with_out(_asked(file, settings, config.FEDERATED), "simulated"), 0
    else:
        folder = run_folder.to_resume(Path(resume), file or settings, run_folder.SIMULATED)
        asked, nodes = folder.settings().model_copy(update={"out": str(folder.path)}), folder.nodes
    simulation.simulate(asked, nodes)
    return Run(asked.out)


def _asked(file: PathLike | None, settings: dict[str, Any], run: str) -> Settings:
    values = {config.kebab(name): str(value) if isinstance(value, Path) else value for name, value in settings.items()}
    if unknown := [name for name in values if name not in config.SETTINGS]:
        raise UserError(config.unknown_setting(unknown[0]))
    return config.asked_for(Path(file) if file else None, values, run)


class _Shown:
    """What is seen of a run: a line at each evaluation, and below it a bar where somebody looks on."""

    def __init__(self, quiet: bool, steps: int) -> None:
        self.quiet, self.progress = quiet, Progress("step", steps)
        # As a widget in a notebook that has ipywidgets, else of characters.
        self.bar = tqdm(total=steps, unit="step", leave=False, disable=quiet or not _is_watched())

    def __enter__(self) -> "_Shown":
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()

    def show(self, row: Row) -> None:
        """Take in a row of the metrics."""
        line = self.progress.line(row)
        self.bar.set_postfix_str(self.progress.losses(row), refresh=False)
        self.bar.update(int(row["step"]) - self.bar.n)
        if not self.quiet and row.get("eval_loss") is not None:
            self.bar.clear()
            log.tell(line)

    def expect(self, total: int) -> None:
        """Count up to this many from now on."""
        self.progress.total = total
        self.bar.reset(total)


def _is_watched() -> bool:
    """Whether a bar can be drawn anew in place: in a notebook, whose streams are no terminal, or on a terminal."""
    return log.shows_progress() and ("ipykernel" in sys.modules or sys.stderr.isatty())
