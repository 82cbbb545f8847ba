"""What the subcommands do: each a function of its configuration, called by the command line, by scripts/, and by the demo."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from tqdm.auto import tqdm

from pipelines.config import AssembleConfig, ImportWeightsConfig, PartsConfig, ReconstructConfig, SampleConfig, TrainPriorCommandConfig
from pipelines.drawing import make_reconstruction_drawer, make_sample_drawer, reconstruction_sheet, sample_sheet
from pipelines.editing import keep_levels, known_outside, repeat_known
from pipelines.pipeline import INDEX_NAME, VQVAE2Pipeline
from prior.code_shards import file_hash
from prior.sampling import Known
from prior.training import train_prior as train_prior_alone
from vqvae2.common.artifact import content_hash
from vqvae2.common.config import check
from vqvae2.common.errors import UserError
from vqvae2.common.files import RunRecord, check_empty, whole_file
from vqvae2.common.machine import processes
from vqvae2.common.pictures import file_suffix, save_image, save_picture, to_pil
from vqvae2.config import ImagesConfig, TrainVQVAEConfig
from vqvae2.data import ImageDataset, load_images, load_picture, load_source, picture_size, read_picture_file, to_images
from vqvae2.data.arrays import PythonImages
from vqvae2.model import VQVAE2
from vqvae2.rosinality import import_weights as import_rosinality
from vqvae2.training import train as train_alone
from vqvae2.training import trained_with


def train(config: TrainVQVAEConfig, *, images: PythonImages | None = None) -> None:
    """Train the autoencoder, with pictures of reconstructions."""
    train_alone(config, images=images, make_draw=make_reconstruction_drawer)


def train_prior(config: TrainPriorCommandConfig) -> None:
    """Train a level's prior, with pictures of samples if the autoencoder is given."""
    train_prior_alone(config, draw=make_sample_drawer(config, config.vqvae) if config.vqvae else None)


@torch.no_grad()
def reconstruct(config: ReconstructConfig) -> None:
    """Write reconstructions as files, and a sheet that compares them with the originals."""
    state, output_dir = processes(), Path(config.output_dir)
    model = VQVAE2.from_pretrained(config.vqvae).to(state.device)
    run = RunRecord("reconstruct", config, "reconstruct_config.yaml", facts={"encoder_hash": model.content_hash()})
    run.check(output_dir)
    settings = model.config.image
    if config.held_out:
        _, validation_path = trained_with(config.vqvae, config.images)
        data = ImagesConfig(path=config.images, validation_path=validation_path)
        images = load_images(data, settings, show_progress=state.is_main_process, check=False).validation
        check(len(images) > 0, "held_out", True, f"used with held-out images, but {config.images} has none")
    else:
        source = load_source(ImagesConfig(path=config.images), settings.channels)
        images = ImageDataset(source, range(len(source)), settings)
    number = min(config.num_images or len(images), len(images))
    images = ImageDataset(images.source, images.indices[:number], images.config)
    images.check(show_progress=state.is_main_process)
    state.wait_for_everyone()
    if state.is_main_process:
        run.write(output_dir)
    for i in range(state.process_index, number, state.num_processes):
        batch = to_images(images.__getitems__([i])["images"].to(state.device))
        (image,) = model(batch).reconstruction
        save_image(image, output_dir / f"{i:06d}{file_suffix(settings.channels, settings.value_range)}", settings.value_range)
    if state.is_main_process:
        save_picture(reconstruction_sheet(model, images, state.device, num_images=32), output_dir / "reconstructions.png")
        print(f"{output_dir}: {number} reconstructions, and reconstructions.png beside the originals.")


def sample(config: SampleConfig) -> None:
    """Write samples as files, and a sheet of them. Files that are there already are not made again; processes share the work."""
    state, output_dir = processes(), Path(config.output_dir)
    pipeline = _load(config, config.pipeline).to(state.device)
    labels = pipeline.label_numbers(config.labels)
    names = ("temperature", "top_k", "top_p", "min_p", "guidance_scale")
    samplings = pipeline.samplings(**{name: getattr(config, name) for name in names})
    known = _known_codes(config, pipeline)
    if known and not config.labels and pipeline.can_hide_labels:
        labels = pipeline.label_numbers("none")  # nobody said what the image shows
    facts = {**pipeline.content_hashes(), "known_hash": content_hash({}, [(f"{i}", t) for i, level in enumerate(known) for t in level or ()])}
    run = RunRecord("sample", config, "sample_config.yaml", facts=facts)
    run.check(output_dir)
    state.wait_for_everyone()
    if state.is_main_process:
        run.write(output_dir)
    settings = pipeline.vqvae.config.image
    suffix = file_suffix(settings.channels, settings.value_range)
    files = [output_dir / f"{i:06d}{suffix}" for i in range(config.num_images)]
    chunks = [range(first, first + config.lanes) for first in range(0, config.num_images, config.lanes)]
    unfinished = [chunk for chunk in chunks if not all(path.exists() for path in files[chunk.start : chunk.stop])]
    state.wait_for_everyone()  # all have looked before the first one writes
    mine = unfinished[state.process_index :: state.num_processes]
    bar = tqdm(total=sum(len(files[chunk.start : chunk.stop]) for chunk in mine), desc="sampling", unit="image", disable=not state.is_main_process)
    for chunk in mine:
        images, _ = pipeline.sample_lanes(chunk, labels, samplings, seed=config.seed, bf16=config.bf16, known=repeat_known(known, config.lanes))
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
        save_picture(sample_sheet(pictures, rows, [*pipeline.class_names, "no label"] if labels else []), output_dir / "samples.png")
        if config.npz:
            _write_npz(files, labels, output_dir / "samples.npz")
        print(f"{output_dir}: {config.num_images} samples, and samples.png with {len(shown)} of them.")


def _known_codes(config: SampleConfig, pipeline: VQVAE2Pipeline) -> Sequence[Known | None]:
    """The codes that --init-image keeps, one row per level."""
    if config.init_image is None:
        return []
    settings, device = pipeline.vqvae.config.image, next(pipeline.vqvae.parameters()).device
    images = to_images(load_picture(config.init_image, settings).to(device))
    if config.mask is None:
        return keep_levels(pipeline.vqvae, images, 1 if config.keep_levels is None else config.keep_levels)
    grey = dataclasses.replace(settings, channels=1, background="black", value_range=(0, 255))
    if picture_size(read_picture_file(config.mask)) != picture_size(read_picture_file(config.init_image)):
        raise UserError(f"{config.mask} and {config.init_image} have different sizes: paint the mask over the image itself.")
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


def assemble(config: AssembleConfig) -> None:
    """Write the pipeline folder."""
    output_dir = Path(config.output_dir)
    if output_dir.is_file() or not (output_dir / INDEX_NAME).exists():
        check_empty(output_dir, "pipeline")
    pipeline = _load(config, None)
    if processes().is_main_process:
        pipeline.save_pretrained(output_dir)
        print(f"{output_dir}: the pipeline, for vqvae2 sample --pipeline and VQVAE2Pipeline.from_pretrained.")


def import_weights(config: ImportWeightsConfig) -> None:
    """Write the model folder of another implementation's checkpoint, and say what was found."""
    check_empty(Path(config.output_dir), "run")
    model = import_rosinality(Path(config.checkpoint), config.size)
    RunRecord("import-weights", config, "import_config.yaml", notes={"checkpoint_sha256": file_hash(Path(config.checkpoint))}).write(Path(config.output_dir))
    model.save_pretrained(config.output_dir)
    found = model.config
    levels = [f"{k} codes of {d} dimensions" for k, d in zip(found.codebook_size_per_level, found.code_dim_per_level, strict=True)]
    print(
        f"{config.output_dir}: two levels ({', '.join(levels)}, top first), {found.image.channels} channels, {found.num_residual_blocks} residual "
        f"blocks of {found.residual_channels} in {found.hidden_channels} channels; for images of {' x '.join(map(str, found.image.height_width))} pixels."
    )


def _load(parts: PartsConfig, pipeline: str | None) -> VQVAE2Pipeline:
    if pipeline is not None:
        if parts.vqvae is not None or parts.priors:
            raise UserError("--pipeline is given together with --vqvae or --priors: give one or the other.")
        return VQVAE2Pipeline.from_pretrained(pipeline)
    if parts.vqvae is None or not parts.priors:
        raise UserError("nothing to load: give --vqvae DIR and --priors DIR DIR ... (the top first).")
    return VQVAE2Pipeline.from_parts(parts.vqvae, parts.priors)
