"""What a log may say of an exception: its kind and where it was raised, never its own words.

Libraries quote what they choked on, which may be what a client sent.
"""

import traceback


def frames(error: BaseException) -> str:
    """The exception's type and the lines of code it came through, with those of what caused it, as lines of text."""
    told: list[str] = []
    seen: set[int] = set()
    cause: BaseException | None = error
    while cause is not None and id(cause) not in seen:
        seen.add(id(cause))
        where = "".join(traceback.format_tb(cause.__traceback__)).rstrip()
        told.append("\n".join(filter(None, (type(cause).__name__, where))))
        cause = cause.__cause__ or (None if cause.__suppress_context__ else cause.__context__)
    return "\ncaused by ".join(told)
