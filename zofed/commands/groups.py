"""The commands by name, under the headings of `zofed --help`; the module of each is imported when it is asked for."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

import click
import typer
import typer.core
from click.shell_completion import CompletionItem

from zofed.base import interruption
from zofed.base.errors import Interrupted

# Heading, then command: the module below zofed.commands that registers it, and its line in `zofed --help`. The line is
# the first of the command's own help, which a test compares: so that help and completion import none of the modules.
GROUPS = {
    "Train": {
        "quickstart": (
            "quickstart",
            "Adapt a small pretrained model to the reviews of 4 simulated clients by three ways, `flwr run` first.",
        ),
        "train": (
            "train",
            "Train on this machine alone: by forward passes (zo), backpropagation (fo), or both (see --mode).",
        ),
        "simulate": (
            "train",
            "Run a federation in this one process, without Ray or a SuperLink: the same apps, the same results.",
        ),
        "recipes": (
            "recipes",
            "The experiments and tasks that ship with zofed, each a TOML file to run, to read or to copy and change.",
        ),
        "copy": (
            "recipes",
            "Copy an experiment or a task that ships with zofed, to change it; nothing is overwritten.",
        ),
        "new": (
            "new",
            "Make a Flower app of your own over the zofed installed here: settings to change, shims for code.",
        ),
        "sweep": (
            "experiments",
            "Carry out many runs: what is finished is skipped, what was cut goes on, what fails is told and stops no "
            "other.",
        ),
        "tune": (
            "tune",
            "Find a setting's best value: runs at the one given, at its neighbours, then on to where the held-out loss "
            "falls.",
        ),
    },
    "Before a run": {
        "tasks": ("tasks", "Tasks by name: what they tune a model for, and a row of each as the model meets it."),
        "check": (
            "preflight",
            "Look at everything a run needs, in seconds and without writing a file: versions, data, model, memory, "
            "time.",
        ),
        "models": ("preflight", "The models there are: parameters that train by scope, memory of a step by mode."),
        "settings": ("preflight", "Print every setting with its default: a TOML file to start from."),
        "memory": (
            "preflight",
            "Memory of a zeroth-order step, and the largest perturbations-per-pass that fits a budget.",
        ),
        "diagnose": (
            "preflight",
            "Compare a model's slopes with backpropagation: which epsilon, how noisy a batch, how good the estimate.",
        ),
    },
    "Results": {
        "eval": (
            "train",
            "Score a run's model, or any saved one, on held-out text or labels, or on all of the data that --dataset "
            "names.",
        ),
        "generate": (
            "generate",
            "Answer prompts, greedily: by the template that the run was trained with, or by a model's own chat "
            "template.",
        ),
        "export": (
            "export",
            "Write a run's model, its adapter, or a LoRA of what it changed, with a model card; --push uploads them.",
        ),
        "runs": (
            "experiments",
            "The runs in a folder: mode, model, data, how far they came, what they scored and sent.",
        ),
        "watch": ("watch", "Follow a run that goes on anywhere on this machine: losses, pace, time left, how it ends."),
        "plot": ("experiments", "Pictures of runs and sweeps, read back from their folders."),
        "report": (
            "experiments",
            "One HTML page and a summary.md: what won, by how much, how surely; pictures, controls, costs, "
            "environment.",
        ),
        "journal": ("journal", "Read, check, replay and repair the journal of a run."),
    },
    "Data": {
        "data": ("data", "Find, fetch, merge and describe data sets."),
        "make-data": ("data", "Generate the tokenizer and the data that ship with zofed, the same bytes every time."),
        "make-model": (
            "data",
            "Pretrain the small model that ships with zofed (model = sample) on generated opinions, in minutes on one "
            "core.",
        ),
    },
    "Machines": {
        "keys": ("keys", "Make, renew and show the keys and certificates of a federation on separate machines."),
        "superlink": (
            "deployment",
            "Run the server that nodes and runs meet at, with TLS and node keys, until Ctrl-C.",
        ),
        "supernode": (
            "deployment",
            "Run one client, until Ctrl-C: a SuperNode and the process that computes; both are started anew if they "
            "die.",
        ),
        "policy": (
            "deployment",
            "What runs may have a node do, by a policy's file or by default: a file to start from, for supernode "
            "--policy.",
        ),
        "worker": (
            "deployment",
            "Answer a SuperNode's messages in one process that keeps the model; for flower-supernode --isolation "
            "process.",
        ),
        "run": (
            "deployment",
            "Run a federation on the nodes of a SuperLink; exits with 0 only if it completed.",
        ),
    },
}
COMMANDS = {name: found for group in GROUPS.values() for name, found in group.items()}


@contextmanager
def interruptible(told: Callable[[], str]) -> Iterator[None]:
    """Raise Interrupted, with what is told, where a Ctrl-C or SIGTERM ends this, or an error that came of one."""
    try:
        yield
    except (click.exceptions.Exit, Interrupted):
        raise
    except (KeyboardInterrupt, Exception) as error:
        if isinstance(error, KeyboardInterrupt) or interruption.came():
            raise Interrupted(told()) from None
        raise


class CommandGroup(typer.core.TyperGroup):
    """Commands of which an unknown one is told what was meant, once."""

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """As click's. Raises UserError, with what was meant or where all are listed, for a name that is none."""
        if not args[0].startswith("-") and self.get_command(ctx, args[0]) is None and not ctx.resilient_parsing:
            from zofed.commands import mistakes

            raise mistakes.unknown_command(args[0], self.list_commands(ctx), ctx)
        return super().resolve_command(ctx, args)


class Grouped(CommandGroup):
    """The commands under their headings, each imported when it is asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Names in the order of help; `version`, which needs no module, last."""
        return [*COMMANDS, *(name for name in self.commands if name not in COMMANDS)]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The command of a name, None for none; its module is imported."""
        if cmd_name in COMMANDS and cmd_name not in self.commands:
            module = import_module(f"zofed.commands.{COMMANDS[cmd_name][0]}")
            app = typer.Typer(rich_markup_mode=None)
            module.register(app)
            self.commands.update(typer.main.get_group(app).commands)
        return self.commands.get(cmd_name)

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command. Raises Interrupted for a Ctrl-C that it does not tell of itself."""
        with interruptible(lambda: "nothing of it goes on: type it again to start over"):
            return super().invoke(ctx)

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        """Commands by their names and lines of help alone, and options."""
        named = [
            CompletionItem(name, help=self._line(name))
            for name in self.list_commands(ctx)
            if name.startswith(incomplete)
        ]
        return [*named, *click.Command.shell_complete(self, ctx, incomplete)]

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the commands of `GROUPS`, then the others."""
        others = [name for name in self.commands if name not in COMMANDS]
        for heading, names in {**GROUPS, "Other": others}.items():
            with formatter.section(heading):
                formatter.write_dl([(name, self._line(name)) for name in names])

    def _line(self, name: str) -> str:
        return COMMANDS[name][1] if name in COMMANDS else self.commands[name].get_short_help_str(limit=200)
