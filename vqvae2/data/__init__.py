"""Images from every source that users have: as a table of rows in any order, or a stream of shards.

`open_source` turns what a path names into either, and `dataset` these into what training reads;
`splits` decides what is held out, what the classes are and which images a run belongs to;
`decoding`, `preprocessing` and `augmentation` turn a file into pixels; `work_parts` are jobs that
write shards, and `prepared` is one.
"""

from vqvae2.data.dataset import (
    AugmentedImages,
    ImageDataset,
    ImageSplits,
    TrainingImages,
    held_out_images,
    load_images,
    open_training_images,
)
from vqvae2.data.decoding import BadImage, picture_size, read_picture_file
from vqvae2.data.open_arrays import PythonImages
from vqvae2.data.open_source import load_table, open_source
from vqvae2.data.preprocessing import as_images, load_picture, open_picture, prepare, to_images
from vqvae2.data.splits import is_held_out
from vqvae2.data.table import ImageTable

__all__ = [
    "AugmentedImages", "BadImage", "ImageDataset", "ImageSplits", "ImageTable", "PythonImages",
    "TrainingImages", "as_images", "held_out_images", "is_held_out", "load_images", "load_picture",
    "load_table", "open_picture", "open_source", "open_training_images", "picture_size", "prepare",
    "read_picture_file", "to_images",
]  # fmt: skip
