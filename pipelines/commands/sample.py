"""`vqvae2 sample`: new images as files."""

import dataclasses
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pipelines.config import LANES, SampleConfig
from pipelines.editing import keep_levels, known_outside, repeat_known
from pipelines.pictures import sample_sheet
from pipelines.pipeline import VQVAE2Pipeline, in_lanes
from prior.sampling import Known
from vqvae2.common.accelerate import processes
from vqvae2.common.artifact import content_hash
from vqvae2.common.errors import UserError
from vqvae2.common.files import whole_file
from vqvae2.common.lock import writes_output
from vqvae2.common.messages import progress_bar
from vqvae2.common.pictures import file_suffix, save_image, save_picture, to_pil
from vqvae2.common.runs import RunRecord
from vqvae2.data import load_picture, picture_size, read_picture_file, to_images

logger = logging.getLogger(__name__)
SETTINGS = ("temperature", "top_k", "top_p", "min_p", "guidance_scale")
MANY_STEPS = 100_000  # at about 4 ms each, of which graphs save most, compiling is soon paid back


@writes_output
def sample(config: SampleConfig) -> None:
    """Write samples as the configuration says; a folder with other settings' samples is refused."""
    # The pipeline, and the codes of an image that is edited.
    if config.pipeline is not None:
        pipeline = VQVAE2Pipeline.from_pretrained(config.pipeline)
    elif config.vqvae is None or not config.priors:
        raise UserError("nothing to load: give --pipeline, or --vqvae and --priors (top first).")
    else:
        pipeline = VQVAE2Pipeline.from_parts(config.vqvae, config.priors)
    pipeline.to(processes().device)
    known: list[Known | None] = []
    labels = list(config.labels) or None
    if config.init_image is not None:
        known = known_codes(pipeline, config.init_image, config.mask, config.keep_levels)
        if labels is None and pipeline.can_hide_labels:
            labels = ["none"]  # the image may show anything

    # Refuse wrong settings, and another run's folder, before anything is written.
    settings = {name: getattr(config, name) for name in SETTINGS}
    pipeline.samplings(**settings)
    pipeline.label_numbers(labels)
    tensors = [(str(i), tensor) for i, level in enumerate(known) for tensor in level or ()]
    facts = {**pipeline.content_hashes(), "known_hash": content_hash({}, tensors)}
    run, folder = RunRecord("sample", config, "sample_config.yaml", facts=facts), config.output_dir
    run.check(Path(folder))
    processes().wait_for_everyone()
    if processes().is_main_process:
        run.write(Path(folder))

    # Sample.
    settings |= {name: getattr(config, name) for name in ("seed", "lanes", "bf16", "npz")}
    settings["compiled"] = config.compile
    write_samples(pipeline, folder, config.num_images, labels=labels, known=known, **settings)


def write_samples(
    pipeline: VQVAE2Pipeline,
    output_dir: str | Path,
    num_images: int,
    *,
    labels: Sequence[int | str] | None = None,
    lanes: int = LANES,
    known: Sequence[Known | None] = (),
    npz: bool = False,
    **options: Any,
) -> None:
    """Write samples as files, a sheet of them, and samples.npz for evaluators if asked for. Files
    that exist are not made again, and processes share the work. `known` are codes that all images
    start from, one row per level; for the others see `VQVAE2Pipeline.__call__`."""
    # The files, and the label of each.
    folder, state, numbers = Path(output_dir), processes(), pipeline.label_numbers(labels)
    settings = pipeline.vqvae.config.image
    suffix = file_suffix(settings.channels, settings.value_range)
    files = [folder / f"{i:06d}{suffix}" for i in range(num_images)]

    # Find the batches of which a file is missing, all processes before the first one writes.
    unfinished = []
    for batch in in_lanes(range(num_images), lanes):
        if not all(files[i].exists() for i in batch):
            unfinished.append(batch)
    state.wait_for_everyone()
    own = unfinished[state.process_index :: state.num_processes]
    steps = len(own) * sum(prior.config.num_positions for prior in pipeline.priors)
    if state.device.type == "cuda" and steps >= MANY_STEPS and not options.get("compiled"):
        logger.info("%d steps on each process: --compile would pay, if Triton is there.", steps)
    bar = progress_bar(total=sum(map(len, own)), desc="sampling", unit="image")
    options |= {"labels": labels, "lanes": lanes, "output_type": "pt"}
    for batch in own:
        options |= {"first_index": batch.start, "known": repeat_known(known, len(batch))}
        for i, image in zip(batch, pipeline(len(batch), **options).images, strict=True):
            save_image(image, files[i], settings.value_range)
        bar.update(len(batch))
    bar.close()
    state.wait_for_everyone()
    if not state.is_main_process:
        return

    # Show some of them by class, and collect all of them for evaluators.
    shown = range(min(num_images, 10 * min(20, max(6, len(numbers)))))
    pictures = [to_pil(to_images(load_picture(str(files[i]), settings)))[0] for i in shown]
    rows = [numbers[i % len(numbers)] for i in shown] if numbers else []
    names = [*pipeline.class_names, "no label"] if numbers else []
    save_picture(sample_sheet(pictures, rows, names), folder / "samples.png")
    if npz:
        _write_npz(files, numbers, folder / "samples.npz")
    logger.info(f"{folder}: {num_images} samples, and samples.png with {len(shown)} of them.")


def known_codes(
    pipeline: VQVAE2Pipeline, image: str, mask: str | None = None, num_levels: int | None = None
) -> list[Known | None]:
    """What of an image file is kept, one row per level: with a mask, the codes outside its white
    area, else its `num_levels` (1 for None) coarsest levels. Raises a `UserError` if a file cannot
    be read, or if image and mask differ in size."""
    settings, device = pipeline.vqvae.config.image, pipeline.priors[0].device
    images = to_images(load_picture(image, settings).to(device))
    if mask is None:
        return keep_levels(pipeline.vqvae, images, 1 if num_levels is None else num_levels)
    if picture_size(read_picture_file(mask)) != picture_size(read_picture_file(image)):
        raise UserError(f"{mask} and {image} differ in size: paint the mask over the image itself.")
    grey = dataclasses.replace(settings, channels=1, background="black", value_range=(0, 255))
    painted = load_picture(mask, grey).to(device)[:, 0] > 127
    return [*known_outside(pipeline.vqvae, images, painted)]


def _write_npz(files: Sequence[Path], labels: Sequence[int], path: Path) -> None:
    """The layout of the evaluators of guided-diffusion: arr_0 images, arr_1 labels."""
    images = np.stack([np.asarray(read_picture_file(str(file))) for file in files])
    arrays = [images if images.ndim == 4 else images[..., None]]
    if labels:
        arrays.append(np.array([labels[i % len(labels)] for i in range(len(files))]))
    with whole_file(path) as aside, open(aside, "wb") as file:
        np.savez(file, *arrays)
