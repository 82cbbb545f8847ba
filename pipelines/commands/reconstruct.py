"""`vqvae2 reconstruct`: images beside what the autoencoder makes of them."""

from pathlib import Path

import torch

from pipelines.config import ReconstructConfig
from vqvae2.common.accelerate import processes
from vqvae2.common.config import check
from vqvae2.common.pictures import file_suffix, save_image, save_picture
from vqvae2.common.runs import RunRecord
from vqvae2.config import ImagesConfig
from vqvae2.data import ImageDataset, load_images, load_table, to_images
from vqvae2.inspection import reconstruction_sheet
from vqvae2.model import VQVAE2
from vqvae2.training import trained_with


@torch.no_grad()
def reconstruct(config: ReconstructConfig) -> None:
    """Write reconstructions as files, and a sheet that compares them with the originals."""
    state, output_dir = processes(), Path(config.output_dir)
    model = VQVAE2.from_pretrained(config.vqvae).to(state.device)
    run = RunRecord(
        "reconstruct",
        config,
        "reconstruct_config.yaml",
        facts={"encoder_hash": model.content_hash()},
    )
    run.check(output_dir)
    settings = model.config.image
    if config.held_out:
        _, validation_path = trained_with(config.vqvae, config.images)
        data = ImagesConfig(path=config.images, validation_path=validation_path)
        images = load_images(
            data, settings, show_progress=state.is_main_process, check=False
        ).validation
        check(
            len(images) > 0,
            "held_out",
            True,
            f"used with held-out images, but {config.images} has none",
        )
    else:
        source = load_table(ImagesConfig(path=config.images), settings)
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
        save_image(
            image,
            output_dir / f"{i:06d}{file_suffix(settings.channels, settings.value_range)}",
            settings.value_range,
        )
    if state.is_main_process:
        save_picture(
            reconstruction_sheet(model, images, state.device, num_images=32),
            output_dir / "reconstructions.png",
        )
        print(
            f"{output_dir}: {number} reconstructions, and reconstructions.png beside the originals."
        )
