"""What a person did that zofed cannot carry out, told in one line with the remedy."""


class UserError(Exception):
    """A mistake a person can mend.

    The message names the value, the limit it breaks and the remedy, on one line. The commands print it
    without a traceback and exit with status 2.
    """
