"""Trains small autoencoders in float64 with `fit`, on as many processes as started it.

Run by test_two_processes.py.
"""

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

VARIANTS = {"ema": 1, "cosine": 1, "gradient": 1, "fsq": 2, "adversary": 1}
"""Quantizer, or an adversary beside it -> parts that a batch is accumulated from."""


class Images(Dataset):
    """Forty images `(1, 16, 16)` of noise in [-1, 1]."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        generator = torch.Generator().manual_seed(0)
        self.images = torch.rand(40, 1, 16, 16, generator=generator, dtype=dtype) * 2 - 1

    def __len__(self) -> int:
        return len(self.images)

    def __getitems__(self, indices: list[int]) -> dict[str, torch.Tensor]:
        return {"images": self.images[indices]}


def small_model(quantizer: str = "ema") -> VQVAE2:
    """An autoencoder of two levels for these images, the same each time."""
    torch.manual_seed(0)
    config = VQVAE2Config(
        image=PreprocessingConfig(size=(16,), channels=1),
        quantizer=QuantizerConfig(kind=quantizer, fsq_levels=(4, 3)),
        codebook_sizes=(16, 32),
        code_dims=(8,),
        hidden_channels=16,
        residual_channels=8,
        num_residual_blocks=1,
    )
    return VQVAE2(config)


def main(expected_processes: int, quantizer: str, parts: int, output_dir: Path) -> None:
    # The model is built before the process group: whether to communicate is decided later.
    adversary = quantizer == "adversary"
    model = small_model("ema" if adversary else quantizer).double()
    steps = {"num_steps": 20, "warmup_steps": 2, "checkpoint_every": 20, "validate_every": 5}
    sizes = {"batch_size": 8, "gradient_accumulation_steps": parts}
    training = TrainingConfig(mixed_precision="no", log_every=1, **steps, **sizes)
    accelerator = make_accelerator(training, output_dir)
    assert accelerator.num_processes == expected_processes, accelerator.num_processes

    # With an adversary, a pair of networks is trained, each with its own settings.
    trained, term, groups = model, None, None
    if adversary:
        settings = DiscriminatorConfig(weight=0.8, hidden_channels=8, num_layers=1)
        trained = AdversarialPair(model, settings).double()
        term = make_adversarial_term(settings, model.last_layer, start=5)
        groups = trained.parameter_groups(settings)
    loss_fn = make_loss("mse", model.config.codebook_size_per_level, adversarial=term)
    place = {"num_processes": expected_processes, "process_index": accelerator.process_index}
    loader = ShuffledLoader(Images(torch.float64), training.batch_size // parts, **place)
    fit(accelerator, trained, loss_fn, loader, training, output_dir, parameter_groups=groups)
    torch.save(model.state_dict(), output_dir / f"rank_{accelerator.process_index}.pt")
    accelerator.wait_for_everyone()


if __name__ == "__main__":
    for name, number in VARIANTS.items():
        main(int(sys.argv[1]), name, number, Path(sys.argv[2]) / name)
