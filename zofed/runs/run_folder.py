"""A run's folder: settings, journal, metrics, checkpoints, summary, model; the same whichever way it ran.

What needs torch or numpy is imported where it is used: commands look into folders, and tell their help, long before.
"""

import json
import platform
import time
import warnings
from collections.abc import Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zofed import __version__, config
from zofed.base import arithmetic, shell
from zofed.base.errors import UserError
from zofed.base.files import private_folder, sync_file, sync_folder, write_private
from zofed.base.parsing import from_json
from zofed.config import Settings
from zofed.data import hub

if TYPE_CHECKING:
    from torch import Tensor

    from zofed.core.journal import Genesis

METRICS = (
    "timestamp", "epoch", "step", "mode", "scope", "q", "lr", "batch_size", "optimizer", "bp_interval", "loss",
    "grad_norm", "eval_loss", "forward_passes", "backward_passes", "forward_equivalents", "tokens", "seconds", "bytes",
    "cosine_kept", "cosine_direction", "share_kept",
)  # fmt: skip
EVALUATIONS = (
    "step", "source", "loss", "perplexity", "bits_per_byte", "accuracy", "f1", "auc", "exact_match", "token_f1",
    "rouge_l", "metrics",
)  # fmt: skip
SILENT_S = 60.0  # a running run that wrote nothing for so many seconds may have been killed
BEST = "best"  # name of the checkpoint with the lowest held-out loss

WAY, NODES, ARITHMETIC = "way", "nodes", "arithmetic"  # what inputs.json says of a run beside what must not change
# How a run runs, by the command that begins and continues it. The last of them is a federation on separate machines.
CENTRAL, SIMULATED, DEPLOYED = "zofed train", "zofed simulate", "zofed run"
IN_APP = "flwr run"  # of an app of a person's own, in which a run goes on where its folder is named again
RESTORE = "restore it from a copy"
_OF_REFUSED = (
    "settings.toml", "inputs.json", "journal.zofed", "metrics.csv", "evaluations.csv", "summary.json", "rounds.csv",
    "clients.csv", "client_evaluations.csv", "partition.csv", "partition.png", "rounds.log", "members.json",
    "baselines.json", "samples.jsonl", "sinks.json",
)  # fmt: skip
_OF_FEDERATIONS = ("rounds.csv", "clients.csv", "client_evaluations.csv", "partition.csv")


@dataclass(frozen=True)
class RunFolder:
    """Paths and files of one run. `path` is absolute."""

    path: Path

    @classmethod
    def create(
        cls, path: Path, settings: Settings, inputs: Mapping[str, Any], way: str = CENTRAL, nodes: int = 0
    ) -> "RunFolder":
        """A new folder for a run. Raises UserError when it cannot be written or holds something already.

        inputs: what a resumed run must find unchanged. way: how it runs, one of CENTRAL, SIMULATED and DEPLOYED. nodes:
        of a federation, how many the data are dealt out to. What a run killed before its first entry left is written
        over, and what a run left that was refused before it.
        """
        path = config.absolute(path, "out")
        folder = cls(path)
        try:
            if path.is_symlink() and not path.exists():
                raise UserError(f"out = {str(path)!r} is a link to nowhere: remove it or choose another --out")
            begun = ("settings.toml", "inputs.json")
            folder._clear_refused()
            if path.exists() and (
                not path.is_dir() or any(p.name not in begun and not p.name.endswith(".new") for p in path.iterdir())
            ):
                remedy = f"continue it with {folder.go_on()}, or choose" if folder.journal.exists() else "choose"
                raise UserError(f"out = {str(path)!r} is not empty: {remedy} another folder with --out")
            private_folder(path)
            about = {WAY: way, ARITHMETIC: arithmetic.described(), **({NODES: nodes} if nodes else {})}
            folder.write_text("inputs.json", json.dumps(dict(inputs) | about, indent=2, sort_keys=True) + "\n")
            folder.write_text("settings.toml", config.to_toml(settings))
            sync_folder(path.parent)
        except OSError as error:
            raise UserError(f"out = {str(path)!r} cannot be written: {error.strerror}; choose another --out") from error
        return folder

    def _clear_refused(self) -> None:
        """Remove what a run left that failed before its first record, so that the same --out takes the mended command.

        Anything else in the folder, a record or a writer at work, and all of it stays.
        """
        files = {self.path / name for name in _OF_REFUSED}
        if not self.path.is_dir() or not set(self.path.iterdir()) <= files:
            return
        from zofed.core.journal import Journal

        with suppress(UserError):  # a damaged summary or journal: the folder stays as it is
            if self.summary().get("status") != "failed":
                return
            with Journal.open(self.journal) as journal:
                if not journal.entries:
                    for file in files:
                        file.unlink(missing_ok=True)

    @classmethod
    def open(cls, path: Path) -> "RunFolder":
        """The folder of an earlier run; a repair that was stopped on its way is carried to its end first.

        Raises UserError when it is none.
        """
        folder = cls(config.absolute(path, "out"))
        check_is_one(folder.path)
        if not (folder.path / "settings.toml").is_file() or not folder.journal.is_file():
            raise UserError(f"{folder.path} is not the folder of a run: it lacks settings.toml or journal.zofed")
        from zofed.runs import repair

        if (folder.path / repair.PENDING).exists():
            repair.complete(folder)
        return folder

    @property
    def way(self) -> str:
        """How the run runs: CENTRAL, SIMULATED or DEPLOYED. A run of an earlier version tells it by its files alone."""
        written = self.inputs().get(WAY)
        if written in (CENTRAL, SIMULATED, DEPLOYED, IN_APP):
            return written
        return SIMULATED if any((self.path / name).exists() for name in _OF_FEDERATIONS) else CENTRAL

    @property
    def nodes(self) -> int:
        """How many nodes a federated run's data are dealt out to; 0: not known, or a central run."""
        written = self.inputs().get(NODES)
        return written if isinstance(written, int) else 0

    def go_on(self) -> str:
        """The command that continues the run. NAME stands for a SuperLink, which the run's folder does not know."""
        if self.way == IN_APP:
            return shell.command(*IN_APP.split(), ".", "--run-config", f'zofed.out="{self.path}"')
        words = [*self.way.split(), *(["NAME"] if self.way == DEPLOYED else [])]
        return shell.command(*words, "--resume", self.path)

    @property
    def quiet_seconds(self) -> float:
        """Seconds since the run wrote a step or its summary; of one that should be running, many mean it was killed."""
        files = [self.path / name for name in ("metrics.csv", "summary.json", "settings.toml")]
        return time.time() - max((file.stat().st_mtime for file in files if file.exists()), default=0.0)

    def after_interruption(self) -> str:
        """What to do after one: nothing stands in a folder that has no journal yet."""
        return f"continue with: {self.go_on()}" if self.journal.exists() else "nothing was trained yet: start it again"

    def check_way(self, way: str) -> None:
        """Raise UserError, with the command that continues the run, unless it runs this way."""
        if not self.inputs():
            raise UserError(f"{self.path / 'inputs.json'}, which tells what the run began with, is spoilt: {RESTORE}")
        if self.way != way:
            what = {CENTRAL: "a central run", SIMULATED: "a federated run", DEPLOYED: "a run on separate machines"}
            what[IN_APP] = "a run of an app of its own"
            told = f"{self.path} holds {what[self.way]}: continue it with {self.go_on()}"
            raise UserError(f"{told}, or choose another folder with --out")

    def check_has_model(self) -> None:
        """Raise UserError for a run whose module only its own app can make: no file says what it is."""
        if self.way == IN_APP:
            raise UserError(
                f"{self.path} is the run of a module of a person's own, whose code is not in its files: in Python, "
                f"zofed.replay of the untrained module and {str(self.journal)!r} rebuilds its weights"
            )

    @property
    def journal(self) -> Path:
        """The file of the run's records."""
        return self.path / "journal.zofed"

    @property
    def model(self) -> Path:
        """The folder of the trained model."""
        return self.path / "model"

    def has_model(self) -> bool:
        """Whether the trained model lies here, whole as far as its headers tell."""
        from safetensors import SafetensorError, safe_open

        try:
            for path in (found := list(self.model.glob("*.safetensors"))):
                with safe_open(path, "pt"):
                    pass
            return bool(found) and hub.has_config(self.model)
        except (OSError, SafetensorError):
            return False

    def settings(self) -> Settings:
        """The run's settings, from its `settings.toml`."""
        return config.resolve(config.read_own_toml(self.path / "settings.toml"))

    def write_text(self, name: str, text: str) -> None:
        """Write a file so that a reader sees the old or the new one, never half of it."""
        write_private(self.path / name, text)

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        """Write `summary.json`."""
        self.write_text("summary.json", json.dumps(summary, indent=2, allow_nan=False) + "\n")

    def summary(self) -> dict[str, Any]:
        """What `summary.json` says."""
        return self._read_json("summary.json")

    def inputs(self) -> dict[str, Any]:
        """What `inputs.json` says the run read."""
        return self._read_json("inputs.json")

    def check_unchanged(self, inputs: Mapping[str, Any], genesis: "Genesis", now: "Genesis") -> None:
        """Raise UserError unless a run can go on: from what it read, and from the journal's genesis, as they were.

        inputs, now: what settings, data and model give today. Another processor or BLAS may go on, to weights that
        the journal explains as well; that they may not be those of an undisturbed run is said.
        """
        from zofed.core.journal import differences

        recorded = self.inputs()
        before = {key: value for key, value in recorded.items() if key not in (WAY, NODES, ARITHMETIC)}
        before = config.with_present_names(before)
        if not before:
            raise UserError(f"{self.path / 'inputs.json'}, which tells what the run began with, is spoilt: {RESTORE}")
        different = [key for key in sorted(before | dict(inputs)) if before.get(key) != inputs.get(key)]
        different += differences(genesis, now)
        if different:
            raise UserError(
                f"{self.path} began with another {', '.join(different)} than its settings give today: "
                "bring back the settings, data, tokenizer and model it began with"
            )
        if other := arithmetic.changed_since(recorded.get(ARITHMETIC)):
            warnings.warn(
                f"{self.path} goes on with other arithmetic ({other}): its steps from here may differ in the last bit "
                "from those of a run that was not interrupted",
                stacklevel=2,
            )

    def _read_json(self, name: str) -> dict[str, Any]:
        """The object in a file; empty where there is none or it is spoilt."""
        try:
            found = from_json((self.path / name).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}

    def save_update(self, digest: bytes, tensors: Mapping[str, "Tensor"]) -> None:
        """Keep the gradient or guide that a record names by its digest, whole on disk before this returns."""
        self._save(self.path / "updates", digest.hex(), tensors, {})

    def keep_updates(self, digests: Collection[bytes]) -> None:
        """Let go of all gradients and guides but these."""
        names = {self._update_path(digest).name for digest in digests}
        for path in (self.path / "updates").glob("*.safetensors"):
            if path.name not in names:
                path.unlink()

    def has_update(self, digest: bytes) -> bool:
        """Whether there is a file for the gradient or guide of a digest, be it whole or not."""
        return bool(digest) and self._update_path(digest).is_file()

    def _update_path(self, digest: bytes) -> Path:
        return self.path / "updates" / f"{digest.hex()}.safetensors"

    def update(self, digest: bytes) -> "dict[str, Tensor] | None":
        """The gradient or guide of a digest, None where it was not kept or is damaged."""
        from zofed.runs import checkpoints

        found = checkpoints.read(self._update_path(digest), digest.hex()) if digest else None
        return found and found[0]

    def whole_update(self, digest: bytes) -> "dict[str, Tensor] | None":
        """As `update`, but raises NotKept, which names the file, where it is damaged."""
        found = self.update(digest)
        if found is None and self.has_update(digest):
            from zofed.core.replica import NotKept

            raise NotKept(
                f"{self._update_path(digest)}, a gradient that the replay needs, is damaged, and no checkpoint lies "
                "behind its step: restore the file from a copy"
            )
        return found

    def save_checkpoint(self, name: str, tensors: Mapping[str, "Tensor"], facts: Mapping[str, Any], keep: int) -> None:
        """Save tensors and facts whole or not at all; all but the newest `keep` go once the new one is on disk."""
        self._save(self.path / "checkpoints", name, tensors, facts)
        for old in self.checkpoints()[:-keep]:
            old.unlink()

    def save_best(self, tensors: Mapping[str, "Tensor"], facts: Mapping[str, Any]) -> None:
        """Keep what scored best so far, in place of what did before."""
        self._save(self.path / "checkpoints", BEST, tensors, facts)

    def best(self) -> "tuple[dict[str, Tensor], dict[str, Any]]":
        """Tensors and facts of the best checkpoint. Raises UserError where there is none or it is damaged."""
        from zofed.runs import checkpoints

        path = self.path / "checkpoints" / f"{BEST}.safetensors"
        found = checkpoints.read(path)
        if found is None and path.exists():
            raise UserError(f"{path} is damaged: {RESTORE}, or score the run's end, without --best")
        if found is None:
            raise UserError(f"{self.path} holds no best checkpoint: train with keep-best = true")
        return found

    def _save(self, folder: Path, name: str, tensors: Mapping[str, "Tensor"], facts: Mapping[str, Any]) -> None:
        from zofed.runs import checkpoints

        checkpoints.write(folder, name, tensors, facts)

    def sync_tables(self) -> None:
        """Make durable all lines of all tables."""
        for path in self.path.glob("*.csv"):
            sync_file(path)
        sync_folder(self.path)

    def checkpoints(self) -> list[Path]:
        """Files of all checkpoints to go on from, oldest first."""
        return sorted((self.path / "checkpoints").glob("step-*.safetensors"))


def with_out(settings: Settings, name: str) -> Settings:
    """The settings with an absolute output folder: the one asked for, or a new one under ./runs.

    name: what a new one's begins with; empty: the mode.
    """
    out = config.absolute(settings.out or f"runs/{name or settings.mode}-{timestamp().replace(':', '')}", "out")
    return settings.model_copy(update={"out": str(out)})


def to_resume(path: Path, given: object, way: str) -> RunFolder:
    """The folder of a run to go on with, which began this way, by its command.

    given: settings beside it, of which there may be none. Raises UserError for some, and for a folder of no such run.
    """
    if given:
        raise UserError(f"--resume {path} goes on with the run's own settings: give no others")
    found = RunFolder.open(path)
    found.check_way(way)
    return found


def check_is_one(path: Path) -> None:
    """Raise UserError, with one of them, for a folder that holds folders of runs instead of being one."""
    try:
        below = () if (path / "settings.toml").exists() else (each / "settings.toml" for each in sorted(path.iterdir()))
        inner = next((file.parent for file in below if file.is_file()), None)
    except OSError:  # no folder at all, or one that cannot be read: the caller tells
        return
    if inner:
        raise UserError(f"{path} is a folder of runs: name one, such as {shell.command(inner)}")


def versions() -> dict[str, str]:
    """Versions of all that a result may depend on."""
    packages = ("torch", "transformers", "numpy", "flwr", "safetensors", "tokenizers")
    return {"zofed": __version__, "python": platform.python_version()} | {name: version(name) for name in packages}


def timestamp() -> str:
    """Now, in UTC, to the second."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
