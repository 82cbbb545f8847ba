"""Decode and resize images once: `vqvae2 prepare`. The layout is described in `vqvae2.data.prepared`."""

import json
import os
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from tqdm.auto import tqdm

from vqvae2.common.accelerate import processes
from vqvae2.common.config import to_dict
from vqvae2.common.errors import UserError
from vqvae2.common.files import whole_file, write_json
from vqvae2.common.runs import RunRecord, last_names
from vqvae2.config import PrepareConfig, PreprocessingConfig
from vqvae2.data.parts import SPLITS, Part, ReadItem, find_parts, read_items
from vqvae2.data.prepared import MANIFEST_NAME, RECORD_NAME, PreparedManifest, shard_place
from vqvae2.data.skipping import list_skipped, report_skipped

ROW_GROUP = 256  # rows that are written, and held in memory, at once


def prepare_command(config: PrepareConfig) -> None:
    """Write the prepared images; continue, or do nothing if they are finished. Processes share the work.

    Raises:
        UserError: bad images, or an output folder that holds another run.
    """
    output_dir, state = Path(config.output_dir), processes()
    found = find_parts(config.data, config.image, config.shard_size)
    run = RunRecord("prepare", config, RECORD_NAME, facts=found.facts)
    run.check(output_dir)
    state.wait_for_everyone()
    if state.is_main_process:
        run.write(output_dir)
    state.wait_for_everyone()
    mine = found.parts[state.process_index :: state.num_processes]
    sizes = [part.num_items for part in mine]
    known = [size for size in sizes if size is not None]
    total = sum(known) if len(known) == len(sizes) else None
    num_threads, skip = config.num_threads or os.cpu_count() or 1, config.data.on_error == "skip"
    began, number = time.perf_counter(), 0
    with tqdm(
        total=total, desc="preparing", unit="image", disable=not state.is_main_process
    ) as bar:
        for part in mine:
            if all(
                shard_place(part.path(output_dir, split)) == f"{split}/{part.number:05d}"
                for split in part.splits
            ):
                bar.update(part.num_items or 0)
                continue
            rows = read_items(
                part.items(), lambda split: [None], skip=skip, num_threads=num_threads
            )
            for count in write_part(part, output_dir, rows, config.image):
                bar.update(count)
                number += count
    rate = number / (time.perf_counter() - began)
    state.wait_for_everyone()
    if state.is_main_process:
        _finish(output_dir, config, found.class_names, rate)
    state.wait_for_everyone()


def write_part(
    part: Part, output_dir: Path, rows: Iterator[ReadItem], image: PreprocessingConfig
) -> Iterator[int]:
    """Write a part's shards, each whole or not at all, and yield how many images were added."""
    kind = pa.uint8() if image.value_range == (0, 255) else pa.float32()
    height, width = image.height_width
    schema = pa.schema(
        {
            "id": pa.string(),
            "label": pa.int64(),
            "pixels": pa.list_(kind, image.channels * height * width),
        }
    )
    skipped: dict[str, list[tuple[str, str]]] = {split: [] for split in part.splits}
    with ExitStack() as stack:
        writers = {}
        for split in reversed(part.splits):
            path = stack.enter_context(whole_file(part.path(output_dir, split)))
            writers[split] = stack.enter_context(
                pq.ParquetWriter(
                    path,
                    schema,
                    compression="zstd",
                    compression_level=1,
                    use_dictionary=["id", "label"],
                )
            )
        waiting: dict[str, list[ReadItem]] = {split: [] for split in part.splits}
        for row in rows:
            split = row.item.split
            if row.error is not None:
                skipped[split].append((row.error.name, row.error.reason))
                continue
            waiting[split].append(row)
            if len(waiting[split]) == ROW_GROUP:
                _write_rows(writers[split], waiting[split])
                yield len(waiting[split])
                waiting[split] = []
        for split, rest in waiting.items():
            _write_rows(writers[split], rest)
            writers[split].add_key_value_metadata(
                {"skipped": json.dumps(skipped[split]), "place": f"{split}/{part.number:05d}"}
            )
            yield len(rest)


def _write_rows(writer: pq.ParquetWriter, rows: list[ReadItem]) -> None:
    if not rows:
        return
    pixels = np.stack([row.pixels[0] for row in rows]).reshape(len(rows), -1)
    columns = {
        "id": [row.item.id for row in rows],
        "label": [row.item.label for row in rows],
        "pixels": pa.FixedSizeListArray.from_arrays(pa.array(pixels.reshape(-1)), pixels.shape[1]),
    }
    writer.write_table(pa.table(columns, schema=writer.schema))


def _finish(
    output_dir: Path, config: PrepareConfig, class_names: tuple[str, ...] | None, rate: float
) -> None:
    """Write the manifest, which says that all shards are there, and tell the user."""
    numbers, skipped, highest = dict.fromkeys(SPLITS, 0), [], -1
    with_label: list[Path] = []
    without: list[Path] = []
    for split in SPLITS:
        for path in sorted((output_dir / split).glob("*.parquet")):
            file = pq.ParquetFile(path)
            numbers[split] += file.metadata.num_rows
            skipped += [
                tuple(pair)
                for pair in json.loads((file.metadata.metadata or {}).get(b"skipped", b"[]"))
            ]
            labels = file.read(columns=["label"])["label"]
            without += [path] * (labels.null_count > 0)
            with_label += [path] * (labels.null_count < len(labels))
            highest = max([highest, *labels.drop_null().to_pylist()])
    if with_label and without:
        raise UserError(
            f"{config.data.path}: {without[0]} holds images without a label, but {with_label[0]} some with one: label all images, or none."
        )
    if not numbers["train"]:
        raise UserError(
            f"{config.data.path}: none of the training images can be read: check data.path."
        )
    has_labels = bool(with_label)
    manifest = PreparedManifest(
        source=last_names(config.data.path),
        image=config.image,
        class_names=tuple(map(str, range(highest + 1)))
        if class_names is None and has_labels
        else class_names or (),
        has_labels=has_labels,
        num_train=numbers["train"],
        num_validation=numbers["validation"],
        num_skipped=len(skipped),
    )
    list_skipped(output_dir, skipped)
    write_json(output_dir / MANIFEST_NAME, to_dict(manifest))
    size = sum(path.stat().st_size for path in output_dir.rglob("*.parquet"))
    said = report_skipped(output_dir)
    speed = f", {rate:.0f} images/s" if rate else ", nothing new"
    print(
        f"{output_dir}: {sum(numbers.values())} images in {size / 2**20:.1f} MiB{speed}. {said}".strip()
    )
