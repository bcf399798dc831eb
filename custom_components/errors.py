"""The one exception that this package raises for what a person can mend: a file, a key, a value."""

from __future__ import annotations


class InputError(ValueError):
    """Bad input, in one line: what is wrong, with which file or key, and what to do about it.

    Configs install :class:`custom_components.run.start.OneLineErrors`, which prints this line alone, without the
    traceback, and ends with exit code 1.
    """
