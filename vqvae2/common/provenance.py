"""What those who retrace a run need to know besides its settings. Torch-free."""

import platform
import shlex
import sys
from importlib.metadata import version
from pathlib import Path

PACKAGES = ("vqvae2", "torch", "accelerate", "numpy", "pyarrow")


def versions() -> dict[str, str]:
    """What computes here: package -> version."""
    return {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}}


def command_line() -> str:
    """The command that this process was started with, as a shell takes it."""
    return shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])
