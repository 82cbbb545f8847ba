"""Random flips and crops, and the named views of extraction: which window, and whether mirrored."""

import errno
import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vqvae2.common.config import check
from vqvae2.common.errors import UserError
from vqvae2.common.vocabulary import ORIGINAL
from vqvae2.config import AugmentationConfig, PreprocessingConfig
from vqvae2.data.decoding import BadImage, Picture, first_line, picture_size, read_cell
from vqvae2.data.preprocessing import Window, prepare

CORNER_SIDE = 0.9  # side of a corner crop, as a share of the largest window of the right ratio
CORNERS = {"top_left": (0, 0), "top_right": (1, 0), "bottom_left": (0, 1), "bottom_right": (1, 1)}
FILE_FAULTS = {errno.ENOENT, errno.EACCES, errno.EPERM, errno.ELOOP, errno.ENOTDIR}


@dataclass(frozen=True)
class Change:
    """What happens to one picture: another window (None: as image.fit says), and mirroring."""

    window: Window | None = None
    flip: bool = False
    note: Callable[[Picture, np.ndarray], object] | None = None
    """Is told of the picture and its pixels."""

    def apply(self, picture: Picture, config: PreprocessingConfig) -> np.ndarray:
        """The picture's pixels `(C, H, W)`, changed."""
        pixels = prepare(picture, config, self.window)
        if self.note is not None:
            self.note(picture, pixels)
        return pixels[..., ::-1].copy() if self.flip else pixels


Choice = Callable[[tuple[int, int]], Change]
"""Chooses the change of a picture of (width, height)."""


def no_change(size: tuple[int, int]) -> Change:
    """The choice that leaves a picture as it is."""
    return Change()


def decode(
    source: str, name: str, cell: Any, config: PreprocessingConfig, choose: Choice
) -> Tensor:
    """The pixels `(C, H, W)` of a cell (see `read_cell`), changed as chosen for its size.

    Raises:
        BadImage: naming the picture and what is wrong with it.
        UserError: the machine cannot read it now (a disk's hiccup, too many open files): it may be
            sound, and is not skipped.
    """
    try:
        picture = read_cell(cell)
        return torch.from_numpy(choose(picture_size(picture)).apply(picture, config))
    except OSError as error:  # Pillow's own have no number
        if error.errno is None or error.errno in FILE_FAULTS:
            raise BadImage.of(source, name, error) from None
        reason = f"cannot be read now ({first_line(error)})"
        raise UserError(f"{source}: {name} {reason}: check the disk, and run this again.") from None
    except Exception as error:  # decoders raise many kinds
        raise BadImage.of(source, name, error) from None


def random_change(
    config: AugmentationConfig,
    image: PreprocessingConfig,
    size: tuple[int, int],
    *,
    seed: int,
    epoch: int,
    name: str,
) -> Change:
    """The change of the picture of this name and (width, height) in this epoch: always the same."""
    key = hashlib.sha256(f"{seed} {epoch} {name}".encode()).digest()
    generator = np.random.Generator(np.random.Philox(key=int.from_bytes(key[:16])))
    flip = bool(config.horizontal_flip and generator.random() < 0.5)
    if config.crop == "off":
        return Change(flip=flip)
    across, down, share, shape = generator.random(4).tolist()
    height, width = image.height_width
    if config.crop == "random":
        return Change(_window(size, width / height, 1.0, across, down), flip)

    # random_resized: a ratio from 3/4 to 4/3 of the image's, as likely narrow as wide, and an area.
    ratio = width / height * math.exp(math.log(3 / 4) + shape * math.log(16 / 9))
    low, high = config.crop_area
    area = (low + share * (high - low)) * size[0] * size[1]
    left, top, right, bottom = _window(size, ratio, 1.0, 0, 0)
    side = min(1.0, math.sqrt(area / ((right - left) * (bottom - top))))
    return Change(_window(size, ratio, side, across, down), flip)


def known_views() -> list[str]:
    """The names of all views."""
    return [ORIGINAL, "flip", *CORNERS, *(f"flip_{corner}" for corner in CORNERS)]


def check_views(views: Sequence[str]) -> None:
    """Raise a `UserError` for views of unknown names."""
    unknown = sorted(set(views) - set(known_views()))
    check(not unknown, "views", unknown, f"among {', '.join(known_views())}")


def view_change(view: str, image: PreprocessingConfig, size: tuple[int, int]) -> Change:
    """The change of a view: original, flip, a corner (top_left, ...), or flip_ and a corner.

    Raises UserError: no such view."""
    if view not in known_views():
        raise UserError(f"unknown view {view!r}: choose among {', '.join(known_views())}.")
    corner, flip = view.removeprefix("flip").removeprefix("_"), view.startswith("flip")
    if corner not in CORNERS:
        return Change(flip=flip)
    height, width = image.height_width
    return Change(_window(size, width / height, CORNER_SIDE, *CORNERS[corner]), flip)


def _window(size: tuple[int, int], ratio: float, side: float, across: float, down: float) -> Window:
    """A window of width/height `ratio` in a picture of (width, height), `side` times as large as
    the largest, placed by two numbers in [0, 1]."""
    width = min(size[0], size[1] * ratio) * side
    height = min(width / ratio, size[1])  # not a rounding error higher than the picture
    left, top = (size[0] - width) * across, (size[1] - height) * down
    return left, top, min(left + width, size[0]), min(top + height, size[1])
