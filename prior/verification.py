"""Whether the shards of a code dataset are what its manifest says."""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa

from prior.manifest import Manifest, check_range
from prior.shards import ShardRecord, check_file, content_hash, row_groups
from vqvae2.common.errors import UserError
from vqvae2.common.messages import progress_bar
from vqvae2.common.vocabulary import ORIGINAL, SPLITS


def problems(folder: Path, manifest: Manifest) -> Iterator[str]:
    """A sentence for everything that is wrong with the shards of a code dataset."""
    for split in SPLITS:
        # Each file for itself.
        shards = manifest.shards(split)
        for path in sorted((folder / split).glob("*.parquet")):
            if path.name not in {shard.name for shard in shards}:
                yield f"{path} is not in the manifest, but other readers would read it: remove it."
        keys: dict[Path, np.ndarray] = {}
        for shard in progress_bar(shards, f"verifying {split}", unit="shard", delay=3, leave=False):
            path = folder / split / shard.name
            try:
                check_file(path, shard)
                tables = row_groups(path, manifest.schema)
                table = pa.concat_tables([manifest.schema.empty_table(), *tables])
                names = zip(table["id"].to_pylist(), table["view"].to_pylist(), strict=True)
                keys[path] = np.fromiter(map(hash, names), np.int64)
                yield from _problems_of(path, manifest, shard, table)
            except UserError as error:
                yield str(error)

        # Rows whose id and view another row of the split has.
        all_keys = np.concatenate([np.zeros(0, np.int64), *keys.values()])
        unique, counts = np.unique(all_keys, return_counts=True)
        for path, own in keys.items() if len(unique) < len(all_keys) else ():
            rows = np.flatnonzero(np.isin(own, unique[counts > 1]))
            if len(rows):
                seen = f"{len(rows)} rows, the first of them row {rows[0]}, have an id and view"
                yield f"{path}: {seen} that another row of the split has: rename images."


def _problems_of(
    path: Path, manifest: Manifest, shard: ShardRecord, table: pa.Table
) -> Iterator[str]:
    """What is wrong with the rows of a shard whose bytes are those that were recorded."""
    rows, found = len(table), content_hash([table])
    if (rows, found) != (shard.rows, shard.content_hash):
        says = f"the manifest says {shard.rows} and {shard.content_hash[:12]}"
        yield f"{path} holds {rows} rows of content hash {found[:12]}, but {says}: extract again."
    views = (ORIGINAL,) if path.parent.name == "validation" else manifest.views
    counts = Counter(table["view"].to_pylist())
    if set(counts) - set(views) or len({counts[view] for view in views}) > 1:
        expected = f"expected equally many of {', '.join(views)}"
        yield f"{path} holds rows of these views: {dict(counts)}, {expected}: extract again."
    for name in manifest.schema.names:
        try:
            check_range(path, manifest, name, table[name])
        except UserError as error:
            yield str(error)
