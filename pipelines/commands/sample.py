"""`vqvae2 sample`: new images as files."""

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any
from zipfile import BadZipFile, ZipFile

import numpy as np
from PIL.Image import Image
from torch import Tensor

from pipelines.conditions import CONDITIONS_NAME, as_numbers, read_conditions
from pipelines.config import SampleConfig, SetConfig
from pipelines.editing import for_masks, repeat_known
from pipelines.file_names import sample_files, sample_name
from pipelines.labels import Labels
from pipelines.pictures import MOST_NAMES, sample_sheet
from pipelines.pipeline import VQVAE2Pipeline
from pipelines.receipts import (
    RECEIPT_NAME,
    ImageReceipt,
    SetReceipt,
    call_options,
    converted,
    known_codes,
    load_pipeline,
    make_receipt,
)
from pipelines.rejection import choose, chosen_elsewhere, with_rejection
from prior.sampling import SAMPLER_VERSION, Known, SamplingConfig, check_guidance, in_lanes
from vqvae2.common.accelerate import on_main_process, processes
from vqvae2.common.config import from_dict, to_dict
from vqvae2.common.errors import UserError
from vqvae2.common.files import read_json, whole_file, write_json
from vqvae2.common.lock import writes_output
from vqvae2.common.messages import progress_bar
from vqvae2.common.pictures import file_suffix, save_image, save_picture, to_pil
from vqvae2.common.runs import RunRecord, read_record
from vqvae2.common.threads import OwnCpus, set_threads
from vqvae2.config import PreprocessingConfig
from vqvae2.data import load_picture, read_picture_file, to_images

NPZ_NAME = "samples.npz"
logger = logging.getLogger(__name__)


@writes_output
def sample(config: SampleConfig) -> None:
    """Write samples as the configuration says; a folder with other settings' samples is refused."""
    # The settings, or a receipt's; the pipeline, and the codes of an image that is edited.
    wanted, file = None, config.receipt
    if file is not None:
        if not (Path(file).is_file() and Path(file).suffix == ".json"):
            raise UserError(f"--receipt {file} is no JSON file: give a set's {RECEIPT_NAME}.")
        wanted = from_dict(SetReceipt, read_json(Path(file)), file)
        settings = {field.name: getattr(wanted, field.name) for field in fields(SetConfig)}
        config = replace(config, receipt=None, **settings)
    set_threads(config.num_threads)
    pipeline = load_pipeline(config)
    pipeline.warn_of_noise()
    pipeline.to(processes().device)
    known = known_codes(config, pipeline.vqvae)
    labels: Labels = list(config.labels) or None
    if known:
        labels = pipeline.hidden_unless_given(labels)

    # Refuse wrong settings, and another run's folder, before anything is written.
    names = ("temperature", "top_k", "top_p", "min_p", "guidance_scale")
    samplings = SamplingConfig.per_level(
        len(pipeline.priors), **{name: getattr(config, name) for name in names}
    )
    for prior, sampling in zip(pipeline.priors, samplings, strict=True):
        check_guidance(prior.config, sampling)
    given, beside = config.conditions, Path(file or "receipt").with_name(CONDITIONS_NAME)
    if wanted is not None and wanted.conditions_hash and not (config.attributes or given):
        if not beside.exists():
            what = f"the set of {file} was drawn with conditions, which are in {CONDITIONS_NAME}"
            raise UserError(f"{what}: put that beside it, or give --conditions.")
        given = str(beside)
    vectors = pipeline.as_vectors(read_conditions(given, config.attributes))
    receipt = make_receipt(pipeline, config, labels=labels, vectors=vectors, known=known)
    if wanted is not None and wanted.conditions_hash != receipt.conditions_hash:
        what = f"the set of {file} was drawn with other conditions"
        raise UserError(f"{what}: give those beside it, {beside}, or none if there are none.")
    if wanted is not None:
        wanted.refuse_other(receipt, f"the set of {file}")
        if remark := wanted.elsewhere(receipt):
            logger.warning("The set was %s.", remark)
    folder, new = Path(config.output_dir), SAMPLER_VERSION
    facts = {**pipeline.content_hashes(), "known_hash": receipt.known_hash, "sampler_version": new}
    facts["conditions_hash"] = receipt.conditions_hash
    run = RunRecord("sample", config, "sample_config.yaml", facts=facts)
    run = with_rejection(config, run, pipeline) if config.reject else run
    record = folder / run.file_name
    if (begun := read_record(record).get("sampler_version", 1) if record.exists() else new) != new:
        what = f"{folder} holds a set of version {begun} of the sampler, but this is version {new}"
        advice = "which draws other images of the same seed: choose another --output-dir"
        raise UserError(f"{what}, {advice}.")
    run.check(folder)
    if config.reject is None:
        _refuse_fewer(folder, config.num_images)
    else:
        chosen_elsewhere(config, run)
    processes().wait_for_everyone()
    on_main_process(processes(), lambda: run.write(folder))

    # Sample; with a classifier, first the candidates among which it chooses.
    options: dict[str, Any] = {"known": known, "front": _given(config, pipeline.vqvae.config.image)}
    options["vectors"] = vectors
    if config.reject is not None:

        def draw(candidates: Path, number: int) -> None:
            of_all = replace(receipt, num_images=number)
            write_samples(pipeline, candidates, of_all, **options)

        numbers = pipeline.label_numbers(list(receipt.labels) or None)
        options["only"] = choose(config, run, pipeline, numbers, draw)
    write_samples(pipeline, folder, receipt, npz=config.npz, **options)


def _refuse_fewer(folder: Path, number: int) -> None:
    """Raise a `UserError` where a set of more images would be left half described."""
    there = sample_files(folder)
    if max(there, default=-1) >= number:
        what = f"{folder} holds {len(there)} samples, more than --num-images {number}"
        raise UserError(f"{what}: ask for as many or more, or choose another --output-dir.")


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


def _given(config: SampleConfig, settings: PreprocessingConfig) -> dict[str, Image]:
    """The image that is edited, and its mask if there is one, as the pipeline sees them."""
    files = {"original": (config.init_image, settings), "mask": (config.mask, for_masks(settings))}
    given = {}
    for name, (file, how) in files.items():
        if file is not None:
            given[name] = to_pil(to_images(load_picture(file, how)))[0]
    return given


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
