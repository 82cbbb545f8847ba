"""What stage 1 minimises."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vqvae2.data import to_images


def make_loss(kind: Literal["mse", "l1"], codebook_sizes: Sequence[int]) -> Callable[[nn.Module, Mapping[str, Any]], tuple[Tensor, dict[str, Tensor]]]:
    """The loss function of stage 1 for `fit`: reconstruction + what the quantizers ask for (van den Oord et al. 2017, equation 3).

    L = ||x - decode(e)||^2 + sum over levels of beta ||z - sg(e)||^2 [+ ||sg(z) - e||^2 where the codebook learns by gradient]
    """
    distance = {"mse": F.mse_loss, "l1": F.l1_loss}[kind]

    def loss_fn(model: nn.Module, batch: Mapping[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        images = to_images(batch["images"])
        reconstruction, levels = model(images)
        reconstruction_loss = distance(reconstruction.to(images.dtype), images)
        commitment = sum((level.loss for level in levels), start=images.new_zeros(()))
        figures = {"reconstruction": reconstruction_loss, "commitment": commitment}
        for number, (level, size) in enumerate(zip(levels, codebook_sizes, strict=True)):
            figures[f"assignments_{number}"] = assignments(level.codes, size)
        return reconstruction_loss + commitment, figures

    return loss_fn


def assignments(codes: Tensor, codebook_size: int) -> Tensor:
    """How often each code occurs `(K,)`; unlike `bincount` it does not make the host wait for the device."""
    flat = codes.flatten()
    return torch.zeros(codebook_size, device=codes.device).index_add_(0, flat, torch.ones_like(flat, dtype=torch.float32))
