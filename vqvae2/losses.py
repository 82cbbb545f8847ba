"""What stage 1 minimises."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vqvae2.config import DiscriminatorConfig
from vqvae2.data import to_images
from vqvae2.discriminator import AdversarialOutput
from vqvae2.distributed import sum_over_processes, world_size

LossFunction = Callable[[nn.Module, Mapping[str, Any]], tuple[Tensor, dict[str, Tensor]]]
Perceptual = Callable[[Tensor, Tensor], Tensor]
AdversarialTerm = Callable[[AdversarialOutput, Tensor], tuple[Tensor, dict[str, Tensor]]]

RAMP = 500  # training batches over which the autoencoder begins to listen to a discriminator


def make_loss(
    kind: Literal["mse", "l1"],
    codebook_sizes: Sequence[int],
    *,
    perceptual: Perceptual | None = None,
    perceptual_weight: float = 1.0,
    adversarial: AdversarialTerm | None = None,
) -> LossFunction:
    """The loss function of stage 1 for `fit`: reconstruction + what the quantizers ask for (van den Oord et al. 2017, equation 3) + what is optional.

        L = ||x - decode(e)||^2 + sum over levels of beta ||z - sg(e)||^2 [+ ||sg(z) - e||^2 where the codebook learns by gradient]
            [+ perceptual_weight * perceptual(decode(e), x)] [+ the terms of a discriminator]

    Args:
        perceptual: reconstructions and images `(B, C, H, W)` to their mean distance `()`, see `vqvae2.perceptual`.
        adversarial: see `make_adversarial_term`; the model must then be an `AdversarialPair`.
    """
    distance = {"mse": F.mse_loss, "l1": F.l1_loss}[kind]

    def loss_fn(model: nn.Module, batch: Mapping[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        images = to_images(batch["images"])
        output = model(images)
        reconstruction = output.reconstruction.to(images.dtype)
        fidelity = distance(reconstruction, images)
        commitment = sum((level.loss for level in output.levels), start=images.new_zeros(()))
        figures = {"reconstruction": fidelity, "commitment": commitment}
        if perceptual is not None:
            figures["perceptual"] = perceptual(reconstruction, images)
            fidelity = fidelity + perceptual_weight * figures["perceptual"]
        loss = fidelity + commitment
        if adversarial is not None:
            term, more = adversarial(output, fidelity)
            loss, figures = loss + term, figures | more
        for number, (level, size) in enumerate(zip(output.levels, codebook_sizes, strict=True)):
            figures[f"assignments_{number}"] = assignments(level.codes, size)
        return loss, figures

    return loss_fn


def make_adversarial_term(
    config: DiscriminatorConfig, last_layer: nn.Parameter, *, start: int
) -> AdversarialTerm:
    """What a discriminator D adds to the loss: weight * lambda * -D(decode(e)) + the hinge loss of D (Esser et al. 2021, equations 5 to 7).

    No gradient of the first term reaches D, and none of the second the autoencoder: `AdversarialPair` has seen to it.

    Args:
        last_layer: the weight that writes the image, on which gradients are compared for lambda.
        start: training batches before D is listened to; until then -D(decode(e)) is multiplied by zero, and over the next `RAMP` batches by more and
            more up to one: from one batch to the next a new pull makes Adam leap, and the codebooks collapse. D itself learns from the first batch on.
    """

    def term(output: AdversarialOutput, fidelity: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        generator = -output.fooling.mean()
        balance = adaptive_weight(fidelity, generator, last_layer)
        hinge = 0.5 * (F.relu(1 - output.real).mean() + F.relu(1 + output.fake).mean())
        heard = (
            ((output.num_forwards - start) / RAMP).clamp(0, 1).to(fidelity.dtype)
        )  # stays on the device: the host need not know
        figures = {"generator": generator, "discriminator": hinge, "adaptive_weight": balance}
        return heard * config.weight * balance * generator + hinge, figures

    return term


def adaptive_weight(fidelity: Tensor, generator: Tensor, last_layer: nn.Parameter) -> Tensor:
    """How much stronger the fidelity pulls at the last layer than the discriminator does (Esser et al. 2021, equation 7), at most 10^4.

    The gradients are first averaged over all processes, so each finds the weight that one process would find for the joint batch.
    """
    gradients = torch.stack(
        [
            torch.autograd.grad(loss, last_layer, retain_graph=True)[0]
            for loss in (fidelity, generator)
        ]
    )
    wanted, offered = (
        (sum_over_processes(gradients) / world_size()).flatten(start_dim=1).norm(dim=1)
    )
    return (wanted / (offered + 1e-4)).clamp(max=1e4)


def assignments(codes: Tensor, codebook_size: int) -> Tensor:
    """How often each code occurs `(K,)`; unlike `bincount` it does not make the host wait for the device."""
    flat = codes.flatten()
    return torch.zeros(codebook_size, device=codes.device).index_add_(
        0, flat, torch.ones_like(flat, dtype=torch.float32)
    )
