"""What a person did that zofed cannot carry out, told in one line with the remedy."""


class UserError(Exception):
    """A mistake a person can mend.

    The message names the value, the limit it breaks and the remedy, on one line. The commands print it
    without a traceback and exit with status 2.
    """


class DivergenceError(UserError):
    """A loss is no finite number any more, or ended far above its start.

    Of a rate that a sweep only tries, an outcome; else a mistake.
    """


class DiskError(UserError):
    """The disk did not take what a run writes; once it does, the run goes on from what stands there whole."""


class Interrupted(Exception):  # noqa: N818, not an error
    """Ctrl-C or SIGTERM ended a command; the text says how to go on."""
