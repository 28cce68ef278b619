"""The command line: commands, flags, files of settings."""

from jaguar.cli.commands import main as main
