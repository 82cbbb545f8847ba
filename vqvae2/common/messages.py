"""How messages and progress bars reach a person: every module logs, a program shows it. Torch-free.

A module has `logger = logging.getLogger(__name__)` and calls `logger.info(...)`. Nothing is shown
until a program (the command line, a notebook) calls `show_messages`, and then by the first of
several processes only.
"""

import logging
import os
import sys
from typing import Any

PACKAGES = ("vqvae2", "prior", "pipelines")


class BarHandler(logging.Handler):
    """Shows messages between progress bars instead of through them; warnings go to stderr."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write one message, if this is the first process."""
        from tqdm import tqdm

        if not is_first_process():
            return
        text, is_warning = self.format(record), record.levelno >= logging.WARNING
        if is_warning:
            text = f"{record.levelname.lower()}: {text}"
        tqdm.write(text, file=sys.stderr if is_warning else sys.stdout)


def show_messages(level: int = logging.INFO) -> None:
    """Show what our packages log from this level on.

    logging.WARNING (--quiet) also hides progress bars, logging.DEBUG (--verbose) adds module names.
    """
    handler = BarHandler()
    if level <= logging.DEBUG:
        handler.setFormatter(logging.Formatter("%(name)s: %(message)s"))
    for name in PACKAGES:
        logger = logging.getLogger(name)
        logger.handlers = [handler]
        logger.setLevel(level)
    if level > logging.INFO:
        os.environ["TQDM_DISABLE"] = "1"  # for the bars of libraries


def progress_bar(*arguments: Any, **options: Any) -> Any:
    """tqdm's bar, shown by the first process only, and not after a quiet `show_messages`; where
    stderr is no terminal, a line now and then. Nothing is shown where there is nothing to do."""
    from tqdm.auto import tqdm

    if not sys.stderr.isatty():
        options = {"mininterval": 30, "maxinterval": 60, **options}
    nothing = options.get("total") == 0
    if nothing or not is_first_process() or logging.getLogger(PACKAGES[0]).level > logging.INFO:
        options["disable"] = True
    return tqdm(*arguments, **options)


def is_first_process() -> bool:
    """Whether this is the first of several processes (launchers set RANK), or the only one."""
    return os.environ.get("RANK", "0") == "0"
