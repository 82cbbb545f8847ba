"""A set of samples in a folder: an image file each, a sheet of them, and what draws it again."""

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from zipfile import BadZipFile, ZipFile

import numpy as np
from PIL.Image import Image
from torch import Tensor

from pipelines.conditions import CONDITIONS_NAME, as_numbers
from pipelines.config import DrawConfig
from pipelines.editing import repeat_known
from pipelines.file_names import sample_name
from pipelines.labels import Labels
from pipelines.pictures import MOST_NAMES, sample_sheet
from pipelines.pipeline import VQVAE2Pipeline
from pipelines.receipts import RECEIPT_NAME, ImageReceipt, SetReceipt, call_options, converted
from prior.config import PriorConfig
from prior.sampling import Known, SamplingConfig, check_guidance, in_lanes
from vqvae2.common.accelerate import processes
from vqvae2.common.config import to_dict
from vqvae2.common.errors import UserError
from vqvae2.common.files import whole_file, write_json
from vqvae2.common.messages import progress_bar
from vqvae2.common.pictures import file_suffix, save_image, save_picture, to_pil
from vqvae2.common.threads import OwnCpus
from vqvae2.data import load_picture, read_picture_file, to_images

NPZ_NAME = "samples.npz"
logger = logging.getLogger(__name__)


def samplings_of(config: DrawConfig, priors: Sequence[PriorConfig]) -> list[SamplingConfig]:
    """How the codes of each level are drawn. Raises a `UserError` for settings that do not suit the
    number of levels, or guidance of priors that cannot be guided."""
    names = ("temperature", "top_k", "top_p", "min_p", "guidance_scale")
    settings = {name: getattr(config, name) for name in names}
    samplings = SamplingConfig.per_level(len(priors), **settings)
    for prior, sampling in zip(priors, samplings, strict=True):
        check_guidance(prior, sampling)
    return samplings


def write_samples(
    pipeline: VQVAE2Pipeline,
    output_dir: str | Path,
    receipt: SetReceipt,
    *,
    vectors: Tensor | None = None,
    known: Sequence[Known | None] = (),
    front: Mapping[str, Image] | None = None,
    only: Sequence[int] | None = None,
    npz: bool = False,
    codes: bool = False,
) -> list[Path]:
    """Write the samples of a receipt (see `make_receipt`) as files in images/, beside it a sheet of
    them and receipt.json, and, if asked for, samples.npz for evaluators and each image's codes in
    codes/. Files that exist are not made again, and processes share the work. `vectors` are the
    conditions `(N, V)` that images take in turn, and are kept in a file; `known` codes that images
    start from, row i for image i, or one for all; `front` pictures that the sheet shows
    before them, by name; `only` the indices of a part of the images, instead of all (of which there
    is no receipt.json). Returns the images' files."""
    # The files, and the label of each.
    folder, state, num_images = Path(output_dir), processes(), receipt.num_images
    labels: Labels = list(receipt.labels) or None
    numbers, names = pipeline.label_numbers(labels), [*pipeline.class_names, "none"]
    settings = pipeline.vqvae.config.image
    suffix = file_suffix(settings.channels, settings.value_range)
    indices = range(num_images) if only is None else only
    files = {i: folder / "images" / f"{sample_name(i)}{suffix}" for i in indices}

    # Find the batches of which a file is missing, all processes before the first one writes.
    unfinished = []
    for batch in in_lanes(range(max(indices) + 1), receipt.lanes):
        needed = [files[i] for i in batch if i in files]
        needed += [codes_file(file) for file in needed] if codes else []
        if not all(file.exists() for file in needed):
            unfinished.append(batch)
    state.wait_for_everyone()
    own = unfinished[state.process_index :: state.num_processes]
    bar = progress_bar(total=sum(map(len, own)), desc="sampling", unit="image")
    options = {"labels": labels, "conditions": vectors, **call_options(receipt)}
    own_cpus = OwnCpus(bind=state.device.type == "cpu")
    for batch in own:
        own_cpus.warn()
        options |= {"first_index": batch.start, "known": repeat_known(known, batch)}
        with own_cpus:
            made = pipeline(len(batch), **options)
        for i, grids in zip(batch, zip(*made.codes, strict=True), strict=True) if codes else ():
            arrays = [grid.numpy().astype(np.uint32) for grid in grids]
            with whole_file(codes_file(files[i])) as aside, open(aside, "wb") as file:
                np.savez(file, *arrays)
        for i, image in zip(batch, made.images, strict=True):
            if i in files:
                label = names[numbers[i % len(numbers)]] if numbers else None
                vector = as_numbers(vectors[i % len(vectors)]) if vectors is not None else None
                given: Any = {"index": i, "label": label, "vector": vector}
                own_receipt = converted(ImageReceipt, receipt, **given)
                note = json.dumps(to_dict(own_receipt))
                save_image(image, files[i], settings.value_range, note)
        bar.update(len(batch))
    bar.close()
    state.wait_for_everyone()
    if not state.is_main_process:
        return [*files.values()]

    # Show some of them by class, and collect all of them for evaluators.
    period = len(numbers) or 1
    shown = [i for i in indices if i % period < MOST_NAMES][: max(64, 8 * min(MOST_NAMES, period))]
    pictures = [to_pil(to_images(load_picture(str(files[i]), settings)))[0] for i in shown]
    names[-1] = "no label"
    rows = [names[numbers[i % period]] for i in shown] if numbers else []
    if only is None:
        write_json(folder / RECEIPT_NAME, to_dict(receipt))
        if vectors is not None:
            with whole_file(folder / CONDITIONS_NAME) as aside, open(aside, "wb") as file:
                np.save(file, vectors.numpy())
    sheet = sample_sheet(pictures, rows, front)
    of_set = json.dumps(to_dict(receipt)) if only is None else None
    save_picture(sheet, folder / "samples.png", of_set)
    if npz or (folder / NPZ_NAME).exists():
        _write_npz(files, numbers, folder / NPZ_NAME)
    logger.info(f"{folder / 'images'}: {len(files)} samples; {folder / 'samples.png'} shows some.")
    return [*files.values()]


def load_codes(image: Path) -> list[np.ndarray]:
    """The codes of a sample that were kept beside its file, an array `(h, w)` per level."""
    path = codes_file(image)
    try:
        with np.load(path) as arrays:
            return list(arrays.values())
    except (OSError, ValueError, BadZipFile):
        raise UserError(f"{path} cannot be read: remove it, and it is made anew.") from None


def codes_file(image: Path) -> Path:
    """Where the codes of a sample are kept, if they are."""
    return image.parents[1] / "codes" / f"{image.stem}.npz"


def _write_npz(files: Mapping[int, Path], labels: Sequence[int], path: Path) -> None:
    """The layout of the evaluators of guided-diffusion: arr_0 images, arr_1 labels."""
    # Images come one by one: all of them may take more memory than there is.
    first = np.asarray(read_picture_file(str(next(iter(files.values())))))
    shape = (len(files), *first.shape, *([1] if first.ndim == 2 else []))
    descr = np.lib.format.dtype_to_descr(first.dtype)
    header = {"descr": descr, "fortran_order": False, "shape": shape}
    with whole_file(path) as aside, ZipFile(aside, "w") as archive:
        with archive.open("arr_0.npy", "w", force_zip64=True) as entry:
            np.lib.format.write_array_header_1_0(entry, header)
            for file in files.values():
                entry.write(np.asarray(read_picture_file(str(file))).tobytes())
        if labels:
            with archive.open("arr_1.npy", "w") as entry:
                of_images = np.array([labels[i % len(labels)] for i in files])
                np.lib.format.write_array(entry, of_images)
