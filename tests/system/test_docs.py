"""What the documentation shows is true: commands, options, settings, files, links and code.

Every command of a block is run where that takes seconds and needs nothing from elsewhere, made small first; all others
are parsed by the command line they belong to. `not_run` decides which, from the command alone.
"""

import argparse
import ast
import builtins
import functools
import glob
import importlib
import os
import re
import shlex
import shutil
import sys
import textwrap
import tomllib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields
from itertools import pairwise
from pathlib import Path
from typing import Any, get_args

import click
import pytest
import torch
import typer
import yaml
from flwr.cli.app import app as flwr_app
from torch import nn
from transformers import BertConfig, BertModel

import zofed
from zofed import config
from zofed.base.errors import UserError
from zofed.commands import cli, console
from zofed.commands.quickstart import TASK
from zofed.config import SETTINGS, Settings, task_files
from zofed.data import catalog, encoding
from zofed.experiments import sweep_file
from zofed.federated import client, policy, server, traffic, wire
from zofed.federated.local_grid import LocalGrid
from zofed.federated.protocol import Reason
from zofed.runs import run_folder
from zofed.training import central, own_settings

Zofed = Callable[..., tuple[int, str, str]]

ROOT = Path(zofed.__file__).parent.parent
GUIDES = ("README.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md")))
PAGES = (*GUIDES, "CONTRIBUTING.md", "SECURITY.md")
LANGUAGES = {"bash", "sh", "python", "toml", "text", "json", ""}  # none: something that a command printed

# Why a command of zofed is parsed only. Each must be shown somewhere and exist.
TOO_MUCH = {
    "quickstart": "takes minutes and Ray",
    "superlink": "serves until it is stopped",
    "supernode": "serves until it is stopped",
    "worker": "serves until it is stopped",
    "run": "needs a SuperLink with nodes",
    "sweep": "takes minutes, but for --dry-run",
    "tune": "takes several runs",
    "data download": "needs the network",
    "models download": "needs the network",
}
INSTALLS = "--install-completion"
# Commands of others that blocks show, and their options in the text. Each must be shown somewhere.
OF_OTHERS = {"pip", "source", "scp", "lm_eval", "ray", "docker"}
OPTIONS_OF_OTHERS = {"--no-deps", "--extra-index-url"}
# Words with hyphens in backticks that neither zofed's code nor a program of these knows. Each must be shown somewhere.
WORDS_OF_OTHERS = {"all-linear", "ssh-keygen", "sint64", "systemd-analyze"}

SMALL = {
    "steps": "2", "rounds": "2", "queries": "2", "batch-size": "2", "block-size": "16", "eval-examples": "8",
    "save-interval": "1", "subspace-interval": "1", "subspace-size": "64", "device": "cpu",
}  # fmt: skip
AT_MOST = {"local-steps": 2}
# Pages whose tables have the names of other projects but in the last column.
OF_OTHER_PROJECTS = ("docs/coming-from.md", "docs/flowertune.md")
PRINTED = re.compile(r"^\s*(```+)[^\n]*\n.*?^\s*\1\s*$", re.MULTILINE | re.DOTALL)


# --- reading pages ---


@dataclass(frozen=True)
class Block:
    """A fenced block: where its first line stands, its language and its text, as if it were not indented."""

    page: str
    line: int
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


@dataclass(frozen=True)
class Command:
    """One command of a block: its words, and the file its output goes to, or none."""

    place: str
    words: tuple[str, ...]
    into: str = ""

    def __str__(self) -> str:
        return f"{self.place}: {shlex.join(self.words)}"


@functools.cache
def text_of(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def blocks(page: str, *languages: str) -> list[Block]:
    """The fenced blocks of a page, of these languages, or all."""
    return blocks_of(page, text_of(page), *languages)


def blocks_of(page: str, text: str, *languages: str) -> list[Block]:
    found: list[Block] = []
    fence, start, language, lines = "", 0, "", list[str]()
    for number, line in enumerate(text.splitlines(), 1):
        mark = re.match(r"\s*(```+)\s*(\S*)", line)
        if fence:
            if mark and mark[1] == fence and not mark[2]:
                found.append(Block(page, start, language, textwrap.dedent("\n".join(lines)) + "\n"))
                fence = ""
            else:
                lines.append(line)
        elif mark:
            fence, language, start, lines = mark[1], mark[2], number + 1, []
    assert not fence, f"{page}:{start}: a block that does not end"
    return [block for block in found if not languages or block.language in languages]


def commands(block: Block) -> list[Command]:
    """The commands of a block, one after the other, without comments, redirections, `sudo` and variables set."""
    found: list[Command] = []
    text = block.text.replace("\\\n", " ")
    for line in text.splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars="&|;>")
        lexer.whitespace_split = True
        words, into, waits = list[str](), "", False
        for word in [*lexer, ";"]:
            if word in ("&&", "|", ";", "||"):
                if words := without_prefix(words):
                    found.append(Command(str(block), tuple(words), into))
                words, into = [], ""
            elif word in (">", ">>"):
                waits = True
            elif waits:
                into, waits = word, False
            else:
                words.append(word)
    return found


def without_prefix(words: list[str]) -> list[str]:
    if words[:1] == ["sudo"]:
        words = words[3:] if words[1:2] == ["-u"] else words[1:]
    while words and re.match(r"[A-Z_]+=", words[0]):
        words = words[1:]
    return [Path(words[0]).name, *words[1:]] if words and words[0].startswith("/") else words


def shown(pages: tuple[str, ...] = PAGES) -> list[Command]:
    return [command for page in pages for block in blocks(page, "bash", "sh") for command in commands(block)]


def spans(page: str) -> list[str]:
    """What stands in backticks outside blocks, in one line each."""
    return spans_of(page, text_of(page))


def spans_of(page: str, text: str) -> list[str]:
    text = PRINTED.sub("\n\n", text)
    if page in OF_OTHER_PROJECTS:
        text = "\n\n".join(line.split("|")[-2] for line in text.splitlines() if line.startswith("|"))
    found: list[str] = []
    for paragraph in re.split(r"\n\s*\n|\n(?=\s*[-|*] )|\n(?=\|)", text):
        found += [" ".join(span.split()) for span in re.findall(r"(?<!`)`([^`]+)`(?!`)", paragraph)]
    return found


# --- the command lines ---


@dataclass(frozen=True)
class Parsed:
    """Which command was meant ('data merge'), and the values of its parameters by name."""

    name: str
    values: dict[str, Any]


@functools.cache
def command_line(of: str) -> Any:
    return typer.main.get_command({"zofed": cli.app, "flwr": flwr_app}[of])


def parse(words: tuple[str, ...], *, whole: bool = True) -> Parsed:
    """What the command line makes of words, without running anything; settings are checked too.

    whole: values and arguments must be there. Raises click.ClickException or UserError.
    """
    # The option that would write into the home of whoever runs this is known to be there, and left out.
    command, rest, context = command_line(words[0]), [word for word in words[1:] if word != INSTALLS], None
    assert INSTALLS in {option for parameter in command.params for option in parameter.opts} or words[0] != "zofed"
    names: list[str] = []
    while True:
        try:
            context = command.make_context(command.name or words[0], rest, parent=context)
        except (click.MissingParameter, click.BadOptionUsage, click.exceptions.NoArgsIsHelpError):
            if whole:
                raise
            return Parsed(" ".join(names), {})
        except click.exceptions.Exit:  # --help
            return Parsed(" ".join(names), {})
        except click.BadParameter:
            if not any(map(is_placeholder, words)):
                raise
            return Parsed(" ".join(names), {})
        rest = [*getattr(context, "_protected_args", []), *context.args]
        if not isinstance(command, click.Group) or not rest:
            break
        name, chosen, rest = command.resolve_command(context, rest)
        assert name is not None and chosen is not None
        names.append(name)
        command = chosen
    values = dict(context.params)
    given = {key.replace("_", "-"): value for key, value in values.items() if key in Settings.model_fields}
    if words[0] == "zofed" and set(given) == set(SETTINGS):
        typed = {key: value for key, value in given.items() if value is not None}
        stated = {key: value for key, value in typed.items() if not is_placeholder(value)}
        config.resolve({key: value for key, value in stated.items() if not is_own_task(key, value)})
    return Parsed(" ".join(names), values)


def is_placeholder(word: str) -> bool:
    """FOLDER, OWNER/NAME, ...: what a reader is to replace."""
    return bool(re.fullmatch(r"[A-Z][A-Z_./-]+|\.\.\.|…", word))


def is_own_task(key: str, value: str) -> bool:
    """A task file that a reader is to write."""
    return key == "task" and value.endswith(task_files.SUFFIX)


def check(words: tuple[str, ...], *, whole: bool = True) -> None:
    """Raise where a command is none that anybody could run here: AssertionError, click.ClickException, UserError."""
    program = words[0]
    if program == "zofed":
        parse(words, whole=whole)
    elif program == "flwr":
        values = parse(words, whole=whole).values
        given = pairs(" ".join(values.get("run_config_overrides") or ()))
        own_settings.of(given.pop("zofed", {}), "Net")  # of an app of a person's own
        config.resolve(given)
    elif program == "make":
        targets = re.findall(r"^([a-z-]+):", text_of("Makefile"), re.MULTILINE)
        assert all(word in targets or "=" in word for word in words[1:]), f"make has {targets}"
    elif program == "python":
        check_python(words[1:])
    elif program == "pytest":
        files = [word for word in words[1:] if word.endswith(".py")]
        assert all((ROOT / file).is_file() for file in files), f"{files}: no such test"
    elif program in flower_programs():
        flower_programs()[program](words[1:])
    else:
        assert program in OF_OTHERS, f"{program}: neither zofed's nor known to this test as somebody else's"


def check_python(words: tuple[str, ...]) -> None:
    if words[0] == "-c":
        ast.parse(words[1])
    elif words[0] == "-m":
        path = ROOT / words[1].replace(".", "/")
        assert path.with_suffix(".py").is_file() or path.is_dir(), f"no module {words[1]}"
        if words[1] == "benchmarks" and len(words) > 2:
            assert f'"{words[2]}"' in text_of("benchmarks/__main__.py"), f"benchmarks has no {words[2]}"
    else:
        assert (ROOT / words[0]).is_file(), f"no script {words[0]}"


def pairs(text: str) -> dict[str, Any]:
    """Flower's `key=value key="value"`."""
    return tomllib.loads("\n".join(re.findall(r'[\w.-]+=(?:"[^"]*"|\S+)', text)))


@functools.cache
def flower_programs() -> dict[str, Callable[[tuple[str, ...]], None]]:
    """How the words of Flower's programs that have a parser of argparse are parsed."""

    def parsed_by(parser: argparse.ArgumentParser) -> Callable[[tuple[str, ...]], None]:
        def run(words: tuple[str, ...]) -> None:
            try:
                parser.parse_args(list(words))
            except SystemExit as error:
                raise AssertionError(f"{parser.prog} does not take {words}") from error

        return run

    return {name: parsed_by(parser) for name, parser in flower_parsers().items()}


def flower_parsers() -> dict[str, argparse.ArgumentParser]:
    node = importlib.import_module("flwr.supernode.cli.flower_supernode")
    link = importlib.import_module("flwr.superlink.cli.flower_superlink")
    return {
        "flower-supernode": node._parse_args_run_supernode(),
        "flower-superlink": link._parse_args_run_superlink(),
    }


@functools.cache
def options_there_are() -> set[str]:
    """Every option of every command of zofed, of flwr, and of Flower's nodes."""
    found: set[str] = set()
    waiting: list[click.Command] = [command_line("zofed"), command_line("flwr")]
    while waiting:
        command = waiting.pop()
        found |= {option for parameter in command.params for option in parameter.opts}
        if isinstance(command, click.Group):
            context = click.Context(command)
            waiting += filter(None, (command.get_command(context, name) for name in command.list_commands(context)))
    for parser in flower_parsers().values():
        found |= set(parser._option_string_actions)
    return found | {"--help"}


@functools.cache
def names_there_are() -> set[str]:
    """Commands, choices of settings, data sets, tasks, programs of Flower, and every word of zofed's own files."""
    found = {name for field in SETTINGS.values() for name in get_args(field.annotation) if isinstance(name, str)}
    found |= {option.removeprefix("--") for option in options_there_are()} | set(catalog.CATALOG)
    found |= {*sweep_file.names(), *task_files.names(), *policy.LINES}
    found |= {path.name for path in Path(sys.executable).parent.glob("flw*")}
    for folder, pattern in (("zofed", "*.py"), ("deploy", "*"), ("tests", "test_proxy.py")):
        for path in filter(Path.is_file, (ROOT / folder).rglob(pattern)):
            found |= set(re.findall(r"[A-Za-z][\w-]*\w", path.read_text(encoding="utf-8")))
    return found


# --- commands ---


@pytest.mark.parametrize("page", PAGES)
def test_every_command_is_parsed_by_what_it_belongs_to(page: str) -> None:
    for block in blocks(page, "bash", "sh"):
        for command in commands(block):
            try:
                check(command.words)
            except (AssertionError, click.ClickException, UserError) as error:
                told = error.format_message() if isinstance(error, click.ClickException) else error
                pytest.fail(f"{command}\n{told}")


@pytest.mark.parametrize("page", PAGES)
def test_every_command_in_the_text_is_one(page: str) -> None:
    for span in spans(page):
        usage = re.sub(r"\[[^]]*\]", "", span)  # [SETTINGS.toml] may be left out
        program, *rest = usage.split() or [""]
        if program not in ("zofed", "flwr", "make", "pytest", "python") or not rest or "|" in usage:
            continue
        try:
            check(tuple(shlex.split(usage)), whole=False)
        except (AssertionError, click.ClickException, UserError) as error:
            told = error.format_message() if isinstance(error, click.ClickException) else error
            pytest.fail(f"{page}: `{span}`\n{told}")


@pytest.mark.parametrize(
    "line",
    [
        "zofed trian",
        "zofed data lst",
        "zofed train --learning-rat 1",
        "zofed train --mode forward",
        "zofed train --epsilon 7",
        "zofed data merge one --sed 3",
        "zofed models --model",
        "zofed train --mode fo --objective f1",
        "flwr run . --run-config 'round=20'",
        "flwr run . --steam",
        "flower-supernode --insecre",
        "make runn",
        "python -m benchmarks nothing",
        "python -m benchmark",
        "python examples/none.py",
        "pytest tests/test_none.py",
        "zofd train",
    ],
)
def test_a_command_that_does_not_exist_is_found_out(line: str) -> None:
    block = Block("page", 1, "bash", f"true_comment=1 {line}  # told\n")
    (command,) = commands(block)
    with pytest.raises((AssertionError, click.ClickException, UserError)):
        check(command.words)


def test_blocks_are_cut_into_the_commands_a_shell_would_run() -> None:
    lines = "zofed train \\\n    --steps 3 && A=1 zofed eval 'a b' > file  # why\n"
    page = "text\n\n- point\n\n" + textwrap.indent(f"```bash\n{lines}```\n", "    ")
    (block,) = blocks_of("page", page)
    assert (block.line, block.language) == (6, "bash")
    one, two = commands(block)
    assert one.words == ("zofed", "train", "--steps", "3") and not one.into
    assert two.words == ("zofed", "eval", "a b") and two.into == "file"


def test_what_this_test_lists_is_shown_somewhere() -> None:
    names = {parse(command.words).name for command in shown() if command.words[0] == "zofed"}
    in_text = " ".join(span for page in PAGES for span in spans(page))
    assert [name for name in TOO_MUCH if name not in names and f"zofed {name}" not in in_text] == []
    programs = {command.words[0] for command in shown()}
    assert sorted(OF_OTHERS - programs) == [], "no block shows these commands any more: take them off OF_OTHERS"
    words = " ".join([in_text, *(" ".join(command.words) for command in shown())])
    stale = [word for word in (*OPTIONS_OF_OTHERS, *WORDS_OF_OTHERS) if word not in words]
    assert stale == [], "no page shows these any more: take them off the lists of others"


def not_run(command: Command, folder: Path) -> str:
    """Why a command is not run in `folder`, or empty where it is."""
    if command.words[0] != "zofed":
        return "not a command of zofed"
    parsed = parse(command.words)
    values = {key.replace("_", "-"): value for key, value in parsed.values.items() if value not in (None, (), [])}
    if parsed.name in TOO_MUCH and not values.get("dry-run"):
        return TOO_MUCH[parsed.name]
    if values.get("model", "tiny") not in ("tiny", "FOLDER") and not is_run(values["model"]):
        return "its model is not here, or large"
    named = [values.get(key, "") for key in ("dataset", "eval-dataset", "bp-dataset")]
    if task_files.is_file(task := values.get("task", "prompt")):
        if task not in task_files.names() and not (folder / task).exists():
            return "its file is not here"
        named[0] = named[0] or task_files.load(task).settings["dataset"]
    if parsed.name.startswith("data "):
        named += [values.get("name", ""), *values.get("names", ())]
    if parsed.name != "data show" and not all(is_here(name, folder) for name in named if name):
        return "its data are not here"
    if file := values.get("file"):
        ships = parsed.name == "sweep" and file in sweep_file.names()
        if not ships and not (folder / file).exists():
            return "its file is not here"
    if "cuda" in f"{values.get('device')}{values.get('devices')}":
        return "it takes a GPU"
    if values.get("devices"):
        return "it starts processes"
    if values.get("push"):
        return "it uploads"
    if values.get("chat"):
        return "it reads what is typed"
    if str(values.get("out", "")).startswith("/"):
        return "it writes to a folder of its own choice"
    return ""


def is_here(dataset: str, folder: Path) -> bool:
    """Whether a data set ships, or lies in a working folder."""
    known = catalog.CATALOG.get(dataset)
    return (known is not None and not known.repository) or any(
        (place / dataset).exists() for place in (folder, folder / "datasets_subset")
    )


def is_run(path: str) -> bool:
    return path.startswith("runs/")


@dataclass(frozen=True)
class Finished:
    """Folders for commands that read what they did not make: a run, a federated one, a folder of two runs, and one of
    a LoRA on prompts."""

    run: Path
    federated: Path
    several: Path
    prompted: Path

    def for_command(self, name: str, values: Mapping[str, object]) -> Path:
        if name == "plot federated":
            return self.federated
        if name == "plot scores" or (name == "export" and values.get("is_adapter")):
            return self.prompted
        return self.several if name in ("report", "plot sweep", "plot zo", "plot fo-vs-zo") else self.run


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """Runs of two steps."""
    folder = tmp_path_factory.mktemp("docs")
    found = Finished(folder / "several/zo", folder / "federated", folder / "several", folder / "prompted")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ZOFED_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
        for mode in ("zo", "fo"):
            central.train(config.resolve({**SMALL, "mode": mode}), found.several / mode, lambda row: None)
        adapted = TASK | SMALL | {"mode": "fo", "adapter": "lora", "block-size": 64, "clients": 0, "partition": "iid"}
        central.train(config.resolve(adapted), found.prompted, lambda row: None)
        settings = config.resolve({**SMALL, "clients": 2, "out": str(found.federated), "controls": True})
        server.run(LocalGrid(client.app, 2, settings.model_dump(by_alias=True)), settings, "")
    return found


@pytest.fixture(scope="session")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What FOLDER stands for: a tiny encoder of random weights, saved with its tokenizer."""
    folder = tmp_path_factory.mktemp("encoder")
    shape = {"vocab_size": 512, "hidden_size": 16, "intermediate_size": 24, "max_position_embeddings": 64}
    with torch.random.fork_rng():
        BertModel(BertConfig(num_hidden_layers=1, num_attention_heads=2, **shape)).save_pretrained(folder)
    encoding.load_tokenizer("shipped").save_pretrained(folder)
    return folder


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty working folder."""
    monkeypatch.delenv("ZOFED_DATA", raising=False)
    monkeypatch.chdir(tmp_path)
    yield tmp_path


def made_small(command: Command, folder: Path, finished: Finished, encoder: Path) -> list[str]:
    """The words to run: the command's own, at a size that takes a second, with the runs it reads put in place."""
    parsed = parse(command.words)
    if (out := str(parsed.values.get("out") or "")) not in ("", ".") and (folder / out).is_dir():
        shutil.rmtree(folder / out)  # of an earlier block, which began in the same way
    words: list[str] = []
    for before, word in zip(("", *command.words), command.words, strict=False):
        if is_run(word) and before != "--out":
            if "*" not in word and not (folder / word).exists():
                shutil.copytree(finished.for_command(parsed.name, parsed.values), folder / word.removesuffix("/model"))
            words += sorted(glob.glob(word)) if "*" in word else [word]
        else:
            words.append(str(encoder) if word == "FOLDER" else word)
    has_settings = set(SETTINGS) <= {key.replace("_", "-") for key in parsed.values}
    if not has_settings or parsed.values.get("resume") or parsed.name == "sweep":
        return words[1:]
    small = {"eval-examples": "8"} if parsed.name == "eval" else SMALL
    small = small | ({"model": "tiny"} if parsed.name == "models" else {})
    for key, most in AT_MOST.items():
        if (typed := parsed.values[key.replace("-", "_")]) is not None:
            small = small | {key: str(min(int(typed), most))}
    ways = {"train": config.CENTRAL, "simulate": config.FEDERATED, "run": config.FEDERATED}
    ways["check"] = config.FEDERATED if parsed.values.get("clients") else ""
    if parsed.name in ways:  # what has no effect there is refused
        run = ways[parsed.name]
        typed = {key.replace("_", "-"): value for key, value in parsed.values.items() if value is not None}
        settings = config.resolve({key: value for key, value in (typed | small).items() if key in SETTINGS})
        small = {key: value for key, value in small.items() if not config.without_effect(settings, [key], run)}
    return [*words[1:], *(part for key, value in small.items() for part in (f"--{key}", value))]


RUN: dict[str, list[str]] = {}  # page -> names of the commands that were run


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES)
def test_commands_that_can_be_run_are(
    page: str, bench: Path, finished: Finished, encoder: Path, zofed_command: Zofed
) -> None:
    RUN[page] = []
    seen: set[tuple[str, ...]] = set()
    for block in blocks(page, "bash", "sh"):
        for command in commands(block):
            if command.words not in seen and not not_run(command, bench):
                seen.add(command.words)
                words = made_small(command, bench, finished, encoder)
                status, out, errors = zofed_command(*words)
                assert status == 0, f"{command}\nrun as zofed {shlex.join(words)}\n{out}{errors}"
                RUN[page].append(parse(command.words).name)
                if command.into:
                    (bench / command.into).write_text(out, encoding="utf-8")


@pytest.mark.slow
def test_each_command_that_is_not_too_much_was_run_somewhere() -> None:
    if set(RUN) != set(PAGES):
        pytest.skip("some pages were not run in this process")
    names = {parse(command.words).name for command in shown() if command.words[0] == "zofed"}
    assert names - set(TOO_MUCH) <= {name for page in RUN.values() for name in page}


# --- settings, options and names in the text ---


def wrong_name(span: str) -> str:
    """What is wrong with a span that looks like an option, a setting with its value or a name with a hyphen."""
    if span.startswith("--"):
        words = span.split()
        for word in words:
            name = word.split("=")[0]
            if name.startswith("--") and name not in options_there_are() | OPTIONS_OF_OTHERS:
                return f"no command has the option {name}"
        for name, value in pairwise(words):
            key = name.removeprefix("--")
            if name.startswith("--") and key in SETTINGS and not value.startswith("--") and not is_placeholder(value):
                return wrong_value(key, value)
        return ""
    if pair := re.fullmatch(r"([a-z][a-z0-9-]*) = (\S+)", span):
        return wrong_value(pair[1], pair[2].strip("\"'"))
    if re.fullmatch(r"[a-z][a-z0-9]*(-[a-z0-9]+)+", span) and span not in names_there_are() | WORDS_OF_OTHERS:
        return f"nothing is called {span}"
    return ""


def wrong_value(key: str, value: str) -> str:
    if key in policy.LINES and key not in SETTINGS:  # its own tests say which values
        return ""
    if key not in SETTINGS:
        return f"no setting is called {key}"
    if is_placeholder(value):
        return ""
    if is_own_task(key, value) or (key == "task" and value in task_files.names()):
        return ""
    try:
        Settings.model_validate({key: value})  # what other settings must be beside it, the sentence says
    except ValueError as error:
        return f"{key} = {value}: {error}"
    return ""


@pytest.mark.parametrize("page", PAGES)
def test_options_settings_and_names_in_the_text_exist(page: str) -> None:
    wrong = [f"`{span}`: {told}" for span in spans(page) if (told := wrong_name(span))]
    assert not wrong, f"{page}: " + "; ".join(wrong)


@pytest.mark.parametrize(
    "span",
    [
        "--learning-rat",
        "--mode forward",
        "--queries many",
        "learning-rat = 3",
        "merge = meen",
        "learning-rat",
        "zo-dta",
    ],
)
def test_a_name_that_does_not_exist_is_found_out(span: str) -> None:
    assert wrong_name(span)


@pytest.mark.parametrize("page", PAGES)
def test_tables_of_settings_name_settings(page: str) -> None:
    lines = PRINTED.sub("", text_of(page)).splitlines()
    in_table = False
    for before, line in zip(["", *lines], lines, strict=False):
        if line.startswith("| ---"):
            in_table = before.split("|")[1].strip() == "setting"
        in_table = in_table and line.startswith("|")
        if in_table and (named := re.findall(r"`([^`]+)`", line.split("|")[1])):
            assert set(named) <= set(SETTINGS), f"{page}: {line}"


@pytest.mark.parametrize("page", PAGES)
def test_blocks_of_toml_are_settings_or_sweeps(page: str, tmp_path: Path) -> None:
    for block in blocks(page, "toml"):
        check_toml(block, tmp_path)


def check_toml(block: Block, folder: Path) -> None:
    found = tomllib.loads(block.text)
    if {"base", "grid", "runs", "tune", "leave-out", "scale", "merge"} & set(found) and not set(found) & {"superlink"}:
        (folder / "sweep.toml").write_text(block.text)
        sweep_file.read(folder / "sweep.toml")
    elif set(found) <= set(policy.LINES) and "folders" in found:
        (folder / "policy.toml").write_text(block.text)
        policy.read(folder / "policy.toml")
    elif "about" in found:
        (folder / "task.toml").write_text(block.text)
        task_files.load(str(folder / "task.toml"))
    elif not any(isinstance(value, dict) for value in found.values()):
        config.resolve(found)


@pytest.mark.parametrize("text", ["steps = \n", "step = 3\n", "[grid]\nquery = [1]\n", "mode = 'first'\n"])
def test_a_wrong_block_of_toml_is_found_out(text: str, tmp_path: Path) -> None:
    with pytest.raises((UserError, tomllib.TOMLDecodeError)):
        check_toml(Block("page", 1, "toml", text), tmp_path)


def test_every_block_has_a_language_this_test_knows() -> None:
    found = {block.language: str(block) for page in PAGES for block in blocks(page)}
    assert set(found) <= LANGUAGES, found


# --- links and files ---


LINK = re.compile(r"!?\[[^]]*\]\(([^)\s]+)\)")


def anchors(page: str) -> set[str]:
    """The headings of a page as links name them."""
    text = PRINTED.sub("", text_of(page))
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading).strip().lower().replace(" ", "-") for heading in headings}


def wrong_link(page: str, target: str) -> str:
    if re.match(r"\w+:", target):
        return ""
    path, _, anchor = target.partition("#")
    file = (ROOT / page).parent / path if path else ROOT / page
    if file == ROOT / "docs/settings.md":
        return ""  # made by the site's hooks
    if not file.exists():
        return f"{target} does not exist"
    inside = os.path.relpath(file, ROOT)
    return "" if not anchor or anchor in anchors(inside) else f"{target}: no such heading"


@pytest.mark.parametrize("page", (*PAGES, "CHANGELOG.md", "benchmarks/RESULTS.md"))
def test_links_lead_somewhere(page: str) -> None:
    wrong = [told for target in LINK.findall(PRINTED.sub("", text_of(page))) if (told := wrong_link(page, target))]
    assert not wrong, f"{page}: {wrong}"


@pytest.mark.parametrize("target", ["docs/none.md", "docs/data.md#no-such-heading", "#no-such-heading"])
def test_a_link_that_leads_nowhere_is_found_out(target: str) -> None:
    assert wrong_link("README.md", target)
    assert not wrong_link("README.md", "docs/data.md#who-holds-what-in-a-federation")


SUFFIXES = r"md|py|toml|conf|service|env|csv|jsonl?|png|svg|zofed|safetensors|yml"


def wrong_file(span: str, words: str) -> str:
    """What is wrong with a span that names a file: it is neither in the repository nor written by zofed's code."""
    if not re.fullmatch(rf"[\w./@*-]+\.({SUFFIXES})|[\w.-]+/([\w./-]+)?", span) or span.startswith(
        ("/", "./", "runs/")
    ):
        return ""
    top = {path.name for path in ROOT.iterdir()}
    if span.split("/")[0] in top and "/" in span and not glob.glob(str(ROOT / span)):
        return f"{span} does not exist"
    if "/" in span:
        return ""
    places = (ROOT, ROOT / "zofed", *(ROOT / "zofed").glob("*/"), ROOT / "docs", ROOT / "tests", ROOT / "benchmarks")
    if any(glob.glob(str(place / span)) for place in places) or span in words:
        return ""
    return f"{span} is neither in the repository nor named in the code"


@functools.cache
def code() -> str:
    """The text of zofed's modules, of what may be deployed, and of blocks in pages, which may write files."""
    parts = [path.read_text(encoding="utf-8") for path in (ROOT / "zofed").rglob("*.py")]
    parts += [path.read_text(encoding="utf-8") for path in (ROOT / "deploy").iterdir()]
    return "\n".join([*parts, *(block.text for page in PAGES for block in blocks(page, "bash", "sh", "python"))])


@pytest.mark.parametrize("page", PAGES)
def test_files_named_in_the_text_exist(page: str) -> None:
    wrong = [told for span in spans(page) if (told := wrong_file(span, code()))]
    assert not wrong, f"{page}: {wrong}"


@pytest.mark.parametrize("span", ["tests/test_none.py", "none.py", "zofed/none.py", "docs/none/", "sumary.json"])
def test_a_file_that_does_not_exist_is_found_out(span: str) -> None:
    assert wrong_file(span, code())


def entries(nav: Any) -> list[str]:
    """All pages that the site's table of contents names."""
    if isinstance(nav, str):
        return [nav]
    parts = nav.values() if isinstance(nav, dict) else nav
    return [page for part in parts for page in entries(part)]


def test_the_site_has_every_page_once() -> None:
    named = entries(yaml.safe_load(text_of("mkdocs.yml"))["nav"])
    assert len(named) == len(set(named))
    assert {page.removeprefix("docs/") for page in GUIDES} - {"README.md"} <= set(named)
    for page in named:
        assert page == "settings.md" or (ROOT / "docs" / page).is_file() or (ROOT / page).is_file(), page


def test_links_of_the_site_lead_to_pages_without_a_server() -> None:
    assert yaml.safe_load(text_of("mkdocs.yml"))["use_directory_urls"] is False  # else they lead to folders


def test_the_site_builds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("mkdocs", "mkdocstrings"):
        pytest.importorskip(name, reason=f"{name} is not installed: make docs installs it")
    from mkdocs.commands.build import build
    from mkdocs.config import load_config

    monkeypatch.chdir(ROOT)
    build(load_config(str(ROOT / "mkdocs.yml"), site_dir=str(tmp_path / "site"), strict=True))
    settings = (tmp_path / "site/settings.html").read_text(encoding="utf-8")
    assert all(f"<code>{key}</code>" in settings for key in SETTINGS)
    assert (tmp_path / "site/benchmarks/RESULTS.html").is_file()
    api = (tmp_path / "site/api.html").read_text(encoding="utf-8")
    assert all(f'id="{path}"' in api for path in described())


def described() -> list[str]:
    """What the page of the Python API has signature and docstring of."""
    return re.findall(r"^::: (\S+)$", text_of("docs/api.md"), re.MULTILINE)


def test_the_page_of_the_api_has_every_public_name() -> None:
    for name, home in zofed._HOMES.items():
        assert f"\n### `zofed.{name}`\n\n::: zofed.{home}.{name}\n" in text_of("docs/api.md"), name


def test_the_page_of_the_api_describes_what_there_is() -> None:
    for path in described():
        module, _, name = path.rpartition(".")
        assert getattr(importlib.import_module(module), name).__doc__, path


def test_the_picture_of_the_packages_has_the_layers_of_the_contract() -> None:
    contracts = tomllib.loads(text_of("pyproject.toml"))["tool"]["importlinter"]["contracts"]
    layers = [re.findall(r"zofed\.(\w+)", layer) for layer in contracts[0]["layers"]]
    drawn = re.search(r'<g font-weight="bold">(.*?)</g>', text_of("docs/packages.svg"), re.DOTALL)
    assert drawn
    rows: dict[str, list[str]] = {}
    for y, name in re.findall(r'y="(\d+)">(\w+)<', drawn[1]):
        rows.setdefault(y, []).append(name)
    assert [rows[y] for y in sorted(rows, key=int)] == layers


# --- code ---


def given() -> dict[str, Any]:
    """What blocks of Python may use without having made it."""

    def net() -> nn.Module:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))

    generator = torch.Generator().manual_seed(0)
    pairs = [(torch.randn(3, 4, generator=generator), torch.randn(3, 2, generator=generator)) for _ in range(2)]
    return {
        "zofed": zofed, "model": net(), "untrained_copy": net(), "x": pairs[0][0], "y": pairs[0][1], "batches": pairs,
        "loss_function": nn.functional.mse_loss,
    }  # fmt: skip


def free_names(tree: ast.Module) -> set[str]:
    """Names a block uses and does not make."""
    names = [node for node in ast.walk(tree) if isinstance(node, ast.Name)]
    made = {node.id for node in names if not isinstance(node.ctx, ast.Load)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            made |= {(alias.asname or alias.name).split(".")[0] for alias in node.names}
        elif isinstance(node, ast.FunctionDef | ast.ClassDef):
            made.add(node.name)
        elif isinstance(node, ast.arg):
            made.add(node.arg)
    return {node.id for node in names if isinstance(node.ctx, ast.Load)} - made - set(dir(builtins))


def check_names_of_zofed(tree: ast.Module) -> None:
    """Whatever a block takes from zofed is there."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "zofed":
            getattr(zofed, node.attr)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "zofed":
            module = importlib.import_module(node.module or "")
            for alias in node.names:
                if not hasattr(module, alias.name):
                    importlib.import_module(f"{node.module}.{alias.name}")


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES)
def test_blocks_of_python_compile_and_run_where_they_can(
    page: str, bench: Path, finished: Finished, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(finished.run, bench / "runs/zo")
    for block in blocks(page, "python"):
        tree = ast.parse(block.text.replace('"20M"', '"tiny"'), str(block))
        check_names_of_zofed(tree)
        names = given()
        if free_names(tree) <= set(names):
            for old in bench.glob("*.zofed"):
                old.unlink()  # of another block, with another model
            exec(compile(tree, str(block), "exec"), names)
            assert (
                "model" not in names or not isinstance(names.get("zo"), zofed.ZerothOrder) or names["zo"].replica.round
            )


def test_names_given_to_blocks_are_used() -> None:
    used = {name for page in PAGES for block in blocks(page, "python") for name in free_names(ast.parse(block.text))}
    assert set(given()) <= used


def test_code_that_names_nothing_is_found_out() -> None:
    for text in (
        "import zofed\nzofed.nothing()",
        "from zofed.runs.run_folder import Nothing",
        "from zofed import nothing",
    ):
        with pytest.raises((AttributeError, ImportError)):
            check_names_of_zofed(ast.parse(text))


# --- what the pages say of formats ---


def in_backticks(page: str) -> set[str]:
    return set(spans(page))


@pytest.mark.slow
def test_the_page_of_formats_names_every_column_key_and_file(finished: Finished) -> None:
    named = in_backticks("docs/formats.md")
    tables = (run_folder.METRICS, run_folder.EVALUATIONS, traffic.ROUNDS, traffic.CLIENTS, traffic.EVALUATIONS)
    assert {column for table in tables for column in table} <= named
    for folder in (finished.run, finished.federated):
        assert set(run_folder.RunFolder.open(folder).summary()) <= named
        assert {path.name + "/" * path.is_dir() for path in folder.iterdir()} - {"checkpoints/"} <= named


def test_the_page_of_formats_has_the_fields_of_every_message() -> None:
    rows = re.findall(r"^\| (\d) \| (\w+) \| (?:client|server) \| (.*) \|$", text_of("docs/formats.md"), re.MULTILINE)
    assert [(int(number), name) for number, name, _ in rows] == [
        (at, kind.__name__) for at, kind in enumerate(wire.KINDS)
    ]
    for (_, name, told), kind in zip(rows, wire.KINDS, strict=True):
        names = [field.name for field in fields(kind)]
        if name == "Contribution":
            told, names = told.removeprefix("the first ten of an answer, "), names[10:]
        assert told.split(", ") == names


def test_the_page_of_federations_has_every_reason() -> None:
    assert set(get_args(Reason)) <= in_backticks("docs/federation.md")


def test_what_a_run_says_it_leaves_is_explained() -> None:
    assert set(console.CONTENTS) <= {span.rstrip("/") for span in in_backticks("docs/formats.md")} | {"checkpoints"}
