"""`python -m zofed` is the command `zofed`."""

from zofed.commands.cli import main

if __name__ == "__main__":
    main()
