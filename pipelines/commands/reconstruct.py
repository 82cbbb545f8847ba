"""`vqvae2 reconstruct`: images beside what the autoencoder makes of them."""

import logging
from pathlib import Path

import torch

from pipelines.config import ReconstructConfig
from pipelines.file_names import file_names
from pipelines.model_index import part_hash
from vqvae2.common.accelerate import on_main_process, processes
from vqvae2.common.errors import UserError
from vqvae2.common.lock import writes_output
from vqvae2.common.metrics import warn_if_unfinished
from vqvae2.common.pictures import file_suffix, save_image, save_picture
from vqvae2.common.runs import RunRecord
from vqvae2.common.skipped import list_skipped, report_skipped
from vqvae2.data import ImageDataset, load_table, to_images
from vqvae2.inspection import reconstruction_sheet
from vqvae2.model import VQVAE2
from vqvae2.training_record import find_held_out, trained_on

logger = logging.getLogger(__name__)


@writes_output
def reconstruct(config: ReconstructConfig) -> None:
    """Reconstruct images as the configuration says."""
    # The model, the images, and a folder that holds no other run.
    state, output_dir = processes(), Path(config.output_dir)
    model = VQVAE2.from_pretrained(config.vqvae).to(state.device)
    warn_if_unfinished(Path(config.vqvae).expanduser())
    images = _find_images(config, model)
    facts = {"vqvae_hash": part_hash(model), **images.source.facts()}
    run = RunRecord("reconstruct", config, "reconstruct_config.yaml", facts=facts)
    run.check(output_dir)
    skip = config.data.on_error == "skip"
    skipped = images.check(skip=skip)
    if not len(images):
        raise UserError(f"{config.data.path}: no image can be read: check data.path.")
    state.wait_for_everyone()

    # Whose reconstructions are written, and what is to be known about them.
    def begin() -> None:
        run.write(output_dir)
        list_skipped(output_dir, [(bad.name, bad.reason) for bad in skipped])
        report_skipped(output_dir)

    on_main_process(state, begin)
    write_reconstructions(model, images, output_dir)
    if not config.held_out:  # training images look better than others
        known = trained_on(config.vqvae, images, config.data.path)
        seen = "It is not known how many" if known is None else f"{known} of {len(images)}"
        some = known and known < len(images)  # others are held out here
        advice = ": --held-out shows others" if some else ""
        logger.info(f"{seen} are images that the model was trained on{advice}.")


def _find_images(config: ReconstructConfig, model: VQVAE2) -> ImageDataset:
    """The first `num_images` images, or of those that the model's training held out."""
    data, settings = config.data, model.config.image
    if config.held_out:
        images, _ = find_held_out(config.vqvae, data, settings)
        if not len(images):
            raise UserError(f"{data.path} has no held-out images: leave --held-out out.")
    else:
        source = load_table(data, settings)
        images = ImageDataset(source, range(len(source)), settings)
    chosen = images.indices[: config.num_images or len(images)]
    return ImageDataset(images.source, chosen, settings)


@torch.no_grad()
def write_reconstructions(vqvae: VQVAE2, images: ImageDataset, output_dir: str | Path) -> None:
    """Write the reconstruction of each image as a file in images/, under its own name, if it is not
    there yet, and beside it a sheet of some of them below their originals. Processes share the
    work."""
    state, folder, settings = processes(), Path(output_dir), vqvae.config.image
    suffix = file_suffix(settings.channels, settings.value_range)
    names = file_names(images.source.ids, suffix)  # of all, so that more images change no name
    for i in range(state.process_index, len(images), state.num_processes):
        path = folder / "images" / names[images.indices[i]]
        if path.exists():
            continue
        batch = to_images(images.__getitems__([i])["images"].to(state.device))
        (image,) = vqvae(batch).reconstruction
        save_image(image, path, settings.value_range)
    state.wait_for_everyone()
    shown = folder / "reconstructions.png"
    if state.is_main_process:
        save_picture(reconstruction_sheet(vqvae, images, state.device, num_images=32), shown)
    logger.info(f"{folder / 'images'}: {len(images)} reconstructions; {shown} compares some.")
