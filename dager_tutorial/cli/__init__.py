"""The command line `dager`."""

from dager_tutorial.cli.app import main

__all__ = ["main"]
