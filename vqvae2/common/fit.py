"""The one training loop: any model, any loss, on one process or many, exactly resumable."""

import copy
import math
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import send_to_device, set_seed
from PIL import Image
from torch import Tensor, nn
from tqdm.auto import tqdm

from vqvae2.common.artifact import WEIGHTS_NAME
from vqvae2.common.config import TrainingConfig
from vqvae2.common.errors import Stopped
from vqvae2.common.files import remove_folder
from vqvae2.common.loading import Loader
from vqvae2.common.metrics import Describe, Metrics
from vqvae2.common.pictures import save_picture

LossFunction = Callable[[nn.Module, Any], tuple[Tensor, Mapping[str, Tensor]]]
Evaluate = Callable[[Any], Mapping[str, float]]
Draw = Callable[[Any], Image.Image]
ParameterGroups = Sequence[Mapping[str, Any]]


class Savable(Protocol):
    """What a training leaves behind when it is done: an `Artifact`, or a module that holds one."""

    def save_pretrained(self, save_directory: str | Path) -> None:
        """Write a model folder."""


def learning_rate(step: int, config: TrainingConfig) -> float:
    """The learning rate of the update that makes step `step` (from 1): linear warm-up, then a cosine to zero at the last step."""
    if step <= config.warmup_steps:
        return config.learning_rate * step / (config.warmup_steps + 1)
    progress = (step - config.warmup_steps) / max(1, config.num_steps + 1 - config.warmup_steps)
    return config.learning_rate * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def fit(
    accelerator: Accelerator,
    model: Savable,
    loss_fn: LossFunction,
    loader: Loader,
    config: TrainingConfig,
    output_dir: Path,
    *,
    evaluate: Evaluate | None = None,
    draw: Draw | None = None,
    describe: Describe | None = None,
    shown: Sequence[str] = (),
    parameter_groups: ParameterGroups | None = None,
) -> None:
    """Train `model` for `config.num_steps` steps and leave the best weights in `output_dir`; continue if it holds a checkpoint.

    Args:
        loss_fn: `loss_fn(model, batch)` gives the loss to go down and figures to report (tensors on the device, averaged over steps and processes).
        loader: batches of `batch_size / gradient_accumulation_steps` rows over all processes.
        evaluate: figures on held-out data, the same on every process; the weights with the lowest "loss" among them are kept.
            Without it, or without a "loss" among its figures, the last weights are kept.
        draw: a picture of what the model does now, saved at intervals; called on the main process alone.
        describe: turns a step, the sums of the figures since the last report, and their number into numbers; without it the scalars' means are reported.
        shown: which of these numbers stand on the progress bar, besides the loss.
        parameter_groups: groups of the optimizer, each with its "params" and what it has of its own ("betas", ...); "rate" multiplies the
            learning rate. Without it there is one.

    Raises:
        Stopped: SIGTERM or Ctrl-C came; the state was saved.
        UserError: the loss is not finite.
    """
    assert isinstance(model, nn.Module)
    _seed_processes(config.seed, accelerator.process_index)

    # The averaged weights are a second model, copied before Accelerate wraps the first one.
    averaged = (
        copy.deepcopy(model).to(accelerator.device).eval() if config.weight_ema_decay else None
    )
    if config.compile:
        model.compile()  # in place: names of weights stay as they are
    groups = parameter_groups or [{"params": list(model.parameters())}]
    net, optimizer = accelerator.prepare(model, _make_optimizer(groups, accelerator.device, config))
    plain = accelerator.unwrap_model(net)
    kept = plain if averaged is None else averaged

    # All state that must survive: weights, optimizer, gradient scaler and random numbers (Accelerate's own), and this.
    metrics = Metrics(output_dir, accelerator, config, describe or _scalars)
    progress = _Progress(averaged, metrics)
    accelerator.register_for_checkpointing(progress)
    checkpoints = _Checkpoints(output_dir / "checkpoints", accelerator, config.keep_checkpoints)
    checkpoints.load_latest()
    if progress.step >= config.num_steps:
        return
    metrics.begin(progress.step)
    batches = loader.start_at(progress.step * config.gradient_accumulation_steps)
    bar = tqdm(
        total=config.num_steps,
        initial=progress.step,
        desc=output_dir.name,
        unit="step",
        disable=not accelerator.is_main_process,
    )

    with _signals() as received, bar:
        while progress.step < config.num_steps:
            progress.step += 1
            step, last = progress.step, progress.step == config.num_steps

            # One update.
            net.train()
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, config) * group["rate"]
            for part in range(config.gradient_accumulation_steps):
                asked = time.perf_counter()
                batch = send_to_device(next(batches), accelerator.device, non_blocking=True)
                metrics.waited += time.perf_counter() - asked
                final = part == config.gradient_accumulation_steps - 1
                with (
                    nullcontext() if final else accelerator.no_sync(net)
                ):  # all-reduce the gradients once per update
                    with accelerator.autocast():
                        loss, figures = loss_fn(net, batch)
                    accelerator.backward(loss / config.gradient_accumulation_steps)
                metrics.add({"loss": loss, **figures})
            if config.max_grad_norm:
                accelerator.unscale_gradients()
                for group in groups:  # each by itself: a discriminator's large gradients must not shrink the autoencoder's
                    nn.utils.clip_grad_norm_(group["params"], config.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
            if averaged is not None:
                update_average(averaged, plain, step, config.weight_ema_decay)
            bar.update()

            # Report. Only here does the host wait for the device.
            report = last or step % config.log_every == 0
            validate = evaluate is not None and (last or step % config.validate_every == 0)
            save = last or step % config.checkpoint_every == 0
            if report or validate or save:
                metrics.check_finite(step)
            if report:
                means = metrics.write_means(step, learning_rate(step, config))
                more = "".join(f", {name} {means[name]:.0f}" for name in shown)
                speed = f"{means['images_per_second']:.0f} images/s, {means['data_wait_share']:.0%} of the time waiting for data"
                bar.set_postfix_str(f"loss {means['loss']:.4f}{more}, {speed}")
            stop = (
                bool(received)
                if accelerator.num_processes == 1
                else report and _any_process(accelerator, bool(received))
            )

            # Validate, keep the best, draw: time that does not count in images/s.
            pause = time.perf_counter()
            if validate and evaluate is not None:
                found = _evaluate(evaluate, kept, accelerator)
                metrics.write(step, {f"validation/{name}": value for name, value in found.items()})
                if accelerator.is_main_process:
                    metrics.draw_curves()
                    bar.write(
                        f"step {step}: held out "
                        + ", ".join(f"{name} {value:.4g}" for name, value in found.items())
                    )
                if "loss" not in found or found["loss"] < progress.best:
                    progress.best = found.get("loss", progress.best)
                    if accelerator.is_main_process:
                        kept.save_pretrained(output_dir)
            if (
                draw is not None
                and config.picture_every
                and (last or step % config.picture_every == 0)
                and accelerator.is_main_process
            ):
                kept.eval()
                picture = draw(kept)
                save_picture(picture, output_dir / "images" / f"step_{step:08d}.png")
                metrics.write_picture(step, picture)

            # Save the state.
            if (
                last
                and accelerator.is_main_process
                and (evaluate is None or not (output_dir / WEIGHTS_NAME).exists())
            ):
                kept.save_pretrained(output_dir)
            if save or stop:
                metrics.check_finite(step)
                checkpoints.save(step)
            if stop and not last:
                number = received[0] if received else signal.SIGTERM
                raise Stopped(
                    f"{output_dir}: stopped at step {step} of {config.num_steps}, state saved; the same command continues.",
                    number,
                )
            metrics.started += time.perf_counter() - pause
    metrics.close()


def is_finished(output_dir: Path, config: TrainingConfig) -> bool:
    """Whether the run in this folder has made all its steps and left its model."""
    return (output_dir / WEIGHTS_NAME).exists() and (
        output_dir / "checkpoints" / step_name(config.num_steps)
    ).exists()


def step_name(step: int) -> str:
    """The name of the checkpoint of a step: as text it sorts like the number."""
    return f"step_{step:08d}"


@torch.no_grad()
def update_average(averaged: nn.Module, model: nn.Module, step: int, decay: float) -> None:
    """Move the averaged parameters towards the model's (decay min(decay, (1 + step) / (10 + step))) and copy its buffers.

    A codebook is a buffer that is an average already: without the copy the averaged model would keep the initial one.
    """
    decay = min(decay, (1 + step) / (10 + step))
    torch._foreach_lerp_(list(averaged.parameters()), list(model.parameters()), 1 - decay)
    for old, new in zip(averaged.buffers(), model.buffers(), strict=True):
        old.copy_(new)


def _scalars(step: int, sums: Mapping[str, Tensor], count: int) -> dict[str, float]:
    return {name: total.item() / count for name, total in sums.items() if total.ndim == 0}


def _make_optimizer(
    groups: ParameterGroups, device: torch.device, config: TrainingConfig
) -> torch.optim.Optimizer:
    """Matrices and kernels decay, vectors do not."""
    split = []
    for group in groups:
        learned = [p for p in group["params"] if p.requires_grad]
        split.append(
            {
                "rate": 1.0,
                **group,
                "params": [p for p in learned if p.ndim >= 2],
                "weight_decay": config.weight_decay,
            }
        )
        split.append(
            {
                "rate": 1.0,
                **group,
                "params": [p for p in learned if p.ndim < 2],
                "weight_decay": 0.0,
            }
        )
    return torch.optim.AdamW(
        split,
        lr=config.learning_rate,
        betas=config.adam_betas,
        fused=device.type in ("cpu", "cuda"),
    )


def _seed_processes(seed: int, process_index: int) -> None:
    """Dropout differs between the processes; everything else that is random is keyed by the seed elsewhere."""
    set_seed(int(np.random.SeedSequence([seed, process_index]).generate_state(1)[0]))


def _evaluate(evaluate: Evaluate, model: Any, accelerator: Accelerator) -> Mapping[str, float]:
    model.eval()
    with torch.no_grad(), accelerator.autocast():
        return evaluate(model)


def _any_process(accelerator: Accelerator, flag: bool) -> bool:
    return bool(
        accelerator.reduce(
            torch.tensor(float(flag), device=accelerator.device), reduction="sum"
        ).item()
    )


class _Progress:
    """What Accelerate does not know of: the step, the best held-out loss so far, the averaged weights, figures not yet reported."""

    def __init__(self, averaged: nn.Module | None, metrics: "Metrics") -> None:
        self.step, self.best, self.averaged, self.metrics = 0, math.inf, averaged, metrics

    def state_dict(self) -> dict[str, Any]:
        averaged = self.averaged.state_dict() if self.averaged is not None else {}
        return {
            "step": self.step,
            "best": self.best,
            "averaged": averaged,
            "sums": self.metrics.sums,
            "count": self.metrics.count,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.step, self.best, self.metrics.count = state["step"], state["best"], state["count"]
        self.metrics.sums = send_to_device(state["sums"], self.metrics.accelerator.device)
        if self.averaged is not None:
            self.averaged.load_state_dict(state["averaged"])


class _Checkpoints:
    """Training states in folders `step_N`: written aside and renamed, the oldest removed."""

    def __init__(self, folder: Path, accelerator: Accelerator, keep: int) -> None:
        self.folder, self.accelerator, self.keep = folder, accelerator, keep

    def _all(self) -> list[Path]:
        return sorted(self.folder.glob("step_*"))

    def load_latest(self) -> None:
        if self._all():
            self.accelerator.load_state(str(self._all()[-1]))

    def save(self, step: int) -> None:
        aside, target = self.folder / f".{step_name(step)}.partial", self.folder / step_name(step)
        self.accelerator.save_state(
            str(aside)
        )  # on every process: each has random numbers of its own
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process and not target.exists():
            aside.rename(target)
            for old in self._all()[: -self.keep]:
                remove_folder(old)
        self.accelerator.wait_for_everyone()


@contextmanager
def _signals() -> Iterator[list[int]]:
    """Collect SIGTERM and SIGINT instead of dying from them; a second Ctrl-C interrupts at once."""
    received: list[int] = []

    def receive(number: int, frame: Any) -> None:
        if received and number == signal.SIGINT:
            raise KeyboardInterrupt
        received.append(number)

    try:
        before = {
            number: signal.signal(number, receive) for number in (signal.SIGTERM, signal.SIGINT)
        }
    except ValueError:  # not in the main thread: whoever runs the thread handles signals
        yield received
        return
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
