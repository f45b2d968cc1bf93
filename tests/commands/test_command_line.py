"""The command line answers at once: what --help, --version and completion import, what they say, what they suggest."""

import json
import os
import subprocess
import sys
from collections.abc import Callable

import click
import pytest
import typer

import zofed
from zofed.commands import cli, groups
from zofed.config import SETTINGS, names

Zofed = Callable[..., tuple[int, str, str]]
HEAVY = {"torch", "transformers", "flwr", "numpy", "matplotlib", "datasets", "safetensors", "grpc"}
RUNNER = """
import json, sys
from zofed.commands.cli import main
for line in json.loads(sys.argv[1]):
    sys.argv = ["zofed", *line]
    try:
        main()
    except SystemExit as ended:
        assert not ended.code, (line, ended.code)
print("MODULES", *{name.partition(".")[0] for name in sys.modules})
"""


def imported(*lines: list[str], **environment: str) -> tuple[set[str], str]:
    """What a fresh process holds of packages after these commands, and what they printed."""
    command = [sys.executable, "-c", RUNNER, json.dumps(lines)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ | environment)
    shown, _, names = done.stdout.rpartition("MODULES ")
    return set(names.split()), shown


def completed(words: str) -> tuple[set[str], list[str]]:
    """What bash offers after these words, and the packages that took."""
    code = "import atexit, sys; sys.argv = ['zofed']; from zofed.commands.cli import main\n"
    code += "atexit.register(lambda: print('MODULES', *{name.partition('.')[0] for name in sys.modules})); main()"
    bash = {"_ZOFED_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(words.count(" "))}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=os.environ | bash
    )
    shown, _, names = done.stdout.rpartition("MODULES ")
    return set(names.split()), shown.split()


def test_version_and_help_import_neither_the_settings_nor_anything_heavier() -> None:
    packages, shown = imported(["version"], ["--version"], ["--help"])
    assert shown.startswith(f"{zofed.__version__}\n{zofed.__version__}\nUsage: zofed ")
    assert not packages & (HEAVY | {"pydantic", "rich"})


def test_help_of_every_command_imports_nothing_heavy() -> None:
    packages, _ = imported(*([name, "--help"] for name in groups.COMMANDS))
    assert "pydantic" in packages
    assert not packages & HEAVY


def test_a_shell_completes_commands_options_and_choices() -> None:
    packages, offered = completed("zofed s")
    assert offered == ["simulate", "sweep", "settings", "superlink", "supernode"]
    assert not packages & (HEAVY | {"pydantic", "rich"})
    packages, offered = completed("zofed train --lora")
    assert offered == ["--lora-rank", "--lora-alpha", "--lora-targets"]
    assert not packages & HEAVY
    assert completed("zofed train --mode s")[1] == ["subspace"]


def test_the_lines_of_help_are_the_first_of_each_command() -> None:
    group = typer.main.get_command(cli.app)
    assert isinstance(group, groups.Grouped)
    context = click.Context(group)
    for name, (_, line) in groups.COMMANDS.items():
        command = group.get_command(context, name)
        assert command is not None and command.get_short_help_str(limit=1000) == line, name
    assert [name for name in group.commands if name not in groups.COMMANDS] == ["version"]


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("simulte", "unknown command 'simulte': did you mean 'simulate'?"),
        ("finetune", "unknown command 'finetune': did you mean zofed train?"),
        ("xyz", "unknown command 'xyz': zofed --help lists those there are"),
        ("data downlod", "unknown command 'downlod': did you mean 'download'?"),
        ("models tiny", "unknown command 'tiny': zofed models --help lists those there are"),
    ],
)
def test_an_unknown_command_is_told_what_was_meant(zofed_command: Zofed, line: str, told: str) -> None:
    assert zofed_command(*line.split()) == (2, "", f"zofed: {told}\n")


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("train --lr", "did you mean '--learning-rate'?"),
        ("train --batch_size", "did you mean '--batch-size'?"),
        ("train --LearningRate", "did you mean '--learning-rate'?"),
        ("train --per_device_train_batch_size", "did you mean '--batch-size'?"),
        ("train --num-epochs", "did you mean '--epochs'?"),
        ("train --epoch", "did you mean '--epochs'?"),
        ("train --output-dir", "did you mean '--out'?"),
        ("train --lora-r", "did you mean '--lora-rank'?"),
        ("train --zo_eps", "did you mean '--epsilon'?"),
        ("simulate --num-clients", "did you mean '--clients'?"),
        ("train --learnng-rate", "did you mean '--learning-rate'?"),
        ("train --mod", "did you mean '--mode'?"),
        ("train --resum", "did you mean '--resume'?"),
        ("train --json", "a run's folder has its figures for programs: summary.json, metrics.csv, ..."),
        ("train --version", "zofed --version tells it"),
        ("train --bf16", "dtype = bfloat16 is the type of 16 bits that there is"),
        ("train --wxyz", "zofed train --help lists those there are"),
        ("eval --resume", "zofed eval --help lists those there are"),  # another command's option
        ("report --lr", "zofed report --help lists those there are"),
    ],
)
def test_an_unknown_option_is_told_what_was_meant_and_nothing_rather_than_a_guess(
    zofed_command: Zofed, line: str, told: str
) -> None:
    option = line.split()[1]
    assert zofed_command(*line.split()) == (2, "", f"zofed: unknown option '{option}': {told}\n")


def test_every_name_of_another_project_stands_for_one_of_ours_and_is_none_itself() -> None:
    assert set(names.ELSEWHERE.values()) <= set(SETTINGS)
    assert not (set(names.ELSEWHERE) | set(names.WITHOUT)) & set(SETTINGS)
    assert not set(names.ELSEWHERE) & set(names.WITHOUT)
    count = sum(len(theirs.split()) for theirs in (*names._ELSEWHERE.values(), *names._WITHOUT))
    assert count == len(names.ELSEWHERE) + len(names.WITHOUT)  # none stands twice


@pytest.mark.parametrize("arguments", [["--memory", "download", "a/b"], ["--fits", "8", "download", "a/b"]])
def test_what_models_alone_takes_is_refused_before_download(zofed_command: Zofed, arguments: list[str]) -> None:
    status, _, errors = zofed_command("models", *arguments)
    assert (status, errors) == (2, f"zofed: {arguments[0]} is no option of zofed models download: leave it out\n")


def test_models_lists_sizes_without_watching_a_pass(zofed_command: Zofed, monkeypatch: pytest.MonkeyPatch) -> None:
    from zofed.preflight import footprint

    monkeypatch.setattr(footprint, "footprints", lambda *_: pytest.fail("a pass was watched"))
    status, out, _ = zofed_command("models")
    assert status == 0
    assert "774,030,080" in out and out.rstrip().endswith(
        "memory of a step, by mode: zofed models --memory, or with a run's settings, as --batch-size 8"
    )
