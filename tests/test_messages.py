"""Messages go through logging; nothing is set up by merely opening data."""

import logging
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from vqvae2.common.messages import PACKAGES, progress_bar, show_messages

logger = logging.getLogger("vqvae2.data")

OPEN_IMAGES = """
import ctypes, sys
class Library(ctypes.CDLL):
    def __getattr__(self, name):
        assert name != "mallopt", "the allocator was changed"
        return super().__getattr__(name)
ctypes.CDLL = Library
from vqvae2 import PreprocessingConfig
from vqvae2.config import ImagesConfig
from vqvae2.data import load_images
images = load_images(ImagesConfig(path=sys.argv[1]), PreprocessingConfig(size=(28,), channels=1))
assert len(images.train) > 100
if "accelerate" in sys.modules:
    from accelerate.state import PartialState
    assert PartialState._shared_state == {}, "a process group was asked for"
print("opened")
"""


@pytest.fixture(autouse=True)
def as_before(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Leave loggers and the environment as they were."""
    monkeypatch.setenv("TQDM_DISABLE", "0")
    loggers = [logging.getLogger(name) for name in PACKAGES]
    before = [(one, one.level, one.handlers) for one in loggers]
    yield
    for one, level, handlers in before:
        one.setLevel(level)
        one.handlers = handlers


def shown(level: int, capsys: pytest.CaptureFixture[str]) -> tuple[str, str]:
    """What stands in stdout and stderr after one message of each kind."""
    show_messages(level)
    logger.debug("how")
    logger.info("done")
    logger.warning("odd")
    captured = capsys.readouterr()
    return captured.out, captured.err


def test_messages_go_to_stdout_and_warnings_to_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    assert shown(logging.INFO, capsys) == ("done\n", "warning: odd\n")


def test_quiet_shows_warnings_alone(capsys: pytest.CaptureFixture[str]) -> None:
    assert shown(logging.WARNING, capsys) == ("", "warning: odd\n")
    list(progress_bar(range(3)))
    assert capsys.readouterr().err == ""


def test_verbose_names_the_modules(capsys: pytest.CaptureFixture[str]) -> None:
    lines = ("vqvae2.data: how\nvqvae2.data: done\n", "warning: vqvae2.data: odd\n")
    assert shown(logging.DEBUG, capsys) == lines


def test_of_several_processes_the_first_one_speaks(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "1")
    assert shown(logging.INFO, capsys) == ("", "")
    list(progress_bar(range(3)))
    assert capsys.readouterr().err == ""


def test_a_message_does_not_cut_a_progress_bar(capsys: pytest.CaptureFixture[str]) -> None:
    show_messages()
    for _ in progress_bar(range(3), desc="steps", mininterval=0):
        logger.info("between")
    captured = capsys.readouterr()
    assert captured.out == "between\n" * 3
    assert "steps: 100%" in captured.err


def test_opening_images_touches_neither_accelerate_nor_the_allocator(photos: Path) -> None:
    program = [sys.executable, "-c", OPEN_IMAGES, photos]
    result = subprocess.run(program, capture_output=True, text=True, check=False)
    assert result.stdout == "opened\n", result.stderr
