"""The trainings of a recipe, and what a step of each needs."""

import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import tyro
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

import prior.training
from pipelines.cli import load_recipe, recipe_section
from prior import attention
from prior.config import TrainPriorConfig
from prior.manifest import Manifest
from prior.registry import make_prior
from vqvae2 import losses
from vqvae2.common.config import TrainingConfig, check, from_dict
from vqvae2.config import TrainVQVAEConfig
from vqvae2.discriminator import AdversarialPair
from vqvae2.model import VQVAE2
from vqvae2.quantizers import Quantizer


class Stage(NamedTuple):
    """One training. Models and batches (of a number of random rows) lie on the default device."""

    name: str
    config: TrainingConfig
    make_model: Callable[[], nn.Module]
    loss_fn: Callable[[Any, Any], Any]
    make_batch: Callable[[int], dict[str, Any]]

    def loss(self, model: nn.Module, batch: Any, precision: str) -> Tensor:
        """The loss `()` of a batch under autocast."""
        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)
        with torch.autocast(next(model.parameters()).device.type, dtype, dtype is not None):
            return self.loss_fn(model, batch)[0]


def stages_of(recipe_name: str, num_classes: int = 0) -> list[Stage]:
    """The autoencoder's training, then each level's prior, coarse to fine. Raises a `UserError`:
    no such recipe, an impossible setting, or a prior of a level that does not exist."""
    recipe, where = load_recipe(recipe_name), f"recipe {recipe_name}"
    section = recipe_section(recipe, "train")
    train = from_dict(TrainVQVAEConfig, section, where, missing=tyro.MISSING)
    priors = [f"prior_{level}" for level in range(train.model.num_levels)]
    extra = [name for name in recipe if name.startswith("prior_") and name not in priors]
    check(not extra, f"{where}: section", ", ".join(extra), f"one of {', '.join(priors)}")

    # A prior takes its grids and vocabulary from a code dataset: describe the one to come.
    unknown: dict[str, Any] = {"encoder_hash": "", "rows_hash": "", "preprocessing": None}
    sizes, classes = train.model.codebook_size_per_level, tuple(map(str, range(num_classes)))
    codes = Manifest(grids=train.model.grids, codebook_sizes=sizes, class_names=classes, **unknown)
    stages = [_autoencoder_stage(train)]
    for level in map(str, range(len(priors))):
        section = {**recipe_section(recipe, "train-prior", level), "level": level}
        config = from_dict(TrainPriorConfig, section, where, missing=tyro.MISSING)
        stages.append(_prior_stage(config, codes))
    return stages


def _autoencoder_stage(config: TrainVQVAEConfig) -> Stage:
    image, gan = config.model.image, config.discriminator
    kind, sizes = config.reconstruction_loss, config.model.codebook_size_per_level

    def loss_fn(model: Any, batch: Any) -> Any:
        if not gan.weight:
            return losses.make_loss(kind, sizes)(model, batch)
        term = losses.make_adversarial_term(gan, model.autoencoder.last_layer, start=0)
        return losses.make_loss(kind, sizes, adversarial=term)(model, batch)

    def make_model() -> nn.Module:
        model = VQVAE2(config.model)
        return AdversarialPair(model, gan) if gan.weight else model

    def make_batch(rows: int) -> dict[str, Any]:
        shape = (rows, image.channels, *image.height_width)
        return {"images": torch.randint(256, shape, dtype=torch.uint8)}

    return Stage("train", config, make_model, loss_fn, make_batch)


def _prior_stage(config: TrainPriorConfig, codes: Manifest) -> Stage:
    model = prior.training.prior_config(config, codes)
    loss_fn = prior.training.make_loss(model, token_corruption=config.token_corruption)

    def make_batch(rows: int) -> dict[str, Any]:
        levels = zip(model.codebook_sizes, model.grids, strict=True)
        codes = [torch.randint(size, (rows, *grid)) for size, grid in levels]
        return {"codes": codes, "labels": torch.zeros(rows, dtype=torch.int64)}

    return Stage(f"prior_{model.level}", config, lambda: make_prior(model), loss_fn, make_batch)


ATEN, FLOPS = torch.ops.aten, dict(flop_registry)
for _end in ("", "_backward"):  # the registry lacks the attention of a CPU
    _fused = "_scaled_dot_product_flash_attention"
    FLOPS[getattr(ATEN, f"{_fused}_for_cpu{_end}")] = FLOPS[getattr(ATEN, _fused + _end)]


class Meter(TorchDispatchMode):
    """Counts floating-point operations, and bytes (of each storage once) until they are freed."""

    flops = alive = peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket in FLOPS:
            self.flops += FLOPS[func.overloadpacket](*args, **(kwargs or {}), out_val=result)
        for tensor in tree_leaves(result):
            storage: Any = tensor.untyped_storage() if isinstance(tensor, torch.Tensor) else None
            if storage is not None and not hasattr(storage, "is_counted"):
                storage.is_counted = True
                weakref.finalize(storage, self._add, -storage.nbytes())
                self._add(storage.nbytes())
        return result

    def _add(self, num_bytes: int) -> None:
        self.alive += num_bytes
        self.peak = max(self.peak, self.alive)


def trace(stage: Stage, rows: int, precision: str) -> tuple[int, int, dict[str, float]]:
    """Number of parameters, FLOPs of forward and backward of this many rows, and GiB by purpose.

    The step is the real one under `FakeTensorMode` (meta tensors know no autocast, and torch's
    `MemTracker` is slower), as if on a CPU: for a GPU, which fuses operations, an approximation.
    """
    with torch.device("meta"):
        model = stage.make_model()
    with FakeTensorMode(allow_non_fake_inputs=True), Meter() as meter:
        model.to_empty(device="cpu").train()
        weights = meter.alive
        for parameter in model.parameters():  # an earlier part of the batch has left its gradients
            parameter.grad = torch.empty_like(parameter)
        constant = meter.alive
        for module in model.modules():
            if isinstance(module, Quantizer):  # its codebook's updates read values: there are none
                module.eval()
        loss = stage.loss(model, stage.make_batch(rows), precision)
        activations = meter.alive - constant
        loss.backward()
    for cached in (attention._future, attention._window):
        cached.cache_clear()  # masks without memory must not meet real tensors
    averaged, gradients = weights * (stage.config.weight_ema_decay > 0), constant - weights
    sizes = {"weights": weights, "averaged weights": averaged, "gradients": gradients}
    sizes |= {"optimizer": 2 * gradients, "activations": activations}
    sizes["working memory"] = meter.peak - constant - activations
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    return num_parameters, meter.flops, {name: size / 2**30 for name, size in sizes.items()}
