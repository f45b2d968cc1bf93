"""What is said of a command line that cannot be carried out; imported once there is something to say."""

import errno

import click

from zofed import config
from zofed.base.errors import UserError

# What to do where the operating system refuses, besides choosing another place.
REMEDIES = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT), "free some space or choose another place, then go on"),
    **dict.fromkeys((errno.EACCES, errno.EPERM), "choose another place, or have its owner let you, then go on"),
    errno.ENAMETOOLONG: "give a shorter name",
    errno.EMFILE: "close some files or raise the limit (ulimit -n), then go on",
}
# What other programs call a command.
ELSEWHERE = {
    **dict.fromkeys(("evaluate", "test", "score"), "eval"),
    **dict.fromkeys(("chat", "ask", "infer", "inference", "predict"), "generate"),
    **dict.fromkeys(("finetune", "fine-tune", "tune", "fit"), "train"),
    **dict.fromkeys(("server", "serve"), "superlink"),
    **dict.fromkeys(("client", "node", "join"), "supernode"),
    **dict.fromkeys(("federate", "federated", "simulation"), "simulate"),
    **dict.fromkeys(("resume", "continue"), "train --resume FOLDER"),
    **dict.fromkeys(("demo", "example", "init", "new"), "quickstart"),
    "config": "settings",
    "download": "data download",
    "push": "export --push OWNER/NAME",
    "replay": "journal replay",
    "verify": "journal verify",
}


def refused_by_system(error: OSError) -> str:
    """The sentence for a file that could not be read or written."""
    place = f" {str(error.filename)[: config.LONGEST_SHOWN]}" if error.filename else ""
    remedy = REMEDIES.get(error.errno or 0, "choose another place, then go on")
    return f"cannot write or read{place}: {error.strerror or error}; {remedy}"


def unknown_command(name: str, known: list[str], context: click.Context) -> UserError:
    """The mistake of a command that does not exist in a group of them, whose context this is."""
    if context.parent is None and name in ELSEWHERE:
        return UserError(f"unknown command {name!r}: did you mean zofed {ELSEWHERE[name]}?")
    listed = f"{context.command_path} --help lists those there are"
    return UserError(config.unknown_of_many(name, known, "command", listed))


def unknown_option(error: click.NoSuchOption) -> str:
    """The sentence for an option that a command does not have: what was meant, or where its options are listed."""
    context = error.ctx
    parameters = context.command.get_params(context) if context else []
    known = [option.removeprefix("--") for parameter in parameters for option in parameter.opts]
    listed = f"{context.command_path if context else 'zofed'} --help lists those there are"
    return config.unknown_of_many(error.option_name, known, "option", listed)
