"""`vqvae2 verify`: images of `vqvae2 sample`, drawn again by the receipts that they hold."""

import dataclasses
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path

from accelerate.utils import gather_object

from pipelines.config import VerifyConfig
from pipelines.editing import repeat_known
from pipelines.pipeline import VQVAE2Pipeline
from pipelines.receipts import (
    ImageReceipt,
    call_options,
    known_codes,
    load_pipeline,
    make_origin,
    read_receipt,
)
from prior.sampling import Known
from vqvae2.common.accelerate import processes
from vqvae2.common.config import check
from vqvae2.common.errors import UserError
from vqvae2.common.messages import progress_bar
from vqvae2.common.pictures import difference, to_pixels
from vqvae2.common.threads import set_threads

Batch = list[tuple[Path, ImageReceipt]]  # images of one set whose lanes lie side by side


def verify(config: VerifyConfig) -> int:
    """Say whether all images are what the pipeline draws; the exit code is 1 if one is not."""
    # What is at hand, and the receipts of all files, before anything is drawn.
    state, pipeline = processes(), load_pipeline(config).to(processes().device)
    known = known_codes(config, pipeline.vqvae)
    own, labels = make_origin(pipeline, known), [*pipeline.class_names, "none"]
    batches: dict[ImageReceipt, Batch] = defaultdict(list)
    seen = Counter[ImageReceipt]()
    for path in find_files(config.files):
        receipt, _ = read_receipt(path)
        receipt.refuse_other(own, str(path))
        allowed = labels if len(labels) > 1 else [None]
        check(receipt.label in allowed, f"{path}: label", receipt.label, "a class of the pipeline")
        seen[lane := dataclasses.replace(receipt, label=None)] += 1
        first, turn = receipt.index // receipt.lanes * receipt.lanes, str(seen[lane])
        batches[dataclasses.replace(lane, index=first, label=turn)].append((path, receipt))

    # Draw them again, each batch by one of the processes.
    share = [*batches.values()][state.process_index :: state.num_processes]
    bar = progress_bar(total=sum(map(len, share)), desc="verifying", unit="image")
    differing: list[tuple[str, str]] = []
    for batch in share:
        differing += redraw(pipeline, batch, known)
        bar.update(len(batch))
    bar.close()
    differing = gather_object(differing)

    # Say what was found.
    if state.is_main_process:
        number = sum(map(len, batches.values()))
        for name, how in sorted(differing):
            print(f"{name}: no: {how}.")
        equal = f"{number - len(differing)} of {number} images are what the pipeline draws"
        print(f"{'no' if differing else 'yes'}: {equal}, in every pixel.")
        names, members = dict(differing), [one for batch in batches.values() for one in batch]
        remarks = {receipt.elsewhere(own) for path, receipt in members if str(path) in names}
        for remark in sorted(remarks - {""}):
            print(remark)
    return 1 if differing else 0


def redraw(
    pipeline: VQVAE2Pipeline, batch: Batch, known: Sequence[Known | None]
) -> list[tuple[str, str]]:
    """Those images of a batch that are drawn otherwise: their names, and how they differ."""
    # All of its lanes; those of which there is no file have any label.
    receipt, image = batch[0][1], pipeline.vqvae.config.image
    labels = [receipt.label] * receipt.lanes
    for _, other in batch:
        labels[other.index % receipt.lanes] = other.label
    options = {**call_options(receipt), "known": repeat_known(known, receipt.lanes)}
    options["first_index"] = receipt.index // receipt.lanes * receipt.lanes
    options["labels"] = labels if pipeline.class_names else None
    set_threads(receipt.num_threads)
    try:
        drawn = pipeline(receipt.lanes, **options).images
    except UserError as error:  # a receipt that was changed
        how = f"its receipt asks for the impossible ({str(error).rstrip('.')})"
        return [(str(path), how) for path, _ in batch]

    # Their pixels.
    found = []
    for path, own in batch:
        expected = to_pixels(drawn[own.index % own.lanes], image.value_range)
        found.append((str(path), difference(read_receipt(path)[1], expected, image.value_range)))
    return [(name, how) for name, how in found if how]


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
