"""Names that both stages and their files share. Torch-free."""

from collections.abc import Sequence

SPLITS = ("train", "validation")
"""The folders of prepared images and of a code dataset: rows to train on, and rows held out."""
ORIGINAL = "original"
"""The view of an image that is the image unchanged."""
TRAINING_RECORD = "train_config.yaml"
"""The file in a training's folder that says what was trained, on what, and how."""
IMPORT_RECORD = "import_config.yaml"
"""The same in the folder of an import from another implementation."""
EXTRACTION_RECORD = "extract_config.yaml"
"""The same in the folder of a code dataset."""
INDEX_NAME = "model_index.json"
"""The file in a pipeline's folder that names its models, which are folders in it."""
MIN_HELD_OUT = 20
"""Held-out images or rows, below which it is luck which weights do best on them."""

LONGEST_VECTOR = 1 << 14
"""Numbers or attributes of an image, on which priors are conditioned."""


def describe_grids(grids: Sequence[Sequence[int]], sizes: Sequence[int]) -> list[str]:
    """Every level in words: 8 x 8 of 512."""
    return [f"{h} x {w} of {size}" for (h, w), size in zip(grids, sizes, strict=True)]


def describe_vectors(size: int, names: Sequence[str] = ()) -> str:
    """Condition vectors in words: 3 attributes (glasses, hat, smile)."""
    return f"{size} attributes ({first_names(names)})" if names else f"vectors of {size} numbers"


def first_names(names: Sequence[str]) -> str:
    """The first twelve of these names, such as classes."""
    return ", ".join([*names[:12], *["..."] * (len(names) > 12)])
