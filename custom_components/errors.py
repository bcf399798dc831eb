"""What this package raises for what a person can mend: a file, a key, a value."""

from collections.abc import Sequence


class InputError(ValueError):
    """Bad input, in one line: what is wrong, with which file or key, and what to do about it.

    :class:`custom_components.run.start.OneLineErrors` prints this line alone, and the process ends with exit code 1.
    """


class LeftOut(InputError):
    """Volumes, or masks of them, could not be read, told once all else is done; ``failures``: ``(name, reason)``."""

    def __init__(self, failures: Sequence[tuple[str, str]]) -> None:
        self.failures = list(failures)
        names = list(dict(failures))
        super().__init__(
            f"{len(names)} volumes could not be read and were left out ({', '.join(names)}); all else is done, the "
            "reasons stand above: repair them, or list their names in a file given as exclude"
        )


def tell_left_out(failures: Sequence[tuple[str, str]]) -> None:
    """Raise :class:`LeftOut` where there are failures, so that the run ends with exit code 1."""
    if failures:
        raise LeftOut(failures)


def none_read(number: int, failures: Sequence[tuple[str, str]]) -> InputError:
    """What to raise where all of a ``number`` of volumes have failed, and nothing is to be reported."""
    return InputError(f"none of {number} volumes could be read, the first for this reason: {failures[0][1]}")
