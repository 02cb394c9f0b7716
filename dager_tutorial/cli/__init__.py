"""The command line `dager`. Help, and mistakes in options, come without torch and transformers being loaded."""

from dager_tutorial.cli.app import main

__all__ = ["main"]
