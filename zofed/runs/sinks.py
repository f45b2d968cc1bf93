"""Where the rows of a run's metrics go besides its folder: TensorBoard, Weights & Biases, Trackio, MLflow.

Each is an extra (`zofed[wandb]`). A run has one name in all of them, which a resumed run goes on under.
"""

import importlib
import json
import os
import time
import uuid
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from zofed.base.errors import UserError
from zofed.base.files import private_folder, write_private
from zofed.base.parsing import from_json
from zofed.config import Settings, sinks_of
from zofed.runs.tables import Row

SHOWN = {
    "loss": "loss/training (nats)",
    "eval_loss": "loss/held out (nats)",
    "lr": "step/rate",
    "grad_norm": "step/norm of the estimate",
    "cosine_direction": "step/cosine of a direction with the guide",
    "forward_equivalents": "cost/forward-equivalents (examples)",
    "seconds": "cost/seconds",
    "bytes": "cost/bytes",
}
PROJECT = "zofed"
IDENTITY = "sinks.json"  # in the run's folder: what it is called elsewhere

Show = Callable[[Row], None]


class Sink(Protocol):
    """Takes the figures of a run. Made before its first step; raises what its library does."""

    def write(self, step: int, figures: Mapping[str, float]) -> None:
        """The figures of a step, by the names of SHOWN."""

    def close(self, completed: bool) -> None:
        """Nothing more comes."""


class TensorBoard:
    """Event files in the run's folder; a resumed run writes over the steps that it takes anew."""

    module = "torch.utils.tensorboard"

    def __init__(self, library: Any, folder: Path, settings: Settings, identity: dict[str, str]) -> None:
        self._library, self._folder, self._writer = library, folder / "tensorboard", None

    def write(self, step: int, figures: Mapping[str, float]) -> None:
        if self._writer is None:
            self._writer = self._library.SummaryWriter(str(private_folder(self._folder)), purge_step=step)
        for name, value in figures.items():
            self._writer.add_scalar(name, value, step)
        if SHOWN["eval_loss"] in figures:
            self._writer.flush()

    def close(self, completed: bool) -> None:
        if self._writer is not None:
            self._writer.close()


class Wandb:
    """A run of Weights & Biases, whose files lie in the run's folder; WANDB_MODE=offline sends nothing."""

    module = "wandb"

    def __init__(self, library: Any, folder: Path, settings: Settings, identity: dict[str, str]) -> None:
        self._run = library.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            id=identity["name"],
            name=identity["name"],
            dir=str(folder),
            config=settings.model_dump(by_alias=True),
            resume="allow",
        )

    def write(self, step: int, figures: Mapping[str, float]) -> None:
        self._run.log(dict(figures), step=step)

    def close(self, completed: bool) -> None:
        self._run.finish(exit_code=0 if completed else 1)


class Trackio:
    """A run of Trackio, in its folder (TRACKIO_DIR); `trackio show` draws it."""

    module = "trackio"

    def __init__(self, library: Any, folder: Path, settings: Settings, identity: dict[str, str]) -> None:
        self._run = library.init(
            project=os.environ.get("TRACKIO_PROJECT", PROJECT),
            name=identity["name"],
            config=settings.model_dump(by_alias=True),
            resume="allow",
            embed=False,
        )

    def write(self, step: int, figures: Mapping[str, float]) -> None:
        self._run.log(dict(figures), step=step)

    def close(self, completed: bool) -> None:
        self._run.finish()


class Mlflow:
    """A run of MLflow, where MLFLOW_TRACKING_URI says; a resumed run goes on where it began."""

    module = "mlflow"

    def __init__(self, library: Any, folder: Path, settings: Settings, identity: dict[str, str]) -> None:
        own = f"sqlite:///{Path.cwd() / 'mlflow.db'}"  # MLflow's own default, wherever a resumed run is started
        place = identity.setdefault("mlflow-uri", library.get_tracking_uri() if library.is_tracking_uri_set() else own)
        self._client = library.MlflowClient(tracking_uri=place)
        if "mlflow" not in identity:
            name = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
            found = self._client.get_experiment_by_name(name)
            experiment = found.experiment_id if found else self._client.create_experiment(name)
            run = self._client.create_run(experiment, run_name=identity["name"])
            identity["mlflow"] = run.info.run_id
            settled = settings.model_dump(by_alias=True).items()
            params = [library.entities.Param(key, str(value)) for key, value in settled]
            self._client.log_batch(run.info.run_id, params=params)
        self._id, self._metric = identity["mlflow"], library.entities.Metric

    def write(self, step: int, figures: Mapping[str, float]) -> None:
        now = int(time.time() * 1000)
        metrics = [self._metric(name.partition(" (")[0], value, now, step) for name, value in figures.items()]
        self._client.log_batch(self._id, metrics=metrics)  # whose names take no brackets

    def close(self, completed: bool) -> None:
        self._client.set_terminated(self._id, "FINISHED" if completed else "FAILED")


SINKS = {"tensorboard": TensorBoard, "wandb": Wandb, "trackio": Trackio, "mlflow": Mlflow}


def check(settings: Settings) -> None:
    """Raise UserError where the run asks for what is not installed."""
    for name in sinks_of(settings):
        _library(name)


@contextmanager
def opened(settings: Settings, folder: Path, show: Show) -> Iterator[Show]:
    """What to call with each row: `show`, and then what `report-to` names.

    One that fails on the way is left out, which is said once: the tables in the folder have every row. Raises UserError
    for one that cannot begin.
    """
    if not (names := sinks_of(settings)):
        yield show
        return
    identity = _identity(folder)
    sinks: dict[str, Sink] = {}

    def also(row: Row) -> None:
        show(row)
        figures = {tag: row[name] for name, tag in SHOWN.items() if row.get(name) is not None}
        for name in list(sinks):
            _tried(sinks, name, lambda sink: sink.write(row["step"], figures))

    completed = False
    try:
        for name in names:
            sinks[name] = _begun(name, folder, settings, identity)
        write_private(folder / IDENTITY, json.dumps(identity, indent=2) + "\n")
        yield also
        completed = True
    finally:
        for name in list(sinks):
            _tried(sinks, name, lambda sink: sink.close(completed))


def _identity(folder: Path) -> dict[str, str]:
    """What the run is called elsewhere: its folder's name and something that no other run of that name has."""
    try:
        return dict(from_json((folder / IDENTITY).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return {"name": f"{folder.name}-{uuid.uuid4().hex[:8]}"}


def _begun(name: str, folder: Path, settings: Settings, identity: dict[str, str]) -> Sink:
    try:
        return SINKS[name](_library(name), folder, settings, identity)
    except UserError:
        raise
    except Exception as error:  # of every library, its own
        remedy = ", log in (wandb login), or set WANDB_MODE=offline" if name == "wandb" else ""
        raise UserError(f"report-to = {name!r} cannot begin ({_first_line(error)}): leave it out{remedy}") from error


def _tried(sinks: dict[str, Sink], name: str, call: Callable[[Sink], None]) -> None:
    try:
        call(sinks[name])
    except Exception as error:  # of every library, its own: a dashboard ends no run
        del sinks[name]
        warnings.warn(
            f"report-to = {name!r} took no more figures ({_first_line(error)}): the run goes on, metrics.csv has all",
            stacklevel=3,
        )


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def _library(name: str) -> Any:
    try:
        return importlib.import_module(SINKS[name].module)
    except ImportError as error:
        raise UserError(
            f"report-to = {name!r}, but its library is not installed: pip install 'zofed[{name}]', or leave it out"
        ) from error
