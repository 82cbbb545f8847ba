"""`vqvae2 sample`: new images as files."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from tqdm.auto import tqdm

from pipelines.config import (
    PartsConfig,
    SampleConfig,
)
from pipelines.editing import keep_levels, known_outside, repeat_known
from pipelines.pictures import (
    sample_sheet,
)
from pipelines.pipeline import VQVAE2Pipeline
from prior.sampling import Known
from vqvae2.common.accelerate import processes
from vqvae2.common.artifact import content_hash
from vqvae2.common.errors import UserError
from vqvae2.common.files import whole_file
from vqvae2.common.pictures import file_suffix, save_image, save_picture, to_pil
from vqvae2.common.runs import RunRecord
from vqvae2.data import (
    load_picture,
    picture_size,
    read_picture_file,
    to_images,
)


def sample(config: SampleConfig) -> None:
    """Write samples as files, and a sheet of them. Files that are there already are not made again; processes share the work."""
    state, output_dir = processes(), Path(config.output_dir)
    pipeline = load_pipeline(config, config.pipeline).to(state.device)
    labels = pipeline.label_numbers(config.labels)
    names = ("temperature", "top_k", "top_p", "min_p", "guidance_scale")
    samplings = pipeline.samplings(**{name: getattr(config, name) for name in names})
    known = _known_codes(config, pipeline)
    if known and not config.labels and pipeline.can_hide_labels:
        labels = pipeline.label_numbers("none")  # nobody said what the image shows
    facts = {
        **pipeline.content_hashes(),
        "known_hash": content_hash(
            {}, [(f"{i}", t) for i, level in enumerate(known) for t in level or ()]
        ),
    }
    run = RunRecord("sample", config, "sample_config.yaml", facts=facts)
    run.check(output_dir)
    state.wait_for_everyone()
    if state.is_main_process:
        run.write(output_dir)
    settings = pipeline.vqvae.config.image
    suffix = file_suffix(settings.channels, settings.value_range)
    files = [output_dir / f"{i:06d}{suffix}" for i in range(config.num_images)]
    chunks = [
        range(first, first + config.lanes) for first in range(0, config.num_images, config.lanes)
    ]
    unfinished = [
        chunk
        for chunk in chunks
        if not all(path.exists() for path in files[chunk.start : chunk.stop])
    ]
    state.wait_for_everyone()  # all have looked before the first one writes
    mine = unfinished[state.process_index :: state.num_processes]
    bar = tqdm(
        total=sum(len(files[chunk.start : chunk.stop]) for chunk in mine),
        desc="sampling",
        unit="image",
        disable=not state.is_main_process,
    )
    for chunk in mine:
        images, _ = pipeline.sample_lanes(
            chunk,
            labels,
            samplings,
            seed=config.seed,
            bf16=config.bf16,
            known=repeat_known(known, config.lanes),
        )
        asked_for = files[chunk.start : chunk.stop]
        for image, path in zip(images, asked_for, strict=False):
            save_image(image, path, settings.value_range)
        bar.update(len(asked_for))
    bar.close()
    state.wait_for_everyone()
    if state.is_main_process:
        shown = range(min(config.num_images, 10 * min(20, max(6, len(labels)))))
        pictures = [to_pil(to_images(load_picture(str(files[i]), settings)))[0] for i in shown]
        rows = [labels[i % len(labels)] for i in shown] if labels else []
        save_picture(
            sample_sheet(pictures, rows, [*pipeline.class_names, "no label"] if labels else []),
            output_dir / "samples.png",
        )
        if config.npz:
            _write_npz(files, labels, output_dir / "samples.npz")
        print(
            f"{output_dir}: {config.num_images} samples, and samples.png with {len(shown)} of them."
        )


def _known_codes(config: SampleConfig, pipeline: VQVAE2Pipeline) -> Sequence[Known | None]:
    """The codes that --init-image keeps, one row per level."""
    if config.init_image is None:
        return []
    settings, device = pipeline.vqvae.config.image, next(pipeline.vqvae.parameters()).device
    images = to_images(load_picture(config.init_image, settings).to(device))
    if config.mask is None:
        return keep_levels(
            pipeline.vqvae, images, 1 if config.keep_levels is None else config.keep_levels
        )
    grey = dataclasses.replace(settings, channels=1, background="black", value_range=(0, 255))
    if picture_size(read_picture_file(config.mask)) != picture_size(
        read_picture_file(config.init_image)
    ):
        raise UserError(
            f"{config.mask} and {config.init_image} have different sizes: paint the mask over the image itself."
        )
    painted = load_picture(config.mask, grey).to(device)[:, 0] > 127
    return known_outside(pipeline.vqvae, images, painted)


def _write_npz(files: Sequence[Path], labels: Sequence[int], path: Path) -> None:
    """The layout of the evaluators of guided-diffusion: arr_0 images, arr_1 labels."""
    images = np.stack([np.asarray(read_picture_file(str(file))) for file in files])
    arrays = [images if images.ndim == 4 else images[..., None]]
    if labels:
        arrays.append(np.array([labels[i % len(labels)] for i in range(len(files))]))
    with whole_file(path) as aside, open(aside, "wb") as file:
        np.savez(file, *arrays)


def load_pipeline(parts: PartsConfig, pipeline: str | None) -> VQVAE2Pipeline:
    if pipeline is not None:
        if parts.vqvae is not None or parts.priors:
            raise UserError(
                "--pipeline is given together with --vqvae or --priors: give one or the other."
            )
        return VQVAE2Pipeline.from_pretrained(pipeline)
    if parts.vqvae is None or not parts.priors:
        raise UserError(
            "nothing to load: give --vqvae DIR and --priors DIR DIR ... (the top first)."
        )
    return VQVAE2Pipeline.from_parts(parts.vqvae, parts.priors)
