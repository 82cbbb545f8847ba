"""The stages that a command line stands for, and what a step of each needs."""

import os
import weakref
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
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
from pipelines.config import DemoConfig, ExtractConfig, PlanConfig
from pipelines.encoding import LANES
from pipelines.recipes import DEMO_IMAGES, demo_recipe
from prior import attention
from prior.config import TrainPriorConfig
from prior.manifest import Manifest, read_manifest
from prior.registry import make_prior
from vqvae2 import losses
from vqvae2.common.config import TrainingConfig, from_dict
from vqvae2.common.errors import UserError
from vqvae2.common.files import looks_like_path
from vqvae2.common.fit import make_optimizer
from vqvae2.common.muon import moment_names
from vqvae2.config import ImagesConfig, PreprocessingConfig, TrainVQVAEConfig, VQVAE2Config
from vqvae2.data import load_images, to_images
from vqvae2.discriminator import AdversarialPair
from vqvae2.model import VQVAE2
from vqvae2.quantizers import Quantizer
from vqvae2.training import autoencoder_of, make_trained, with_finetuned_model

LARGEST = 10**9  # rows of an unknown number of images: the largest network that may be chosen
PRECISIONS = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Stage(NamedTuple):
    """A training, or an extraction. Models and batches of random rows lie on the default device."""

    name: str
    config: TrainingConfig
    num_rows: int | None  #: of an epoch, where they are known
    make_model: Callable[[], nn.Module]
    loss_fn: Callable[[Any, Any], Any]
    make_batch: Callable[[int], dict[str, Any]]
    quicker: str  #: what makes it quicker

    def loss(self, model: nn.Module, batch: Any, precision: str) -> Tensor:
        """The loss `()` of a batch under autocast; of an extraction, codes."""
        device, dtype = next(model.parameters()).device.type, PRECISIONS[precision]
        with torch.autocast(device, dtype, enabled=dtype != torch.float32):
            return self.loss_fn(model, batch)[0]


def stages_of(plan: PlanConfig) -> list[Stage]:
    """The stage of a command; of the demo or a recipe, the autoencoder's training and each level's
    prior. Raises a `UserError` as the commands do, and for images that cannot be counted."""
    # The autoencoder: what an earlier command has not made yet is as the recipe would make it.
    command, images = plan.planned, getattr(plan.planned, "data", None)
    recipe, where = load_recipe(plan.recipe) if plan.recipe else {}, f"recipe {plan.recipe}"
    if isinstance(command, DemoConfig):
        recipe, images = demo_recipe(command.budget), ImagesConfig(path=str(DEMO_IMAGES))
    train = _autoencoder_of(recipe, where)
    if isinstance(command, TrainVQVAEConfig):
        if command.finetune == "decoder" and _is_there(str(command.init_from)):
            command = with_finetuned_model(command)
        train = command
    network, number = train.model, plan.num_images
    class_names: Sequence[str] = [*map(str, range(plan.num_classes))]
    if isinstance(command, ExtractConfig) and _is_there(command.vqvae):
        network = VQVAE2.from_pretrained(command.vqvae).config

    # The images.
    if images is not None and number is None:
        try:
            found = load_images(images, network.image, check=False)
        except UserError as error:
            what = "the images cannot be counted, so correct this or give --num-images"
            raise UserError(f"{what}: {error}") from None
        number, class_names = len(found.train), found.class_names
        others = f"{len(found.validation):,} held out, {len(class_names) or 'no'} classes"
        print(f"{number:,} training images, {others}")

    # One stage, or all of the recipe.
    if isinstance(command, ExtractConfig):
        return [_extraction_stage(command, network, number or 0, plan.num_devices)]
    if isinstance(command, TrainVQVAEConfig):
        return [_autoencoder_stage(train, number)]
    if isinstance(command, TrainPriorConfig):
        there = _is_there(os.path.abspath(command.codes))
        codes = read_manifest(Path(command.codes)) if there else _codes_of(network, class_names)
        return [_prior_stage(command, codes, number or codes.num_train or None)]
    return trainings_of(recipe, where, number, class_names)


def trainings_of(
    recipe: dict[str, Any],
    where: str,
    num_images: int | None = None,
    class_names: Sequence[str] = (),
    vector_size: int = 0,
) -> list[Stage]:
    """The trainings of a recipe: the autoencoder's and each level's prior, on images with these
    classes and with vectors of this size. `where` begins the message of a `UserError` about a
    setting."""
    train = _autoencoder_of(recipe, where)
    names = [f"prior_{level}" for level in range(train.model.num_levels)]
    for name in recipe:
        if name.startswith("prior_") and name not in names:
            raise UserError(f"{where} has a section {name}, but its priors are {', '.join(names)}.")
    stages = [_autoencoder_stage(train, num_images)]
    codes = _codes_of(train.model, class_names, vector_size)
    num_rows = num_images and num_images * len(recipe_section(recipe, "extract").get("views", [""]))
    for level in map(str, range(train.model.num_levels)):
        section = {**recipe_section(recipe, "train-prior", level), "level": level}
        config = from_dict(TrainPriorConfig, section, where, missing=tyro.MISSING)
        stages.append(_prior_stage(config, codes, num_rows))
    return stages


def _autoencoder_of(recipe: dict[str, Any], where: str) -> TrainVQVAEConfig:
    section = recipe_section(recipe, "train")
    return from_dict(TrainVQVAEConfig, section, where, missing=tyro.MISSING)


def _codes_of(network: VQVAE2Config, class_names: Sequence[str], vector_size: int = 0) -> Manifest:
    """What a code dataset of this autoencoder will say of itself."""
    unknown: dict[str, Any] = {"encoder_hash": "", "rows_hash": "", "preprocessing": None}
    facts: dict[str, Any] = {"class_names": tuple(class_names), "vector_size": vector_size}
    sizes = network.codebook_size_per_level
    return Manifest(grids=network.grids, codebook_sizes=sizes, **facts, **unknown)


def _is_there(place: str) -> bool:
    there = Path(place).exists() or not looks_like_path(place)
    if not there:
        print(f"{place} is not there yet: planned for what the recipe or the defaults make")
    return there


def _pixels(image: PreprocessingConfig, rows: int) -> dict[str, Any]:
    shape = rows, image.channels, *image.height_width
    return {"images": torch.randint(256, shape, dtype=torch.uint8)}


def _autoencoder_stage(config: TrainVQVAEConfig, number: int | None) -> Stage:
    gan, pixels = config.discriminator, partial(_pixels, config.model.image)
    loss = config.reconstruction_loss, config.model.codebook_size_per_level

    def loss_fn(model: Any, batch: Any) -> Any:
        if not gan.weight:
            return losses.make_loss(*loss)(model, batch)
        term = losses.make_adversarial_term(gan, autoencoder_of(model).last_layer)
        return losses.make_loss(*loss, adversarial=term)(model, batch)

    def make_model() -> nn.Module:
        made = make_trained(VQVAE2(config.model), config)
        if isinstance(made, AdversarialPair):
            made.start, made.number = -1, 0  # a step with all that there is
        return made

    if config.perceptual.weight:
        print("The network of the perceptual loss takes more of everything than is planned here")
    half = "--image.size " + " ".join(str(side // 2) for side in config.model.image.size)
    quicker = f"{half}, or fewer --num-steps"
    return Stage("train", config, number, make_model, loss_fn, pixels, quicker)


def _extraction_stage(
    config: ExtractConfig, network: VQVAE2Config, number: int, num_devices: int
) -> Stage:
    size, rows = LANES * num_devices, number * len(config.views)  # a step: a batch on each device
    options: dict[str, Any] = {"mixed_precision": config.mixed_precision, "weight_ema_decay": 0}
    steps = TrainingConfig(batch_size=size, num_steps=-(-rows // size), **options)

    def codes(model: Any, batch: Any) -> Any:
        return [level.codes for level in model.encode(to_images(batch["images"]))]

    def make_model() -> nn.Module:
        return VQVAE2(network).eval().requires_grad_(False)

    pixels = partial(_pixels, network.image)
    return Stage("extract", steps, rows, make_model, codes, pixels, "several machines")


def _prior_stage(config: TrainPriorConfig, codes: Manifest, number: int | None) -> Stage:
    rows = LARGEST if number is None else number
    model = prior.training.prior_config(config, codes, num_rows=rows)
    loss_fn = prior.training.make_loss(model, token_corruption=config.token_corruption)

    def make_batch(rows: int) -> dict[str, Any]:
        levels = zip(model.codebook_sizes, model.grids, strict=True)
        codes = [torch.randint(size, (rows, *grid)) for size, grid in levels]
        batch: dict[str, Any] = {"codes": codes, "labels": torch.zeros(rows, dtype=torch.int64)}
        if model.vector_size:
            batch["vectors"] = torch.zeros(rows, model.vector_size)
        return batch

    quicker, make_model = f"a smaller --{config.family}.width", partial(make_prior, model)
    quicker += " or fewer --num-steps"
    return Stage(f"prior_{model.level}", config, number, make_model, loss_fn, make_batch, quicker)


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


def trace(
    stage: Stage, rows: int, precision: str, kind: str = "cpu"
) -> tuple[int, int, dict[str, float]]:
    """Number of parameters, FLOPs of forward and backward of this many rows, and GiB by purpose.

    The step is the real one under `FakeTensorMode` (meta tensors know no autocast, and torch's
    `MemTracker` is slower), as if on a CPU: for a GPU ("cuda"), which fuses operations, an
    approximation. Its autocast computes group norm in fp32, whose input and output are kept.
    Several devices take no more each: the gradients are views of the buckets that they exchange.
    """
    with torch.device("meta"):
        model = stage.make_model()
    with FakeTensorMode(allow_non_fake_inputs=True), Meter() as meter:
        model.to_empty(device="cpu")
        weights = meter.alive
        for parameter in filter(lambda parameter: parameter.requires_grad, model.parameters()):
            parameter.grad = torch.empty_like(parameter)  # left by an earlier part of the batch
        constant = meter.alive
        for module in model.modules():
            if isinstance(module, Quantizer):  # its codebook's updates read values: there are none
                module.eval()
            if isinstance(module, nn.GroupNorm) and kind == "cuda":
                module.register_forward_pre_hook(lambda _, inputs: tuple(x.float() for x in inputs))
        loss = stage.loss(model, stage.make_batch(rows), precision)
        activations = meter.alive - constant
        if loss.requires_grad:
            loss.backward()
    attention.kept_mask.cache_clear()  # masks without memory must not meet real tensors
    averaged, gradients = weights * (stage.config.weight_ema_decay > 0), constant - weights
    sizes = {"weights": weights, "averaged weights": averaged, "gradients": gradients}
    sizes["optimizer"] = bytes_of_moments(model, stage.config) if gradients else 0
    sizes["activations"] = activations
    sizes["working memory"] = meter.peak - constant - activations
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    return num_parameters, meter.flops, {name: size / 2**30 for name, size in sizes.items()}


def bytes_of_moments(model: nn.Module, config: TrainingConfig) -> int:
    """What the optimizer keeps."""
    total = 0
    for group in make_optimizer(model, config).param_groups:
        kept = [name for name in moment_names(group) if name != "step"]  # which is a number
        total += len(kept) * sum(parameter.nbytes for parameter in group["params"])
    return total
