"""The command line: commands, flags, files of settings."""
