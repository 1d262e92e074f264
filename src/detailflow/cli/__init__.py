"""The command line: one thin file per command, found by `main`."""
