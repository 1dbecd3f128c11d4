"""The command line: `gradscope train | profile | optimize | plot | demo | evaluate | cost | merge | show`."""

from gradscope.cli.app import main

__all__ = ["main"]
