"""The two ways in which a command ends early on purpose."""


class UserError(ValueError):
    """Something the user can fix: one sentence that names the file or key, and what to do.

    The command line prints the sentence and exits with code 2; in Python it is a `ValueError`.
    """

    told_by_first = False  #: of several processes, the first one has raised it, too


class Stopped(Exception):
    """A clean stop by SIGTERM or Ctrl-C, the state saved. `signal_number` gives the exit code."""

    def __init__(self, message: str, signal_number: int) -> None:
        super().__init__(message, signal_number)  # both, so that it can be pickled
        self.signal_number = signal_number

    def __str__(self) -> str:
        return str(self.args[0])
