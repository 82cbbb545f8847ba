"""How messages reach a person: every module logs, and the command line shows it. Torch-free.

A module says `logger = logging.getLogger(__name__)` and `logger.info(...)`. Nothing is printed, no
process group asked for, until a program (the command line, a notebook) installs a handler.
"""

import logging
import os
import sys

PACKAGES = ("vqvae2", "prior", "pipelines")


class BarHandler(logging.Handler):
    """Shows messages between progress bars instead of through them; warnings go to stderr."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write one message."""
        from tqdm import tqdm

        stream = sys.stderr if record.levelno >= logging.WARNING else sys.stdout
        tqdm.write(self.format(record), file=stream)


class _Formatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        return f"warning: {text}" if record.levelno == logging.WARNING else text


def show_messages(level: int = logging.INFO) -> None:
    """Show what our packages log from this level on; of several processes, only the first speaks."""
    handler = BarHandler()
    handler.setFormatter(_Formatter())
    silent = os.environ.get("RANK", "0") != "0"  # set by every launcher
    for name in PACKAGES:
        logger = logging.getLogger(name)
        logger.handlers = [handler]
        logger.setLevel(logging.CRITICAL if silent else level)
