"""What stage 1 minimises."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vqvae2.common.fit import LossFunction
from vqvae2.config import DiscriminatorConfig
from vqvae2.data import to_images
from vqvae2.discriminator import AdversarialOutput
from vqvae2.distributed import sum_over_processes, world_size

Perceptual = Callable[[Tensor, Tensor], Tensor]  # (B, C, H, W) twice to their mean distance ()
AdversarialTerm = Callable[[AdversarialOutput, Tensor], tuple[Tensor, dict[str, Tensor]]]


def make_loss(
    kind: Literal["mse", "l1"],
    codebook_sizes: Sequence[int],
    perceptual: Perceptual | None = None,
    perceptual_weight: float = 1.0,
    *,
    adversarial: AdversarialTerm | None = None,
) -> LossFunction:
    """The loss function of stage 1, for `fit` (van den Oord et al. 2017, equation 3).

    L = ||x - decode(e)||^2 (or the mean absolute error) + sum over levels of beta ||z - sg(e)||^2
        [+ ||sg(z) - e||^2 where the codebook learns by gradient]
        [+ perceptual_weight * perceptual(decode(e), x)]
        [+ the terms of a discriminator; the model is then an `AdversarialPair`]
    """
    distance = {"mse": F.mse_loss, "l1": F.l1_loss}[kind]

    def loss_fn(model: nn.Module, batch: Mapping[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        # Reconstruction and commitment, in the images' precision.
        images = to_images(batch["images"])
        output = model(images)
        reconstruction = output.reconstruction.to(images.dtype)
        fidelity = distance(reconstruction, images)
        commitment = sum((level.loss for level in output.levels), start=images.new_zeros(()))
        figures = {"reconstruction": fidelity, "commitment": commitment}

        # The optional terms.
        if perceptual is not None:
            figures["perceptual"] = perceptual(reconstruction, images)
            fidelity = fidelity + perceptual_weight * figures["perceptual"]
        loss = fidelity + commitment
        if adversarial is not None:
            term, adversarial_figures = adversarial(output, fidelity)
            loss, figures = loss + term, figures | adversarial_figures

        # How often each code was chosen, to be summed over a window of steps.
        for number, size in enumerate(codebook_sizes):
            figures[f"assignments_{number}"] = assignments(output.levels[number].codes, size)
        return loss, figures

    return loss_fn


def make_adversarial_term(config: DiscriminatorConfig, last_layer: nn.Parameter) -> AdversarialTerm:
    """What a discriminator D adds: weight * lambda * -D(decode(e)) + the hinge loss of D.

    See Esser et al. 2021, equations 5 to 7; `AdversarialPair` keeps the two gradients apart.
    lambda follows from the gradients at `last_layer`.
    """

    def term(output: AdversarialOutput, fidelity: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        hinge = 0.5 * (F.relu(1 - output.real).mean() + F.relu(1 + output.fake).mean())
        generator = balance = torch.zeros_like(hinge)
        if output.fooling is not None:
            generator = -output.fooling.mean()
            balance = adaptive_weight(fidelity, generator, last_layer)
        figures = {"generator": generator, "discriminator": hinge, "adaptive_weight": balance}
        return output.ramp * config.weight * balance * generator + hinge, figures

    return term


def adaptive_weight(fidelity: Tensor, generator: Tensor, last_layer: nn.Parameter) -> Tensor:
    """Lambda: how much stronger fidelity pulls than the discriminator does, at most 10^4."""
    losses = (fidelity, generator)
    gradients = [torch.autograd.grad(x, last_layer, retain_graph=True)[0] for x in losses]
    mean = sum_over_processes(torch.stack(gradients)) / world_size()  # those of the joint batch
    ours, theirs = mean.flatten(start_dim=1).norm(dim=1)
    return (ours / (theirs + 1e-4)).clamp(max=1e4)


def assignments(codes: Tensor, codebook_size: int) -> Tensor:
    """How often each code occurs `(K,)`; unlike `bincount`, the host need not wait for it."""
    flat = codes.flatten()
    ones = torch.ones_like(flat, dtype=torch.float32)
    return torch.zeros(codebook_size, device=codes.device).index_add_(0, flat, ones)
