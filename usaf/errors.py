"""The one exception for everything a user can cause: commands print its single line and exit with status 2."""

from __future__ import annotations


class UserError(Exception):
    """One line: the setting or file (and line), its value, the rule it breaks, and the remedy."""

    def __init__(self, message: str) -> None:
        assert "\n" not in message, "an error for people is one line"
        super().__init__(message)


class RunError(Exception):
    """One line for something that went wrong while a run was going well: exit status 1, finished work kept."""
