"""Images from the sources that users have: files, lists, tables, arrays, tar shards; whole or as a stream; prepared, split, checked.

`preprocessing` turns a picture into pixels, `source` says what a source is, `sources` finds which kind a path names (`files`, `tables`,
`arrays`, `tars`, `prepared`), `images` makes training and held-out datasets of it, `augmentation` changes them at random, `streams` reads
what fits on no disk.
"""

from vqvae2.data.images import (
    AugmentedImages,
    BadImage,
    ImageDataset,
    ImageSplits,
    is_held_out,
    lies_in,
    load_images,
    load_source,
)
from vqvae2.data.preprocessing import (
    load_picture,
    picture_size,
    prepare,
    read_picture_file,
    to_images,
)
from vqvae2.data.source import ImageSource

__all__ = [
    "AugmentedImages",
    "BadImage",
    "ImageDataset",
    "ImageSource",
    "ImageSplits",
    "is_held_out",
    "lies_in",
    "load_images",
    "load_picture",
    "load_source",
    "picture_size",
    "prepare",
    "read_picture_file",
    "to_images",
]
