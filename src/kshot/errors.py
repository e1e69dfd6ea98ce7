"""One exception for what a user can put right, and the wording of near misses and of other errors' reasons."""

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """A mistake in what the user gave. The message is one line: what is wrong, where, and what would be right.

    The command line prints it without a traceback and ends with exit code 2.
    """


def nearest_first(name: str, options: Iterable[str], shown: int = 12) -> str:
    """Lists what exists, the nearest match first: ``did you mean 'digits'? There are: digits, dtd, ...``."""
    known = sorted(set(options))
    if not known:
        return "There are none."
    lowered = {option.lower(): option for option in known}
    close = [lowered[match] for match in difflib.get_close_matches(name.lower(), lowered, n=3, cutoff=0.5)]
    ordered = close + [option for option in known if option not in close]
    listed = ", ".join(ordered[:shown]) + (f" and {len(ordered) - shown} more" if len(ordered) > shown else "")
    return (f"Did you mean {close[0]!r}? " if close else "") + f"There are: {listed}."


def first_line(error: BaseException) -> str:
    """The first line of an error's message, shortened, or its type where there is no message."""
    lines = str(error).strip().splitlines()
    return lines[0][:160] if lines else type(error).__name__


def require(who: str, name: str, value: object, holds: bool, what: str) -> None:
    """Refuses a setting; raises UserError unless ``holds``. ``what`` completes "rank is 0, and must ..."."""
    if not holds:
        raise UserError(f"{who}: {name} is {value}, and must {what}.")


def user_error_behind(error: BaseException | None) -> UserError | None:
    """A user's mistake behind an exception, where there is one: jsonargparse wraps what a constructor raises."""
    while error is not None and not isinstance(error, UserError):
        error = error.__cause__ or error.__context__
    return error
