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


def refused_by_system(error: OSError) -> str:
    """The sentence for a file that could not be read or written."""
    place = f" {str(error.filename)[: config.LONGEST_SHOWN]}" if error.filename else ""
    remedy = REMEDIES.get(error.errno or 0, "choose another place, then go on")
    return f"cannot write or read{place}: {error.strerror or error}; {remedy}"


def unknown_command(name: str, known: list[str]) -> UserError:
    """The mistake of a command that does not exist."""
    return UserError(config.unknown(name, known, "command"))


def unknown_option(error: click.NoSuchOption) -> str:
    """The sentence for an option that a command does not have: what was meant, or where its options are listed."""
    command = error.ctx.command_path if error.ctx else "zofed"
    parameters = error.ctx.command.get_params(error.ctx) if error.ctx else []
    known = [option.removeprefix("--") for parameter in parameters for option in parameter.opts]
    typed = error.option_name
    key = typed.lstrip("-")
    renamed = config.RENAMED.get(key)
    if renamed in known:
        return f"{typed} is now called --{renamed}"
    return config.unknown(typed, [f"--{name}" for name in known], "option") + f" ({command})"
