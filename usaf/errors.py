"""The exceptions for people: commands print their single line and exit, with status 2 for bad input, 1 otherwise."""

from __future__ import annotations


def one_line(error: BaseException) -> str:
    """Another library's message, as part of one of ours."""
    return " ".join(str(error).split())


class UserError(Exception):
    """One line: the setting or file (and line), its value, the rule it breaks, and the remedy."""

    def __init__(self, message: str) -> None:
        assert "\n" not in message, "an error for people is one line"
        super().__init__(message)


class RunError(UserError):
    """One line for what went wrong in a run that was asked for rightly (a full disk, a loss that is not finite): exit
    status 1, finished work kept."""
