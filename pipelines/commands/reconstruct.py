"""`vqvae2 reconstruct`: images beside what the autoencoder makes of them."""

import logging
from pathlib import Path

import torch

from pipelines.config import ReconstructConfig
from vqvae2.common.accelerate import processes
from vqvae2.common.errors import UserError
from vqvae2.common.lock import writes_output
from vqvae2.common.pictures import file_suffix, save_image, save_picture
from vqvae2.common.runs import RunRecord
from vqvae2.data import ImageDataset, load_table, to_images
from vqvae2.inspection import reconstruction_sheet
from vqvae2.model import VQVAE2
from vqvae2.training_record import find_held_out

logger = logging.getLogger(__name__)


@writes_output
def reconstruct(config: ReconstructConfig) -> None:
    """Reconstruct images as the configuration says."""
    state, output_dir = processes(), Path(config.output_dir)
    model = VQVAE2.from_pretrained(config.vqvae).to(state.device)
    facts = {"encoder_hash": model.content_hash()}
    run = RunRecord("reconstruct", config, "reconstruct_config.yaml", facts=facts)
    run.check(output_dir)
    images = _find_images(config, model)
    images.check(show_progress=state.is_main_process)
    state.wait_for_everyone()
    if state.is_main_process:
        run.write(output_dir)
    write_reconstructions(model, images, output_dir)


def _find_images(config: ReconstructConfig, model: VQVAE2) -> ImageDataset:
    """The first `num_images` images, or of those that the model's training held out."""
    data, settings = config.data, model.config.image
    if config.held_out:
        show = processes().is_main_process
        images, _ = find_held_out(config.vqvae, data, settings, show_progress=show)
        if not len(images):
            raise UserError(f"{data.path} has no held-out images: leave --held-out out.")
    else:
        source = load_table(data, settings)
        images = ImageDataset(source, range(len(source)), settings)
    chosen = images.indices[: config.num_images or len(images)]
    return ImageDataset(images.source, chosen, settings)


@torch.no_grad()
def write_reconstructions(vqvae: VQVAE2, images: ImageDataset, output_dir: str | Path) -> None:
    """Write the reconstruction of each image as a file, and a sheet of some of them below their
    originals. Processes share the work."""
    state, folder, settings = processes(), Path(output_dir), vqvae.config.image
    suffix = file_suffix(settings.channels, settings.value_range)
    for i in range(state.process_index, len(images), state.num_processes):
        batch = to_images(images.__getitems__([i])["images"].to(state.device))
        (image,) = vqvae(batch).reconstruction
        save_image(image, folder / f"{i:06d}{suffix}", settings.value_range)
    if state.is_main_process:
        sheet = reconstruction_sheet(vqvae, images, state.device, num_images=32)
        save_picture(sheet, folder / "reconstructions.png")
    logger.info(f"{folder}: {len(images)} reconstructions; reconstructions.png compares some.")
