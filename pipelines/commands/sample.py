"""`vqvae2 sample`: new images as files."""

import logging
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL.Image import Image

from pipelines.config import LANES, SampleConfig
from pipelines.editing import for_masks, keep_levels, known_outside, repeat_known
from pipelines.labels import Labels, hidden_unless_given
from pipelines.pictures import sample_sheet
from pipelines.pipeline import VQVAE2Pipeline
from pipelines.rejection import choose, with_rejection
from prior.sampling import Known, SamplingConfig, in_lanes
from vqvae2.common.accelerate import processes
from vqvae2.common.artifact import content_hash
from vqvae2.common.errors import UserError
from vqvae2.common.files import whole_file
from vqvae2.common.lock import writes_output
from vqvae2.common.messages import progress_bar
from vqvae2.common.pictures import file_suffix, save_image, save_picture, to_pil
from vqvae2.common.runs import RunRecord
from vqvae2.common.threads import OwnCpus, set_threads
from vqvae2.config import PreprocessingConfig
from vqvae2.data import load_picture, read_picture_file, to_images

logger = logging.getLogger(__name__)
SETTINGS = ("temperature", "top_k", "top_p", "min_p", "guidance_scale")


@writes_output
def sample(config: SampleConfig) -> None:
    """Write samples as the configuration says; a folder with other settings' samples is refused."""
    # The pipeline, and the codes of an image that is edited.
    set_threads(config.num_threads)
    if config.pipeline is not None:
        pipeline = VQVAE2Pipeline.from_pretrained(config.pipeline)
    elif config.vqvae is None or not config.priors:
        raise UserError("nothing to load: give --pipeline, or --vqvae and --priors (top first).")
    else:
        pipeline = VQVAE2Pipeline.from_parts(config.vqvae, config.priors)
    pipeline.warn_of_noise()
    pipeline.to(processes().device)
    known: list[Known | None] = []
    front: dict[str, Image] = {}
    labels: Labels = list(config.labels) or None
    if config.init_image is not None:
        image = pipeline.vqvae, config.init_image
        if config.mask is not None:
            known = [*known_outside(*image, config.mask)]
        else:
            known = keep_levels(*image, 1 if config.keep_levels is None else config.keep_levels)
        front = _given(config, pipeline.vqvae.config.image)
        labels = hidden_unless_given(labels, can_hide=pipeline.can_hide_labels)

    # Refuse wrong settings, and another run's folder, before anything is written.
    settings = {name: getattr(config, name) for name in SETTINGS}
    SamplingConfig.per_level(len(pipeline.priors), **settings)
    pipeline.label_numbers(labels)
    tensors = [(str(i), tensor) for i, level in enumerate(known) for tensor in level or ()]
    facts = {**pipeline.content_hashes(), "known_hash": content_hash({}, tensors)}
    run, folder = RunRecord("sample", config, "sample_config.yaml", facts=facts), config.output_dir
    run = with_rejection(config, run) if config.reject else run
    run.check(Path(folder))
    processes().wait_for_everyone()
    if processes().is_main_process:
        run.write(Path(folder))

    # Sample; with a classifier, first the candidates among which it chooses.
    settings |= {name: getattr(config, name) for name in ("seed", "lanes", "bf16", "npz")}
    settings |= {"labels": labels, "known": known, "front": front}
    settings |= {"compiled": None if config.compile == "auto" else config.compile}
    settings |= {"parallel_positions": config.parallel_positions}
    if config.reject is not None:
        draw = partial(write_samples, pipeline, **{**settings, "npz": False})
        numbers = pipeline.label_numbers(labels)
        settings["only"] = choose(config, run, pipeline, numbers, draw)
    write_samples(pipeline, folder, config.num_images, **settings)


def write_samples(
    pipeline: VQVAE2Pipeline,
    output_dir: str | Path,
    num_images: int,
    *,
    labels: Labels = None,
    lanes: int = LANES,
    known: Sequence[Known | None] = (),
    front: Mapping[str, Image] | None = None,
    only: Sequence[int] | None = None,
    npz: bool = False,
    codes: bool = False,
    **options: Any,
) -> list[Path]:
    """Write samples as files in images/, a sheet of them beside it, and samples.npz for evaluators
    if asked for, and each image's codes in codes/. Files that exist are not made again, and
    processes share the work. `known` are codes that images start from, row i for image i, or one
    for all; `front` pictures that the sheet shows before them, by name; `only` the indices of a
    part of the images, instead of all; for the others see `VQVAE2Pipeline.__call__`. Returns the
    images' files."""
    # The files, and the label of each.
    folder, state, numbers = Path(output_dir), processes(), pipeline.label_numbers(labels)
    settings = pipeline.vqvae.config.image
    suffix = file_suffix(settings.channels, settings.value_range)
    indices = range(num_images) if only is None else only
    files = {i: folder / "images" / f"{i:06d}{suffix}" for i in indices}
    if state.is_main_process:  # images lay beside the sheet once
        for old in folder.glob(f"{6 * '[0-9]'}{suffix}"):
            (folder / "images").mkdir(exist_ok=True)
            old.rename(folder / "images" / old.name)
    state.wait_for_everyone()

    # Find the batches of which a file is missing, all processes before the first one writes.
    unfinished = []
    for batch in in_lanes(range(max(indices) + 1), lanes):
        if not all(files[i].exists() for i in batch if i in files):
            unfinished.append(batch)
    state.wait_for_everyone()
    own = unfinished[state.process_index :: state.num_processes]
    bar = progress_bar(total=sum(map(len, own)), desc="sampling", unit="image")
    options |= {"labels": labels, "lanes": lanes, "output_type": "pt"}
    own_cpus = OwnCpus(bind=state.device.type == "cpu")
    for batch in own:
        own_cpus.warn()
        options |= {"first_index": batch.start, "known": repeat_known(known, batch)}
        with own_cpus:
            made = pipeline(len(batch), **options)
        for i, grids in zip(batch, zip(*made.codes, strict=True), strict=True) if codes else ():
            arrays = [grid.numpy().astype(np.uint32) for grid in grids]
            with whole_file(_codes_file(files[i])) as aside, open(aside, "wb") as file:
                np.savez(file, *arrays)
        for i, image in zip(batch, made.images, strict=True):
            if i in files:
                save_image(image, files[i], settings.value_range)
        bar.update(len(batch))
    bar.close()
    state.wait_for_everyone()
    if not state.is_main_process:
        return [*files.values()]

    # Show some of them by class, and collect all of them for evaluators.
    period = len(numbers) or 1
    shown = [i for i in indices if i % period < 20][: max(64, 8 * min(20, period))]
    pictures = [to_pil(to_images(load_picture(str(files[i]), settings)))[0] for i in shown]
    names = [*pipeline.class_names, "no label"]
    rows = [names[numbers[i % period]] for i in shown] if numbers else []
    save_picture(sample_sheet(pictures, rows, front), folder / "samples.png")
    if npz:
        _write_npz(files, numbers, folder / "samples.npz")
    logger.info(f"{folder / 'images'}: {len(files)} samples; {folder / 'samples.png'} shows some.")
    return [*files.values()]


def load_codes(image: Path) -> list[np.ndarray]:
    """The codes of a sample that were kept beside its file, an array `(h, w)` per level."""
    with np.load(_codes_file(image)) as arrays:
        return list(arrays.values())


def _codes_file(image: Path) -> Path:
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
    images = np.stack([np.asarray(read_picture_file(str(file))) for file in files.values()])
    arrays = [images if images.ndim == 4 else images[..., None]]
    if labels:
        arrays.append(np.array([labels[i % len(labels)] for i in files]))
    with whole_file(path) as aside, open(aside, "wb") as file:
        np.savez(file, *arrays)
