"""What is lost when pictures become images: counted while they are decoded, and then said."""

import logging
import threading
from collections import Counter
from functools import partial
from typing import Any

import numpy as np
from accelerate.utils import gather_object

from vqvae2.config import PreprocessingConfig
from vqvae2.data.augmentation import Change
from vqvae2.data.decoding import Picture
from vqvae2.data.preprocessing import BYTES

logger = logging.getLogger(__name__)
CUT = 0.25  # share of a picture's area whose loss a person would mind
FLAT = 4.0  # standard deviation of 8-bit values below which nothing can be seen in a picture
MANY = 0.1  # share of the pictures from which a loss is worth a line
MOST_COMPARED = 1 << 20  # pictures: their checksums take 100 MiB
FINDINGS = {  # what was counted -> the share of which more are worth this line
    "cut": (0, "lose more than a quarter of their area by cropping: --image.fit pad shows"
            " all of them"),
    "vanished": (0, "are transparent, and cannot be seen on {0}: set --image.background {1}, or"
                 " --image.channels 4 to keep what is transparent"),
    "flat": (0, "are of one colour, with nothing to be seen in them: check them{4}"),
    "enlarged": (MANY, "are enlarged 4 times or more to {3} x {2} pixels: a smaller --image.size"
                 " shows as much, and is faster"),
    "copies": (MANY, "are copies of others: held-out ones may have been trained on, and then"
               " look better than new images would"),
    "grey": (0.999, "are grey: --image.channels 1 is faster, and makes no colours"),
}  # fmt: skip


def loses_much(aspects: Any, config: PreprocessingConfig) -> Any:
    """Whether cropping cuts off much of pictures of these widths / heights."""
    height, width = config.height_width
    ratio = aspects * height / width
    return np.minimum(ratio, 1 / ratio) < 1 - CUT


def is_flat(pixels: np.ndarray) -> bool:
    """Whether nothing can be seen in pixels `(C, H, W)`, of 8 bits or in [-1, 1]."""
    limit = FLAT if pixels.dtype == np.uint8 else FLAT / 127.5
    some = pixels[:, ::8, ::8]  # nearly always they decide
    return all(bool((values.std(axis=(1, 2)) < limit).all()) for values in (some, pixels))


def is_transparent(picture: Picture) -> bool:
    """Whether a picture has transparent parts, and others."""
    if isinstance(picture, np.ndarray) or not picture.has_transparency_data:
        return False
    low, high = picture.convert("RGBA").getchannel("A").getextrema()
    return low < 255 and high > 0  # type: ignore[operator]


class Survey:
    """Counts what is lost, or cannot be seen, in the pictures that are decoded with `choose`."""

    def __init__(self, config: PreprocessingConfig) -> None:
        self.config, self.counts, self.lock = config, Counter[str](), threading.Lock()
        self.checksums: set[int] = set()

    def choose(self, size: tuple[int, int]) -> Change:
        """The choice that leaves a picture as it is, and has it counted."""
        return Change(note=partial(self._note, *size))

    def _note(self, width: int, height: int, picture: Picture, pixels: np.ndarray) -> None:
        config, checksum = self.config, hash(pixels.tobytes())
        larger = max(config.height_width[0] / height, config.height_width[1] / width)
        flat = is_flat(pixels)
        gone = flat and is_transparent(picture)
        found = {
            "cut": config.fit == "crop" and loses_much(width / height, config),
            "vanished": gone,
            "flat": flat and not gone,
            "enlarged": config.fit != "pad" and larger >= 4,
            "grey": len(pixels) == 3 and bool((pixels[:1] == pixels[1:]).all()),
        }
        with self.lock:
            found["copies"] = checksum in self.checksums and not flat
            if len(self.checksums) < MOST_COMPARED:
                self.checksums.add(checksum)
            self.counts.update(["all", *(name for name, is_so in found.items() if is_so)])

    def report(self, source: str, *, shared: bool = False) -> None:
        """Say what was found, a line each with the flag that helps. `shared`: each process has seen
        some of the pictures, and calls this."""
        found = sum(gather_object([self.counts]), Counter()) if shared else self.counts
        background = self.config.background
        other = "white" if background == "black" else "black"
        ranges = ""
        if self.config.value_range != BYTES:
            low, high = self.config.value_range
            ranges = f", and --image.value-range {low:g} {high:g}"
        for name, (share, text) in FINDINGS.items():
            if found[name] > share * found["all"]:
                line = "%s: %d of %d pictures " + text.format(
                    background, other, *self.config.height_width, ranges
                )
                logger.warning(line + ".", source, found[name], found["all"])
