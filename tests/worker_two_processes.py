"""Trains a small autoencoder in float64 with `fit`, on as many processes as it was started on. Run by test_two_processes.py."""

import sys
from pathlib import Path

import torch
from torch.utils.data import Dataset

from vqvae2 import VQVAE2, PreprocessingConfig, VQVAE2Config
from vqvae2.common.accelerate import make_accelerator
from vqvae2.common.config import TrainingConfig
from vqvae2.common.fit import fit
from vqvae2.common.loading import ShuffledLoader
from vqvae2.config import DiscriminatorConfig, QuantizerConfig
from vqvae2.discriminator import AdversarialPair
from vqvae2.losses import make_adversarial_term, make_loss


class Images(Dataset):
    """Forty float64 images."""

    def __init__(self) -> None:
        self.images = (
            torch.rand(
                40, 1, 16, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64
            )
            * 2
            - 1
        )

    def __len__(self) -> int:
        return len(self.images)

    def __getitems__(self, indices: list[int]) -> dict[str, torch.Tensor]:
        return {"images": self.images[indices]}


def main(expected_processes: int, quantizer: str, parts: int, output_dir: Path) -> None:
    torch.manual_seed(0)
    image = PreprocessingConfig(size=(16,), channels=1)
    small = {
        "codebook_sizes": (16, 32),
        "code_dims": (8,),
        "hidden_channels": 16,
        "residual_channels": 8,
        "num_residual_blocks": 1,
    }
    adversary, quantizer = (
        quantizer == "adversary",
        "ema" if quantizer == "adversary" else quantizer,
    )
    config = VQVAE2Config(
        image=image, quantizer=QuantizerConfig(kind=quantizer, fsq_levels=(4, 3)), **small
    )
    model = VQVAE2(
        config
    ).double()  # built before the process group is: whether to talk must be decided later
    training = TrainingConfig(
        num_steps=20,
        batch_size=8,
        gradient_accumulation_steps=parts,
        mixed_precision="no",
        warmup_steps=2,
        checkpoint_every=20,
        log_every=1,
        validate_every=5,
    )
    accelerator = make_accelerator(training, output_dir)
    assert accelerator.num_processes == expected_processes, accelerator.num_processes
    loader = ShuffledLoader(
        Images(),
        training.batch_size // parts,
        num_processes=accelerator.num_processes,
        process_index=accelerator.process_index,
    )
    if adversary:
        settings = DiscriminatorConfig(weight=0.8, hidden_channels=8, num_layers=1)
        pair = AdversarialPair(model, settings).double()
        loss_fn = make_loss(
            "mse",
            config.codebook_size_per_level,
            adversarial=make_adversarial_term(settings, model.last_layer, start=5),
        )
        fit(
            accelerator,
            pair,
            loss_fn,
            loader,
            training,
            output_dir,
            parameter_groups=pair.parameter_groups(settings),
        )
    else:
        fit(
            accelerator,
            model,
            make_loss("mse", config.codebook_size_per_level),
            loader,
            training,
            output_dir,
        )
    torch.save(model.state_dict(), output_dir / f"rank_{accelerator.process_index}.pt")
    accelerator.wait_for_everyone()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], int(sys.argv[3]), Path(sys.argv[4]))
