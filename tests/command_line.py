"""Runs the command line in this process."""

from __future__ import annotations

import sys

from sandcat import cli


def main(*args) -> int:
    """Runs the command line in this process; its exit code."""
    before, sys.argv = sys.argv, ["sandcat", *map(str, args)]
    try:
        cli.main()
    except SystemExit as stop:
        return int(stop.code or 0)
    finally:
        sys.argv = before
    return 0
