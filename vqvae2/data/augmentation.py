"""Random flips and crops, and the named views of extraction: which part of a picture, and whether mirrored."""

import hashlib
import math
from dataclasses import dataclass

import numpy as np

from vqvae2.common.errors import UserError
from vqvae2.config import AugmentationConfig, PreprocessingConfig
from vqvae2.data.preprocessing import Picture, Window, prepare

ORIGINAL = "original"
CORNER_SHARE = 0.9  # side of a corner crop, as a share of the largest part of the right ratio
CORNERS = {"top_left": (0, 0), "top_right": (1, 0), "bottom_left": (0, 1), "bottom_right": (1, 1)}


@dataclass(frozen=True)
class Change:
    """What happens to one picture: another part of it (None: as image.fit says), and mirroring."""

    window: Window | None = None
    flip: bool = False

    def apply(self, picture: Picture, config: PreprocessingConfig) -> np.ndarray:
        """The picture's pixels `(C, H, W)`, changed."""
        pixels = prepare(picture, config, self.window)
        return pixels[..., ::-1].copy() if self.flip else pixels


def random_change(
    config: AugmentationConfig,
    image: PreprocessingConfig,
    size: tuple[int, int],
    *,
    seed: int,
    epoch: int,
    name: str,
) -> Change:
    """The change of the picture of this name and (width, height) in this epoch: always the same, whoever asks."""
    key = hashlib.sha256(f"{seed} {epoch} {name}".encode()).digest()
    draw = np.random.Generator(np.random.Philox(key=int.from_bytes(key[:16])))
    flip = bool(config.horizontal_flip and draw.random() < 0.5)
    if config.crop == "off":
        return Change(flip=flip)
    across, down, share, turn = draw.random(4).tolist()
    height, width = image.height_width
    if config.crop == "random":
        return Change(_part(size, width / height, 1.0, across, down), flip)
    low, high = config.crop_area
    ratio = math.exp(
        math.log(3 / 4) + turn * math.log(16 / 9)
    )  # 3/4 to 4/3, as likely narrow as wide
    area = (low + share * (high - low)) * size[0] * size[1]
    largest = _part(size, width / height * ratio, 1.0, 0, 0)
    side = min(1.0, math.sqrt(area / ((largest[2] - largest[0]) * (largest[3] - largest[1]))))
    return Change(_part(size, width / height * ratio, side, across, down), flip)


def view_change(view: str, image: PreprocessingConfig, size: tuple[int, int]) -> Change:
    """The change that a view of extraction stands for: original, flip, a corner (top_left, ...), or flip_ and a corner.

    Raises:
        UserError: no such view.
    """
    flip = view == "flip" or view.startswith("flip_")
    part = view.removeprefix("flip").removeprefix("_") or ORIGINAL
    if part == ORIGINAL:
        return Change(flip=flip)
    if part not in CORNERS:
        raise UserError(
            f"views has {view!r}, but known are {', '.join(known_views())}: choose among them."
        )
    height, width = image.height_width
    return Change(_part(size, width / height, CORNER_SHARE, *CORNERS[part]), flip)


def known_views() -> list[str]:
    """The names of all views."""
    return [ORIGINAL, "flip", *CORNERS, *(f"flip_{corner}" for corner in CORNERS)]


def _part(size: tuple[int, int], ratio: float, side: float, across: float, down: float) -> Window:
    """A part of a picture of (width, height): of width/height `ratio`, `side` times as large as the largest, placed by two numbers in [0, 1]."""
    width = min(size[0], size[1] * ratio) * side
    height = min(width / ratio, size[1])  # not a rounding error higher than the picture
    left, top = (size[0] - width) * across, (size[1] - height) * down
    return left, top, min(left + width, size[0]), min(top + height, size[1])
