"""Errors a user can mend. Each message is one sentence: what is wrong, where, and how to mend it."""

from collections.abc import Collection
from typing import Any


class DertaError(Exception):
    """The work failed; the command line exits with 1."""

    exit_code = 1


class UsageError(DertaError):
    """The request itself was wrong (a parameter, an option, a path); the command line exits with 2."""

    exit_code = 2


def check_known(what: str, name: str, known: Collection[str]) -> None:
    """Raise UsageError, listing the known ones, unless `name` is one of them; `what` is what they are ("method")."""
    if name not in known:
        raise UsageError(f"{what} '{name}' is not known; the {what}s are {', '.join(known)}.")


def first_line(error: Exception) -> str:
    """What an error of another library says, short enough to stand in a sentence."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")


def check_whole(name: str, value: Any, least: int) -> None:
    """Raise UsageError unless `value`, of the parameter `name`, is a whole number from `least` on."""
    if type(value) is not int:
        raise UsageError(f"{name} is {value!r}; it must be a whole number.")
    if value < least:
        raise UsageError(f"{name} is {value}; it must be {least} or more.")
