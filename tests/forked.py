"""Commands in processes of their own that start at once: forks of a server that has loaded PyTorch.

Killing one, or running two at a time, costs a tenth of a second instead of three.
"""

import multiprocessing
import os
import resource
import runpy
import signal
import socket
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from itertools import cycle
from pathlib import Path
from subprocess import CompletedProcess

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["tests.forked", "datasets", "pipelines.commands.sample"])
LIMIT = 300  # seconds after which a command hangs
PORTS = cycle(range(15_000, 16_000))
HANGS = -1000  # its exit code then


class Running:
    """A command line that has been started.

    Args:
        words: what follows `python -m pipelines.cli`; or a Python file (.py) and its arguments.
        max_file_size: the longest file that it can write, in bytes (0: any), like a full disk.
    """

    def __init__(
        self,
        words: Sequence[object],
        *,
        cwd: Path | None = None,
        environment: Mapping[str, str] | None = None,
        max_file_size: int = 0,
    ) -> None:
        self.words = [str(word) for word in words]
        self.folder = tempfile.TemporaryDirectory()
        changes = {**os.environ, **(environment or {})}
        arguments = (self.words, self.folder.name, str(cwd or Path.cwd()), changes, max_file_size)
        self.process = SERVER.Process(target=_run, args=arguments)
        self.process.start()

    def is_alive(self) -> bool:
        """Whether it has not ended."""
        return self.process.is_alive()

    def send(self, number: int) -> None:
        """Send a signal."""
        if self.process.is_alive() and self.process.pid is not None:
            os.kill(self.process.pid, number)

    def wait(self, limit: float = LIMIT) -> CompletedProcess[str]:
        """How it ended: exit code, stdout and stderr. Killed if it takes longer than `limit` s."""
        self.process.join(limit)
        code = self.process.exitcode
        if code is None:
            self.process.kill()
            self.process.join()
            code = HANGS
        texts = []
        for name in ("stdout", "stderr"):
            path = Path(self.folder.name, name)
            texts.append(path.read_text(errors="replace") if path.exists() else "")
        self.folder.cleanup()
        return CompletedProcess(self.words, code, *texts)


def start_two(words: Sequence[object], **options: object) -> list[Running]:
    """The same command as two processes of one launch, as torchrun starts them."""
    port, ranks = str(_free_port()), []
    for rank in ("0", "1"):
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
        place |= {"MASTER_ADDR": "localhost", "MASTER_PORT": port, "ACCELERATE_USE_CPU": "true"}
        ranks.append(Running(words, environment=place, **options))  # type: ignore[arg-type]
    return ranks


def _free_port() -> int:
    """One that no other worker tries, and that no connection is given by the system."""
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    for number in PORTS:
        port = number + 1000 * (worker % 10)
        with socket.socket() as free, suppress(OSError):
            free.bind(("localhost", port))
            return port
    raise RuntimeError("no port is free")


def _run(
    words: list[str],
    folder: str,
    cwd: str,
    environment: Mapping[str, str],
    max_file_size: int,
) -> None:
    # As a process of its own would begin.
    for name, number in (("stdout", 1), ("stderr", 2)):
        with open(Path(folder, name), "wb", buffering=0) as file:
            os.dup2(file.fileno(), number)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    if max_file_size:
        resource.setrlimit(resource.RLIMIT_FSIZE, (max_file_size, resource.RLIM_INFINITY))

    # A file, or our command line.
    if words[0].endswith(".py"):
        sys.argv = words
        sys.path.insert(0, str(Path(words[0]).parent))
        runpy.run_path(words[0], run_name="__main__")
        return
    from pipelines.cli import main

    sys.argv = ["vqvae2", *words]
    sys.exit(main(words))
