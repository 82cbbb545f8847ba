"""Trains small networks with `fit`, on as many processes as started it. On two of them, one gets
SIGTERM in each training, which both then continue. Run by test_two_processes.py.
"""

import os
import signal
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.data import Dataset

from pipelines.config import PlanConfig
from pipelines.plan.command import step_seconds
from pipelines.plan.stages import stages_of
from vqvae2 import VQVAE2, PreprocessingConfig, VQVAE2Config, quantizers
from vqvae2.code_noise import CodeNoise
from vqvae2.common.accelerate import (
    check_same_images,
    make_accelerator,
    on_main_process,
    processes,
)
from vqvae2.common.config import TrainingConfig
from vqvae2.common.errors import Stopped, UserError
from vqvae2.common.files import write_json
from vqvae2.common.fit import _Agreement, fit
from vqvae2.common.loading import ShuffledLoader
from vqvae2.config import DiscriminatorConfig, QuantizerConfig
from vqvae2.discriminator import AdversarialPair
from vqvae2.losses import make_adversarial_term, make_loss
from vqvae2.nearest import k_means

VARIANTS = {"ema": 1, "cosine": 1, "gradient": 1, "fsq": 2, "adversary": 1}
"""Quantizer, or an adversary beside it and noise on the codes -> parts of a batch."""


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


class Dropout(nn.Sequential):
    """A network whose every step is random."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        super().__init__(nn.Flatten(), nn.Dropout(), nn.Linear(256, 8))

    def save_pretrained(self, folder: Path) -> None:
        save_file(self.state_dict(), folder / "model.safetensors")
        write_json(folder / "config.json", {})


def dropout_loss(model: nn.Module, batch: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    return model(batch["images"]).square().mean(), {}


class SlowLoss:
    """A loss whose steps take longer than processes may take to agree; in the third, the last
    process gets SIGTERM."""

    def __init__(self, loss: Any, rank: int) -> None:
        self.loss, self.rank, self.calls = loss, rank, 0

    def __call__(self, model: nn.Module, batch: Any) -> tuple[Tensor, Mapping[str, Tensor]]:
        self.calls += 1
        if self.calls <= 6:
            time.sleep(1.2 * _Agreement.SECONDS)
        if self.calls == 3 and self.rank == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return self.loss(model, batch)


def dropout_run(output_dir: Path, *, stopped: bool) -> dict[str, Tensor]:
    """The weights of a process after a run with dropout, perhaps in two pieces."""
    config = TrainingConfig(batch_size=4, num_steps=9, mixed_precision="no", log_every=99)
    accelerator = make_accelerator(config, output_dir)
    rank = accelerator.process_index
    loader = ShuffledLoader(Images(), 4, num_processes=2, process_index=rank)
    loss = SlowLoss(dropout_loss, rank) if stopped else dropout_loss
    for _ in range(1 + stopped):
        model = Dropout()
        try:
            fit(accelerator, model, loss, loader, config, output_dir)
        except Stopped as error:
            print(f"process {rank}: {error}")
    return model.state_dict()


def on_two(output_dir: Path) -> None:
    """What only several processes can do wrong."""
    whole, pieces = (
        dropout_run(output_dir / f"dropout_{stopped}", stopped=stopped) for stopped in (0, 1)
    )
    assert all(torch.equal(whole[name], pieces[name]) for name in whole)
    rank = int(os.environ["RANK"])
    try:
        check_same_images({"image_names_hash": str(rank)}, 12 - 2 * rank)
    except UserError as error:
        print(f"process {rank}: {error}")

    # The main process alone times the step of a model whose processes talk to each other.
    stage = stages_of(PlanConfig(recipe="tiny", planned=None))[0]
    assert on_main_process(processes(), lambda: step_seconds(stage)) > 0


def rounded_otherwise(vectors: Tensor, num_clusters: int) -> Tensor:
    """k-means as on GPUs, which add in another order on every process."""
    return k_means(vectors, num_clusters) * (1 + int(os.environ.get("RANK", "0")) / 100)


def main(expected_processes: int, quantizer: str, parts: int, output_dir: Path) -> None:
    # The model is built before the process group: whether to communicate is decided later.
    adversary = quantizer == "adversary"
    model = small_model("ema" if adversary else quantizer).double()
    steps = {"num_steps": 20, "warmup_steps": 2, "checkpoint_every": 20, "validate_every": 5}
    sizes = {"batch_size": 8, "gradient_accumulation_steps": parts}
    training = TrainingConfig(mixed_precision="no", log_every=1, **steps, **sizes)
    accelerator = make_accelerator(training, output_dir)
    assert accelerator.num_processes == expected_processes, accelerator.num_processes

    # With an adversary, a pair of networks is trained, each with its own settings; here with noise.
    trained, term = model, None
    if adversary:
        settings = DiscriminatorConfig(weight=0.8, hidden_channels=8, num_layers=1, start_step=4)
        trained = AdversarialPair(CodeNoise(model, 0.5), settings, parts).double()
        term = make_adversarial_term(settings, model.last_layer)
    loss_fn = make_loss("mse", model.config.codebook_size_per_level, adversarial=term)
    place = {"num_processes": expected_processes, "process_index": accelerator.process_index}
    loader = ShuffledLoader(Images(torch.float64), training.batch_size // parts, **place)
    fit(accelerator, trained, loss_fn, loader, training, output_dir)
    torch.save(model.state_dict(), output_dir / f"rank_{accelerator.process_index}.pt")
    accelerator.wait_for_everyone()


if __name__ == "__main__":
    _Agreement.SECONDS = 0.05
    if sys.argv[1] == "2":
        on_two(Path(sys.argv[2]))
    quantizers.k_means = rounded_otherwise
    for name, number in VARIANTS.items():
        main(int(sys.argv[1]), name, number, Path(sys.argv[2]) / name)
