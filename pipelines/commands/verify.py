"""`vqvae2 verify`: images of `vqvae2 sample`, drawn again by the receipts that they hold."""

import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from accelerate.utils import gather_object

from pipelines.config import VerifyConfig
from pipelines.editing import repeat_known
from pipelines.pipeline import VQVAE2Pipeline
from pipelines.receipts import (
    ImageReceipt,
    Origin,
    call_options,
    known_codes,
    load_pipeline,
    make_origin,
    read_receipt,
)
from prior.sampling import Known
from vqvae2.common.accelerate import processes
from vqvae2.common.errors import UserError
from vqvae2.common.messages import progress_bar
from vqvae2.common.pictures import difference, to_pixels
from vqvae2.common.threads import set_threads

Batch = list[tuple[Path, ImageReceipt]]  # images of one set whose lanes lie side by side


def verify(config: VerifyConfig) -> int:
    """Say whether all images are what the pipeline draws; the exit code is 1 if one is not."""
    # The files and their receipts, before anything is drawn. Copies are drawn another time.
    state, pipeline = processes(), load_pipeline(config).to(processes().device)
    known = known_codes(config, pipeline.vqvae)
    own, seen = make_origin(pipeline, known), Counter[ImageReceipt]()
    batches: dict[Any, Batch] = defaultdict(list)
    for path in find_files(config.files):
        receipt, _ = read_receipt(path)
        receipt.refuse_other(own, str(path))
        lane = replace(receipt, label=None, vector=None)
        seen[lane] += 1
        batch = replace(lane, index=first_of(receipt)), seen[lane]
        batches[batch].append((path, receipt))

    # Draw them again, each batch by one of the processes.
    share = [*batches.values()][state.process_index :: state.num_processes]
    bar = progress_bar(total=sum(map(len, share)), desc="verifying", unit="image")
    differing: list[str] = []
    for members in share:
        differing += redraw(pipeline, members, known, own)
        bar.update(len(members))
    bar.close()
    differing = gather_object(differing)

    # Say what was found.
    if state.is_main_process:
        number = sum(map(len, batches.values()))
        equal = f"{number - len(differing)} of {number} images are what the pipeline draws"
        for line in sorted(differing):
            print(line)
        print(f"{'no' if differing else 'yes'}: {equal}, in every pixel.")
    return 1 if differing else 0


def first_of(receipt: ImageReceipt) -> int:
    """The index of the first image that is drawn together with this one."""
    return receipt.index // receipt.lanes * receipt.lanes


def redraw(
    pipeline: VQVAE2Pipeline, batch: Batch, known: Sequence[Known | None], own: Origin
) -> list[str]:
    """A line for each image of a batch that is drawn otherwise: its name, and how it differs."""
    # All lanes, of which those without a file have any label, as nothing depends on them.
    receipt, value_range = batch[0][1], pipeline.vqvae.config.image.value_range
    labels, vectors = [receipt.label] * receipt.lanes, [receipt.vector] * receipt.lanes
    for _, other in batch:
        labels[other.index % other.lanes] = other.label
        vectors[other.index % other.lanes] = other.vector
    images = range(first_of(receipt), first_of(receipt) + receipt.lanes)
    options = {**call_options(receipt), "known": repeat_known(known, images)}
    options["labels"] = labels if any(labels) or pipeline.class_names else None
    if any(vectors):
        hidden = (math.nan,) * pipeline.vector_size
        options["conditions"] = [list(vector or hidden) for vector in vectors]
    set_threads(receipt.num_threads)
    try:
        drawn = pipeline(receipt.lanes, first_index=first_of(receipt), **options).images
    except UserError as error:  # a receipt that was changed
        how = f"its receipt asks for the impossible ({str(error).rstrip('.')})"
        return [f"{path}: no: {how}." for path, _ in batch]

    # Their pixels.
    lines = []
    for path, each in batch:
        expected = to_pixels(drawn[each.index % each.lanes], value_range)
        if how := difference(read_receipt(path)[1], expected, value_range):
            lines.append(f"{path}: no: {'; '.join(filter(None, [how, each.elsewhere(own)]))}.")
    return lines


def find_files(names: Sequence[str]) -> list[Path]:
    """The images that are named, or lie in folders that are: in those of a set in its images/.
    Raises a `UserError` for a folder without any."""
    found: list[Path] = []
    for path in map(Path, names):
        folder = path / "images" if (path / "images").is_dir() else path
        inside = sorted(file for file in folder.glob("*") if file.suffix in (".png", ".tif"))
        if path.is_dir() and not inside:
            raise UserError(
                f"{folder} holds no image: give images of vqvae2 sample, or its folder."
            )
        found += inside or [path]
    return list(dict.fromkeys(found))
