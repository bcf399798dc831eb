"""The one exception that this package raises for what a person can mend: a file, a key, a value."""


class InputError(ValueError):
    """Bad input, in one line: what is wrong, with which file or key, and what to do about it.

    :class:`custom_components.run.start.OneLineErrors` prints this line alone, and the process ends with exit code 1.
    """
