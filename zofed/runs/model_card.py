"""The README.md of an exported run, as the Hugging Face hub reads it: what it is, what made it, what it scores."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import tomli_w

from zofed import config
from zofed.base.files import write_whole
from zofed.base.texts import one_line
from zofed.config import Settings
from zofed.core.metrics import MEASURES, losses_among, scores_among
from zofed.data import hub
from zofed.data.catalog import CATALOG
from zofed.runs.run_folder import RunFolder, versions

PATHS = ("model", "tokenizer", "dataset", "bp-dataset", "eval-dataset", "task")  # settings that may name a local place
OF_THE_MACHINE = ("out", "device", "devices")  # settings that say nothing of the result

Rows = Sequence[Sequence[str]]


WHAT = {
    "merged": "A model",
    "lora": "A LoRA, in the files of peft,",
    "prefix": "A prefix of virtual tokens, in the files of peft,",
    "prompt": "A prompt of virtual tokens, in the files of peft,",
}


@dataclass(frozen=True)
class Exported:
    """What a card tells beside the run's own files.

    kind: of the folder. base: what the run began with: a size, a folder or a hub id. digest, round: of the weights;
    has_ended: whether the run has. pipeline: the hub's word for what the model does. usage: Python that loads it.
    told: of a LoRA, sentences on what it holds; table: the same by kind of matrix, its head first.
    """

    kind: Literal["merged", "lora", "prefix", "prompt"]
    base: str
    digest: str
    round: int
    has_ended: bool
    pipeline: str
    usage: str
    told: Sequence[str] = ()
    table: Rows = ()


def write(folder: RunFolder, about: Exported, out: Path) -> None:
    """Write the card of a run into the folder that was exported."""
    write_whole(out / "README.md", text(folder, about))


def text(folder: RunFolder, about: Exported) -> str:
    """The card. All that comes from data, settings and names stands in it as text: nothing of it is markup."""
    settings, summary = folder.settings(), folder.summary()
    parts = [
        _head(settings, about),
        f"# {code(folder.path.name)}",
        _about(about),
        "## Use",
        fenced(about.usage, "python"),
    ]
    if about.told:
        parts += ["## What the LoRA holds", "\n".join(f"- {sentence}" for sentence in about.told), table(about.table)]
    parts += ["## Training", *_training(settings, summary, about)]
    if scores := _scores(summary):
        parts += ["## Scores", _scored_on(summary), scores]
    parts += ["## The same weights again", _reproduction(folder, summary, about)]
    parts += [
        "## Licence",
        "None is stated here: that is left to whoever publishes these files, and what the base and the data allow "
        "binds it. The hub reads it from a line `license:` at the top of this file.",
    ]
    return "\n\n".join(parts) + "\n"


def code(value: object) -> str:
    """Text as a code span of Markdown, which no backtick in it ends, and no bar in a table."""
    line = one_line(str(value)) or " "
    fence = "`" * (_longest_run(line) + 1)
    space = " " * (line[0] == "`" or line[-1] == "`")
    return f"{fence}{space}{line}{space}{fence}".replace("|", "\\|")


def fenced(block: str, language: str) -> str:
    """A block of Markdown that nothing in it ends."""
    fence = "`" * max(3, _longest_run(block) + 1)
    return f"{fence}{language}\n{block.rstrip()}\n{fence}"


def _longest_run(text: str) -> int:
    return max(map(len, re.findall("`+", text)), default=0)


def table(rows: Rows) -> str:
    """A table of Markdown; the first of the rows is its head, the first column its words, the others figures."""
    head, *others = rows
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *others]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _head(settings: Settings, about: Exported) -> str:
    """What the hub reads, as YAML, of which JSON is a part."""
    values: dict[str, Any] = {
        "base_model": about.base if hub.is_id(about.base) else None,
        "library_name": "transformers" if about.kind == "merged" else "peft",
        "pipeline_tag": about.pipeline,
        "datasets": _of_the_hub(settings),
        "tags": ["zofed", *([] if about.kind == "merged" else [about.kind])],
    }
    lines = [f"{key}: {json.dumps(value)}" for key, value in values.items() if value]
    return "\n".join(["---", *lines, "---"])


def _of_the_hub(settings: Settings) -> list[str]:
    """Ids of the data sets, where the catalog knows them."""
    names = [settings.dataset, *([settings.bp_dataset] if settings.bp_dataset else [])]
    known = (CATALOG.get(Path(name).name) for name in names)
    return list(dict.fromkeys(info.repository for info in known if info and info.repository))


def _about(about: Exported) -> str:
    what = WHAT[about.kind]
    cut = "" if about.has_ended else f" The run has not ended: these are its weights after round {about.round}."
    where = "the folder " if _is_path(about.base) else ""
    return f"{what} that zofed trained from {where}{code(_shown(about.base))}.{cut}"


def _is_path(place: str) -> bool:
    return place.startswith(("/", "~"))


def _shown(place: str) -> str:
    """The name of a place without the folders of somebody's machine."""
    return Path(place).name if _is_path(place) else place


def _training(settings: Settings, summary: Mapping[str, Any], about: Exported) -> list[str]:
    base = summary.get("base") or {}
    lines = [f"- base: {code(_shown(about.base))}{_digest(base.get('weights'), 'weights')}"]
    if revision := base.get("revision"):
        lines[0] += f", revision {code(revision)}"
    for reading in summary.get("data_read") or []:
        lines.append(f"- data: {code(_shown(str(reading.get('dataset'))))}, {reading.get('documents'):,} documents")
    lines += [f"- {what}{_digest(digest, '')}" for what, digest in sorted((summary.get("data") or {}).items())]
    if parameters := summary.get("parameters"):
        lines.append(f"- parameters: {parameters['total']:,}, of which {parameters['trainable']:,} trained")
    values = settings.model_dump(by_alias=True)
    changed = {key: values[key] for key in config.changed(settings) if key not in OF_THE_MACHINE}
    changed |= {key: _shown(str(changed[key])) for key in PATHS if key in changed}
    settings_block = fenced(tomli_w.dumps(changed), "toml") if changed else "None."
    return ["\n".join(lines), "The settings that are not at their defaults:", settings_block]


def _digest(value: object, of: str) -> str:
    return f", SHA-256{f' of the {of}' if of else ''} {code(value)}" if value else ""


def _scored_on(summary: Mapping[str, Any]) -> str:
    evaluated = summary.get("evaluated") or {}
    examples, held_out = evaluated.get("examples"), evaluated.get("held_out")
    told = f" ({examples:,} of {held_out:,} examples)" if examples and held_out else ""
    return f"On held-out data{told}; losses in nats. A baseline is what no learning scores."


def _scores(summary: Mapping[str, Any]) -> str:
    """A table of the run's end, its start and its baselines; empty where the run has no score yet."""
    if "eval_loss_end" not in summary:
        return ""
    baselines = summary.get("baselines") or {}
    rows: dict[str, dict[str, Any]] = {
        "end": {"loss": summary["eval_loss_end"], **{key: summary[key] for key in MEASURES if key in summary}},
        "start": {"loss": summary.get("eval_loss_start")},
    }
    rows |= {f"baseline {name}": {"loss": loss} for name, loss in losses_among(baselines).items()}
    rows |= {f"baseline {name}": dict(found) for name, found in scores_among(baselines).items()}
    columns = [measure for measure in MEASURES if any(row.get(measure) is not None for row in rows.values())]
    lines = [["", *(column.replace("_", " ") for column in columns)]]
    for name, row in rows.items():
        lines.append([name.replace("_", " "), *(_figure(row.get(column)) for column in columns)])
    return table(lines)


def _figure(value: object) -> str:
    return f"{value:.4f}" if isinstance(value, int | float) else ""


def _reproduction(folder: RunFolder, summary: Mapping[str, Any], about: Exported) -> str:
    from zofed.core import journal

    head = summary.get("journal_head") or journal.read(folder.journal).head.hex()
    used = {**versions(), **(summary.get("versions") or {})}
    lines = [
        f"- journal: head {code(head)}, {about.round:,} rounds",
        f"- weights at the end: SHA-256 {code(about.digest)}",
        f"- versions: {', '.join(f'{name} {one_line(str(found))}' for name, found in used.items())}",
        "- `zofed journal replay RUN`, RUN being the run's folder, rebuilds them from the base and the journal and "
        "compares the digests.",
    ]
    if about.kind != "merged":
        lines.append("- The digest is of the model that the run ended with; the base with this adapter comes near it.")
    return "\n".join(lines)
