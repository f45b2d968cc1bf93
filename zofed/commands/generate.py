"""`zofed generate`: what a trained model, and the one it began as, answer to prompts."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from zofed.base.errors import UserError
from zofed.base.files import write_whole
from zofed.base.parsing import from_json
from zofed.base.texts import printable
from zofed.commands.console import console
from zofed.runs.run_folder import check_is_one

if TYPE_CHECKING:
    from zofed.training.asking import Reply, Request, Speaker

QUIT = "/quit"
TOGETHER = 64  # prompts of a file that are answered before the first of them is shown
ROLES = ("system", "user", "assistant")


def register(app: typer.Typer) -> None:
    """Add the command to the command line."""
    app.command("generate")(generate)


def generate(
    model: Annotated[
        str, typer.Argument(metavar="RUN_OR_MODEL", help="a run's folder, a saved model's, or OWNER/NAME")
    ],
    prompt: Annotated[str | None, typer.Argument(help="what is asked")] = None,
    file: Annotated[
        Path | None, typer.Option("--file", help="many prompts: .txt, one a line, or .jsonl, one row a line")
    ] = None,
    chat: Annotated[bool, typer.Option("--chat", help="ask in the terminal, until /quit or the end of input")] = False,
    compare: Annotated[bool, typer.Option("--compare", help="beside a run's model the one it began as")] = False,
    plain: Annotated[bool, typer.Option("--plain", help="a saved model without its chat template")] = False,
    max_new_tokens: Annotated[
        int, typer.Option("--max-new-tokens", min=0, max=65536, help="of an answer; 0: as the run's setting says")
    ] = 0,
    out: Annotated[
        Path | None, typer.Option("--out", help="also write prompts and answers here, as JSON lines")
    ] = None,
    device: Annotated[str, typer.Option("--device", help="auto, cpu, cuda or cuda:N")] = "auto",
    threads: Annotated[int, typer.Option("--threads", min=1, help="CPU threads")] = 1,
) -> None:
    """Answer prompts, greedily: by the template that the run was trained with, or by a model's own chat template."""
    ways = [name for name, given in (("PROMPT", prompt is not None), ("--file", file), ("--chat", chat)) if given]
    if len(ways) != 1:
        told = f"{' and '.join(ways)} all say what is asked" if ways else "nothing is asked"
        raise UserError(f"{told}: give one of PROMPT, --file and --chat")
    if chat and out:
        raise UserError("--out takes the answers to PROMPT or --file: leave it out of a --chat")
    check_is_one(Path(model).expanduser())
    requests = list(_requests(file)) if file else []
    from zofed.training import asking  # torch and transformers take seconds to load: mistakes need not wait

    changes = {"device": device, "threads": threads} | ({} if device == "auto" else {"placement": "none"})
    if (Path(model).expanduser() / "settings.toml").exists():
        if plain:
            raise UserError("--plain is for a saved model: a run's prompts are those it was trained with")
        speaker = asking.of_run(Path(model).expanduser(), compare=compare, changes=changes)
    elif compare:
        raise UserError(
            f"{model} is not the folder of a run, so that what it began as is not known: leave out --compare"
        )
    else:
        speaker = asking.of_model(model, plain=plain, changes=changes)
    if chat:
        _chat(speaker, max_new_tokens)
        return
    asked = requests or [asking.Request(text=prompt or "")]
    written: list[str] = []
    for start in range(0, len(asked), TOGETHER):
        some = asked[start : start + TOGETHER]
        replies = speaker.ask(some, max_new_tokens)
        for at, request in enumerate(some):
            own = {name: found[at] for name, found in replies.items()}
            shown = speaker.rendered(request) if speaker.type.has_classes else request.shown
            if len(asked) > 1:
                console.print(f"> {printable(shown)}", markup=False)
            _show(own)
            written.append(json.dumps({"prompt": shown} | _values(own)) + "\n")
    if out:
        write_whole(out, "".join(written))


def _requests(file: Path) -> Iterator["Request"]:
    """What a file asks. Raises UserError for one that cannot be read, holds nothing, or a row that asks nothing."""
    from zofed.training.asking import Request

    try:
        lines = file.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        told = error.strerror if isinstance(error, OSError) else "it is no UTF-8"
        raise UserError(f"--file {file} cannot be read ({told}): give a .txt or .jsonl file of prompts") from error
    count = 0
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        count += 1
        place = f"line {number} of {file}"
        yield _of_row(line, place) if file.suffix == ".jsonl" else Request(text=line)
    if not count:
        raise UserError(f"--file {file} holds no prompt: write one a line")


def _of_row(line: str, place: str) -> "Request":
    from zofed.data.documents import Turn
    from zofed.training.asking import Request

    try:
        row: Any = from_json(line)
    except ValueError as error:
        raise UserError(f"{place} is no JSON: write an object, or a text in quotes") from error
    if isinstance(row, str):
        return Request(text=row)
    if not isinstance(row, dict):
        raise UserError(f"{place} is neither an object nor a text: write one of them")
    messages = row.get("messages", row.get("prompt") if isinstance(row.get("prompt"), list) else None)
    if messages is None:
        text = row.get("prompt", row.get("text", ""))
        return Request(text=text if isinstance(text, str) else "", row=row)
    turns = []
    for message in messages if isinstance(messages, list) else [None]:
        role, text = (message.get(key) for key in ("role", "content")) if isinstance(message, dict) else (None, None)
        if role not in ROLES or not isinstance(text, str):
            raise UserError(f"{place} has a message without a role ({', '.join(ROLES)}) or a content: give it both")
        turns.append(Turn(role, text))
    while turns and turns[-1].role == "assistant":  # what is asked for
        turns.pop()
    if not turns:
        raise UserError(f"{place} has no message to answer: end it with one of the user")
    return Request(turns=tuple(turns), row=row)


def _show(replies: dict[str, "Reply"]) -> None:
    """One answer as it is, so that another program can read it; several beside one another."""
    if len(replies) == 1 and (only := next(iter(replies.values()))).scores is None:
        console.print(printable_lines(only.answer), markup=False)
        if not only.is_whole:
            print("zofed: the answer was cut by max-new-tokens or the model's context", file=sys.stderr, flush=True)
        return
    if all(reply.scores is not None for reply in replies.values()):
        names = list(replies) if len(replies) > 1 else ["probability"]
        table = Table("", *names, box=None, pad_edge=False)
        for name in next(iter(replies.values())).scores or {}:
            shares = (f"{(reply.scores or {}).get(name, 0.0):.4f}" for reply in replies.values())
            table.add_row(Text(repr(name) if name != name.strip() else name), *shares)
    else:
        width = max(20, (console.width - 2) // len(replies))
        table = Table(box=None, pad_edge=False)
        for name in replies:
            table.add_column(name, width=width, overflow="fold")
        table.add_row(*(Text(printable_lines(reply.answer) + "…" * (not reply.is_whole)) for reply in replies.values()))
    console.print(table)


def printable_lines(text: str) -> str:
    """The text with its line breaks and tabs, without what else would move a terminal's cursor."""
    return "".join(c if c in "\n\t" else printable(c) for c in text)


def _values(replies: dict[str, "Reply"]) -> dict[str, Any]:
    """What a line of --out says: of one model `answer` or `scores`, of several those of each by its name."""
    found = {name: reply.answer if reply.scores is None else dict(reply.scores) for name, reply in replies.items()}
    if len(replies) > 1:
        return found
    name, reply = next(iter(replies.items()))
    return {"answer" if reply.scores is None else "scores": found[name]}


def _chat(speaker: "Speaker", max_new_tokens: int) -> None:
    """Ask line by line; where the model was trained on conversations each of the models goes on with its own.

    What cannot be answered is told, and asked no further.
    """
    from zofed.data.documents import Turn
    from zofed.training.asking import Request

    said: dict[str, list[Turn]] = {name: [] for name in speaker.models}
    for line in _lines():
        own: dict[str, Reply] = {}
        asked = Turn("user", line)
        try:
            for name in speaker.models:
                turns = (*said[name], asked) if speaker.has_turns else (asked,)
                own[name] = speaker.only(name).ask([Request(text=line, turns=turns)], max_new_tokens)[name][0]
        except UserError as error:
            print(f"zofed: {error}", file=sys.stderr, flush=True)
            continue
        for name, reply in own.items():
            said[name] += [asked, Turn("assistant", reply.answer)]
        _show(own)


def _lines() -> Iterator[str]:
    """What is typed, until /quit or the end of input; blank lines ask nothing."""
    is_typed = sys.stdin.isatty()
    if is_typed:
        console.print(f"{QUIT} or Ctrl-D ends")
    while True:
        if is_typed:
            print("> ", end="", flush=True)
        line = sys.stdin.readline()
        if not line or line.strip() == QUIT:
            return
        if line.strip():
            yield line.rstrip("\r\n")
