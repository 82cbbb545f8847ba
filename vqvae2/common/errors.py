"""The two ways in which a command ends early on purpose."""


class UserError(ValueError):
    """Something the user can mend: one sentence that names the file or key, what was expected and what to do.

    The command line prints the sentence and exits with code 2; from Python it is an ordinary `ValueError`.
    """


class Stopped(Exception):
    """A clean stop asked for by SIGTERM or Ctrl-C, after the state was saved. `signal_number` gives the exit code."""

    def __init__(self, message: str, signal_number: int) -> None:
        super().__init__(message)
        self.signal_number = signal_number
