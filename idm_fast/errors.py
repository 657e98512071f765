"""The one error type that a user is meant to read."""


class IdmFastError(ValueError):
    """One line that names the file or argument, what was expected and what was found.

    The command line prints it without a traceback; library users can catch it as a ``ValueError``.
    """
