"""One command at a time writes to a folder: a lock that dies with the process that holds it."""

import dataclasses
import errno
import functools
import logging
import os
import re
import shutil
import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar

from filelock import FileLock, Timeout

from vqvae2.common.accelerate import on_main_process, processes
from vqvae2.common.config import expand_path
from vqvae2.common.errors import UserError

P = ParamSpec("P")
R = TypeVar("R")
LOCK_NAME = ".writer.lock"
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
LEFTOVER = re.compile(r"\..+\.(partial|removed)")  # see `vqvae2.common.files`
logger = logging.getLogger(__name__)


def writes_output(function: Callable[Concatenate[Any, P], R]) -> Callable[Concatenate[Any, P], R]:
    """Let a command hold the lock of its configuration's `output_dir`, expanded, while it runs."""

    @functools.wraps(function)
    def alone(config: Any, *args: P.args, **options: P.kwargs) -> R:
        folder = expand_path(config.output_dir, "output_dir")
        with only_writer(Path(folder)):
            return function(dataclasses.replace(config, output_dir=folder), *args, **options)

    return alone


@contextmanager
def only_writer(folder: Path) -> Iterator[None]:
    """Hold a folder's lock: the first process of a launch holds it for all of them. At the end,
    what killed commands left in the folder is removed.

    Raises:
        UserError: another command holds it; on every process of this launch.
    """
    state = processes()
    with ExitStack() as stack:
        on_main_process(state, lambda: stack.enter_context(_locked(folder)))
        yield
        state.wait_for_everyone()
        if state.is_main_process:
            _remove_leftovers(folder)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold the lock in this process; again within itself, it is the same one."""
    # The folder, which goes again if nothing is written to it.
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file, but --output-dir must be a folder: choose another.")
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    path = folder.resolve() / LOCK_NAME
    lock = FileLock(path, is_singleton=True, fallback_to_soft=False)  # a soft one outlives us

    # The lock, and in it who holds it, where there is room to say so.
    try:
        lock.acquire(timeout=0)
    except Timeout:
        holder = "another process"
        with suppress(OSError):
            holder = path.read_text()[:200] or holder
        advice = "wait for it or choose another --output-dir"
        raise UserError(f"{holder} is writing to {folder}: {advice}.") from None
    except (OSError, NotImplementedError) as error:
        if isinstance(error, OSError) and error.errno not in NO_LOCKS:
            raise OSError(error.errno, error.strerror, str(folder)) from None
        logger.warning("%s: its file system has no locks: write to it by one command.", folder)
    else:
        with suppress(OSError):
            path.write_text(f"process {os.getpid()} on host {socket.gethostname()}")

    # Whoever waits for a file that is removed here sees that it has no name any more.
    try:
        yield
    finally:
        if lock.lock_counter <= 1:
            path.unlink(missing_ok=True)
        lock.release()
        with suppress(OSError):
            for empty in made:
                empty.rmdir()


def _remove_leftovers(folder: Path) -> None:
    for place, folders, files in os.walk(folder):
        for name in filter(LEFTOVER.fullmatch, folders):
            shutil.rmtree(Path(place, name), ignore_errors=True)
        for name in filter(LEFTOVER.fullmatch, files):
            Path(place, name).unlink(missing_ok=True)
        nested = [n for n in folders if n[0] != "." and not Path(place, n, LOCK_NAME).exists()]
        folders[:] = nested  # other commands' folders are theirs
