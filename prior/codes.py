"""The contract between the stages: a folder of Parquet shards with the codes of every image, and a manifest that says what they mean.

    manifest.json   train/00000.parquet ...   validation/00000.parquet ...

A row is an image: `id`, `codes_0` ... `codes_L` (one fixed-size list per level in raster order, the smallest unsigned type that fits) and
`label` where there are classes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from einops import rearrange
from torch import Tensor
from torch.utils.data import Dataset

from vqvae2.common.config import check, from_dict
from vqvae2.common.errors import UserError
from vqvae2.common.files import read_json

MANIFEST_NAME = "manifest.json"


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What the codes of a dataset mean. Written last: a folder without it is unfinished."""

    encoder_hash: str
    """Content hash of the encoder that made the codes."""
    grids: tuple[tuple[int, ...], ...]
    """`(h, w)` of every level, coarse to fine."""
    codebook_sizes: tuple[int, ...]
    """K of every level."""
    class_names: tuple[str, ...]
    """Names of the classes that labels count, or empty."""
    rows_hash: str
    """Content hash of which images the rows are: names, labels, splits."""
    num_train: int
    """Rows in train/."""
    num_validation: int
    """Rows in validation/."""
    preprocessing: Any
    """How the images were prepared (stage 1's business; here for people)."""

    def __post_init__(self) -> None:
        check(len(self.grids) == len(self.codebook_sizes) >= 1, "grids", self.grids, "one (h, w) per level")

    @property
    def num_levels(self) -> int:
        """Number of levels."""
        return len(self.grids)

    @property
    def values_per_image(self) -> int:
        """Channels times height times width of the images that the codes were made of."""
        size = self.preprocessing["size"]
        return self.preprocessing["channels"] * size[0] * size[-1]


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a code dataset.

    Raises:
        UserError: there is none, or it is broken.
    """
    if not folder.is_dir():
        raise UserError(f"{folder} does not exist: make the code dataset with vqvae2 extract.")
    if not (folder / MANIFEST_NAME).exists():
        raise UserError(f"{folder} has no {MANIFEST_NAME}: it is no finished code dataset; run vqvae2 extract (again).")
    return from_dict(Manifest, read_json(folder / MANIFEST_NAME), str(folder / MANIFEST_NAME))


def column_name(level: int) -> str:
    """The column that holds a level's codes."""
    return f"codes_{level}"


def parse_level(level: str, num_levels: int) -> int:
    """'top', 'bottom' or a number, as a level's number.

    Raises:
        UserError: no such level.
    """
    number = {"top": 0, "bottom": num_levels - 1}.get(level, int(level) if level.isdecimal() else -1)
    check(0 <= number < num_levels, "level", level, f"top, bottom, or a number from 0 to {num_levels - 1}")
    return number


class CodeDataset(Dataset):
    """One split of a code dataset up to some level, as batches {"codes": one (B, h, w) int64 per level, "labels": (B,) int64 if there are labels}.

    Raises:
        UserError: a shard is missing, broken, or holds codes outside of the codebook.
    """

    def __init__(self, folder: Path, manifest: Manifest, split: str, *, num_levels: int | None = None) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        self.manifest = manifest
        self.num_levels = num_levels or manifest.num_levels
        names = [column_name(level) for level in range(self.num_levels)] + ["label"] * bool(manifest.class_names)
        expected = manifest.num_train if split == "train" else manifest.num_validation
        try:
            table = pa.concat_tables([pq.read_table(path, columns=names) for path in sorted((folder / split).glob("*.parquet"))]) if expected else None
        except (OSError, pa.ArrowException) as error:
            raise UserError(f"{folder / split} has a broken shard ({error}): remove it and run vqvae2 extract again.") from None
        if table is not None and (len(table) != expected or table.column_names != names):
            raise UserError(f"{folder / split} holds {len(table)} rows of {table.column_names}, but its manifest says {expected} of {names}: extract again.")
        self.codes = [self._read(folder / split, table, level) for level in range(self.num_levels)]
        self.labels = self._read_labels(folder / split, table)

    def _read(self, folder: Path, table: Any, level: int) -> Tensor:
        """A level's codes as `(N, h*w)`, in the type they are stored in."""
        height, width = self.manifest.grids[level]
        if table is None:
            return torch.zeros(0, height * width, dtype=torch.int64)
        flat = table[column_name(level)].combine_chunks().flatten().to_numpy()
        size = self.manifest.codebook_sizes[level]
        if len(flat) != len(table) * height * width or flat.max() >= size:
            raise UserError(
                f"{folder}: {column_name(level)} holds {len(flat)} codes up to {flat.max()}, but {len(table)} grids of {height} x {width} below {size} are due."
            )
        return torch.from_numpy(flat.reshape(len(table), -1).copy())

    def _read_labels(self, folder: Path, table: Any) -> Tensor | None:
        if table is None or not self.manifest.class_names:
            return None
        labels = table["label"].to_numpy().astype(np.int64)
        if labels.min() < 0 or labels.max() >= len(self.manifest.class_names):
            raise UserError(
                f"{folder}: labels reach from {labels.min()} to {labels.max()}, but there are {len(self.manifest.class_names)} classes: extract again."
            )
        return torch.from_numpy(labels)

    def __len__(self) -> int:
        return len(self.codes[0])

    def __getitems__(self, indices: Sequence[int]) -> dict[str, Any]:
        chosen = torch.as_tensor(indices)
        grids = self.manifest.grids[: self.num_levels]
        batch: dict[str, Any] = {"codes": [rearrange(c[chosen].long(), "b (h w) -> b h w", h=h) for c, (h, _) in zip(self.codes, grids, strict=True)]}
        if self.labels is not None:
            batch["labels"] = self.labels[chosen]
        return batch

    def unigram_bits(self, level: int) -> float:
        """Entropy in bits of a level's code frequencies: what a code costs when each is coded alone, knowing the frequencies."""
        counts = torch.bincount(self.codes[level].flatten().long()).double()
        return torch.special.entr(counts / counts.sum()).sum().item() / float(np.log(2))
