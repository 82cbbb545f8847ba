"""The one training loop: any model, any loss, on one process or many, exactly resumable."""

import copy
import logging
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object, send_to_device, set_seed
from PIL import Image
from torch import Tensor, nn

from vqvae2.common.accelerate import on_main_process
from vqvae2.common.artifact import (
    WEIGHTS_NAME,
    Artifact,
    check_saved,
    load_other_weights,
    local_folder,
)
from vqvae2.common.checkpoint import TrainingState, saved_steps, step_name, tidy
from vqvae2.common.compiling import CompileTrial
from vqvae2.common.config import TrainingConfig
from vqvae2.common.errors import Stopped, UserError
from vqvae2.common.loading import Loader
from vqvae2.common.messages import progress_bar
from vqvae2.common.metrics import (
    Describe,
    Metrics,
    conclusion,
    read_metrics,
    save_curves,
    scalar_means,
    stopped_early,
    validations,
)
from vqvae2.common.muon import MuonAdamW, layer_weights
from vqvae2.common.pictures import save_picture
from vqvae2.common.threads import OwnCpus
from vqvae2.common.torch_settings import settings_restored, use_deterministic_algorithms

logger = logging.getLogger(__name__)
LossFunction = Callable[[nn.Module, Any], tuple[Tensor, Mapping[str, Tensor]]]
Evaluate = Callable[[Any], Mapping[str, float]]
Draw = Callable[[Any], Image.Image]


def learning_rate(step: int, config: TrainingConfig) -> float:
    """The rate of step `step` (from 1): linear warm-up, then a cosine to zero at the last step."""
    warmup = config.shortened_warmup
    if step <= warmup:
        return config.learning_rate * step / (warmup + 1)
    progress = (step - warmup) / (config.num_steps + 1 - warmup)
    return config.learning_rate * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


@settings_restored()
def fit(
    accelerator: Accelerator,
    model: nn.Module,
    loss_fn: LossFunction,
    loader: Loader,
    config: TrainingConfig,
    output_dir: Path,
    *,
    evaluate: Evaluate | None = None,
    draw: Draw | None = None,
    describe: Describe = scalar_means,
    shown: Sequence[str] = (),
) -> None:
    """Train `model` for `config.num_steps` steps, continuing from a checkpoint in `output_dir`.

    Args:
        model: an `Artifact`, or a module whose own `save_pretrained(folder)` writes the same files.
            See `make_optimizer` for how it may divide its parameters.
        loss_fn: `loss_fn(model, batch)` gives the loss to minimise and figures to report (tensors
            on the device, averaged over steps and processes).
        loader: batches of `batch_size / gradient_accumulation_steps` rows over all processes.
        evaluate: figures on held-out data, the same on every process. The weights with the lowest
            "loss" among them are kept; without it, or without a "loss", the last weights.
        draw: a picture of what the model does now; called on the main process alone.
        describe: see `Metrics`; by default the means of the scalars.
        shown: which of its figures stand on the progress bar, besides the loss.

    Raises:
        Stopped: SIGTERM or Ctrl-C came; the state was saved.
        UserError: the loss is not finite, or the best weights are gone; or see `is_finished` and
            `TrainingState.load_latest`.
    """
    main = partial(on_main_process, accelerator)  # does what only one process does
    if main(partial(is_finished, output_dir, config)):
        return

    # Dropout (torch's generators) differs between the processes; all else that is random is keyed
    # by the seed elsewhere.
    seed = np.random.SeedSequence([config.seed, accelerator.process_index])
    set_seed(int(seed.generate_state(1)[0]))
    use_deterministic_algorithms(config.deterministic)

    # The averaged weights are a second model, copied before Accelerate wraps the first one.
    averages = config.weight_ema_decay > 0
    averaged = copy.deepcopy(model).to(accelerator.device).eval() if averages else None
    choice = False if config.deterministic and config.compile == "auto" else config.compile
    trial = CompileTrial(model, accelerator.device, choice, output_dir, main)
    groups = parameter_groups(model)
    net, optimizer = accelerator.prepare(model, make_optimizer(model, config))
    plain = accelerator.unwrap_model(net)
    result: Any = plain if averaged is None else averaged  # what is validated, drawn, saved

    # Everything that must survive. A state is there from the start, before there is a model.
    metrics = Metrics(output_dir, accelerator, config, describe)
    folder = output_dir / "checkpoints"
    state = TrainingState(folder, accelerator, plain, averaged, optimizer, metrics)
    if not state.load_latest():
        if metrics.path.exists():
            logger.warning("%s has neither a model nor a checkpoint: starting over.", output_dir)
        state.save(config.keep_checkpoints)
    if state.best < math.inf and not main((output_dir / WEIGHTS_NAME).exists):
        what = f"{output_dir / WEIGHTS_NAME}, the best weights of this run, is gone"
        raise UserError(f"{what}: restore it, or train anew in another folder.")
    if state.step >= config.num_steps:  # a run that was shortened before it left a model
        main(partial(result.save_pretrained, output_dir))
        return
    if config.shortened_warmup < config.warmup_steps:
        shorter = "warm-up takes %d steps instead of %d, for it is at most half of the run"
        logger.warning(shorter, config.shortened_warmup, config.warmup_steps)
    metrics.begin(state.step)
    num_steps, num_parts = config.num_steps, config.gradient_accumulation_steps
    batches = loader.start_at(state.step * num_parts)
    bar = progress_bar(desc=output_dir.name, total=num_steps, initial=state.step, unit="step")
    agreement = _Agreement(accelerator)

    def show(step: int) -> None:
        if draw is None:
            return
        # Sampling needs cumulative sums, which torch refuses to compute deterministically.
        use_deterministic_algorithms(False)
        try:
            picture = draw(result.eval())
        except torch.OutOfMemoryError:  # it may need more than a step, and training goes before
            text = "%s: memory is short, so there is no picture at step %d; training goes on."
            logger.warning(text, output_dir, step)
            return
        finally:
            use_deterministic_algorithms(config.deterministic)
        save_picture(picture, output_dir / "images" / f"{step_name(step)}.png")
        metrics.write_picture(step, picture)

    def save_last() -> None:
        if evaluate is None or not (output_dir / WEIGHTS_NAME).exists():
            result.save_pretrained(output_dir)

    trial.begin(state.step)
    own_cpus = OwnCpus(bind=accelerator.device.type == "cpu")

    def report(step: int) -> None:
        own_cpus.warn()
        means = metrics.write_means(step, learning_rate(step, config))
        texts = [f"loss {means['loss']:.4f}", *(f"{n} {means[n]:.0f}" for n in shown)]
        texts.append(f"{means['images_per_second']:.0f} images/s")
        texts.append(f"{means['data_wait_share']:.0%} of the time waiting for data")
        bar.set_postfix_str(", ".join(texts), refresh=False)

    def validate(step: int, evaluate: Evaluate) -> bool:
        """Write what held-out data say and keep the best weights; whether to stop early."""
        with torch.no_grad(), accelerator.autocast():
            held_out = evaluate(result.eval())
        metrics.write(step, {f"validation/{name}": v for name, v in held_out.items()})
        once: dict[Any, str] = {}  # of those that are the same number, the first
        for name, value in held_out.items():
            once.setdefault(name if name[-1].isdigit() else value, f"{name} {value:.4g}")
        logger.info("step %d: held out %s", step, ", ".join(once.values()))
        if config.patience and "loss" not in held_out and step <= config.validation_interval:
            logger.warning("patience has no effect: the last weights are kept, not the best ones.")
        is_best = held_out.get("loss", -math.inf) < state.best
        state.best = min(state.best, held_out.get("loss", state.best))
        if is_best:
            main(partial(result.save_pretrained, output_dir))
        return main(partial(stopped_early, output_dir, config.patience))

    with ExitStack() as at_end, _signals() as received, bar:
        at_end.callback(metrics.close)
        last = False
        while not last:
            state.step += 1
            step, last = state.step, state.step == num_steps

            # One update, from the gradients of all parts of a batch.
            trial.before_step(step)
            net.train()
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, config) * group["rate"]
            for part in range(num_parts):
                asked = time.perf_counter()
                batch = send_to_device(next(batches), accelerator.device, non_blocking=True)
                metrics.waited += time.perf_counter() - asked
                is_complete = part == num_parts - 1  # now processes exchange their gradients
                # Threads of ours are bound to their CPUs, but those of a compiler must not be.
                cpus = nullcontext() if trial.compiled else own_cpus
                with cpus, nullcontext() if is_complete else accelerator.no_sync(net):
                    with accelerator.autocast():
                        loss, figures = loss_fn(net, batch)
                    accelerator.backward(loss / num_parts)
                metrics.add({"loss": loss, **figures})
            if config.max_grad_norm:
                accelerator.unscale_gradients()
                for group in groups:  # each alone: one's large gradients must not shrink another's
                    nn.utils.clip_grad_norm_(group["params"], config.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
            if averaged is not None:
                update_average(averaged, plain, step, config.weight_ema_decay)
            bar.update()
            trial.after_step(step, num_steps)

            # What to do after this step.
            is_time_to_report = last or step % config.log_every == 0
            is_time_to_validate = evaluate is not None and (
                last or step % config.validation_interval == 0
            )
            save = step % config.checkpoint_every == 0
            stop = agreement.stop(bool(received), ask=is_time_to_report)

            # Report. Only here does the host wait for the device.
            if is_time_to_report or is_time_to_validate or save or stop:
                metrics.check_finite(step)
            if is_time_to_report:
                report(step)

            # Validate, keep the best, draw: time that does not count in images/s.
            pause = time.perf_counter()
            if evaluate is not None and is_time_to_validate:
                last = validate(step, evaluate) or last
            if is_time_to_validate or last:
                main(partial(save_curves, output_dir))
            if config.picture_every > 0 and (last or step % config.picture_every == 0):
                main(partial(show, step))

            # Save the last weights if there are no best ones, and the state to continue from.
            if last:
                main(save_last)
            if save or stop or last:
                state.save(config.keep_checkpoints)
            if stop and not last:
                number = received[0] if received else signal.SIGTERM
                done = f"stopped at step {step} of {num_steps}, state saved"
                raise Stopped(f"{output_dir}: {done}; the same command continues.", number)
            pause = time.perf_counter() - pause
            metrics.started += pause
            trial.leave_out(pause)
            if last and not is_time_to_report:  # it was stopped early
                report(step)
    logger.info("%s: %s.", output_dir, main(partial(conclusion, output_dir, config)))


def load_first_weights(model: Artifact, config: TrainingConfig, output_dir: Path) -> None:
    """Load what a run begins with, if it is given and the run has no state of its own yet. Raises a
    `UserError` as `load_other_weights` does."""
    if config.init_from is not None and not saved_steps(output_dir / "checkpoints"):
        load_other_weights(model, local_folder(config.init_from))


def is_finished(output_dir: Path, config: TrainingConfig) -> bool:
    """Whether the run in this folder has made all its steps, or was stopped early, and left its
    model. (To save space, its checkpoints may have been removed: then its metrics tell.)

    Raises:
        UserError: there is a model, but it is damaged, or there is nothing to continue from; or a
            link leads out of the run.
    """
    # What is written here must not arrive elsewhere, and what was half written is of no use.
    for path in output_dir.iterdir() if output_dir.is_dir() else ():
        if path.is_symlink():
            raise UserError(f"{path} is a link, and a run writes none: put there what it leads to.")

    tidy(output_dir / "checkpoints")

    # The steps that were made.
    if not (output_dir / WEIGHTS_NAME).exists():
        return False
    end = config.num_steps
    if stopped_early(output_dir, config.patience):
        end = min(end, int(validations(output_dir)[-1]["step"]))
    kept = saved_steps(output_dir / "checkpoints")
    steps = kept or [line["step"] for line in read_metrics(output_dir)]
    if steps and steps[-1] >= end:
        check_saved(output_dir)
        return True
    if kept:
        return False
    made = f"of step {steps[-1]}" if steps else "of an unknown step"
    raise UserError(
        f"{output_dir} holds a model {made} and no checkpoint from which to reach step "
        f"{config.num_steps}: start from it with --init-from {output_dir} in another --output-dir."
    )


@torch.no_grad()
def update_average(averaged: nn.Module, model: nn.Module, step: int, decay: float) -> None:
    """Move the averaged parameters towards the model's, and copy its buffers.

    The decay warms up: min(decay, (1 + step) / (10 + step)). A codebook of running averages is a
    buffer: without the copy the averaged model would keep the initial one.
    """
    decay = min(decay, (1 + step) / (10 + step))
    torch._foreach_lerp_(list(averaged.parameters()), list(model.parameters()), 1 - decay)
    for old, new in zip(averaged.buffers(), model.buffers(), strict=True):
        old.copy_(new)


def parameter_groups(model: nn.Module) -> Sequence[Mapping[str, Any]]:
    """What a model's own `parameter_groups()` says, or all parameters as one group: "params", and
    settings of the optimizer ("betas", ...); "rate" multiplies the learning rate, and "muon" False
    leaves all to AdamW. Gradients of a group are clipped together."""
    own: Any = getattr(model, "parameter_groups", None)
    return own() if own else [{"params": list(model.parameters())}]


def make_optimizer(model: nn.Module, config: TrainingConfig) -> MuonAdamW:
    """Muon for the weights of layers, if the configuration says so, and AdamW for what else is
    learned, in which matrices decay and vectors do not."""
    matrices = layer_weights(model) if config.optimizer == "muon" else set()
    split = []
    for group in parameter_groups(model):
        parts: dict[tuple[bool, float], list[nn.Parameter]] = {}
        for parameter in group["params"]:
            if parameter.requires_grad:
                muon = group.get("muon", True) and id(parameter) in matrices
                decay = config.weight_decay if parameter.ndim > 1 else 0.0
                parts.setdefault((muon, decay), []).append(parameter)
        for (muon, decay), learned in parts.items():
            settings = {"params": learned, "weight_decay": decay, "muon": muon}
            split.append({"rate": 1.0, **group, **settings})
    return MuonAdamW(split, config.learning_rate, betas=config.adam_betas, fused=True)


class _Agreement:
    """Whether to stop, which processes ask one another every few seconds: at the same steps, for
    all of them reckon with the speed of the slowest."""

    SECONDS = 2.0

    def __init__(self, accelerator: Accelerator) -> None:
        self.num_processes, self.due = accelerator.num_processes, 1
        self._start()

    def _start(self) -> None:
        self.steps, self.started = 0, time.perf_counter()

    def stop(self, wish: bool, *, ask: bool) -> bool:
        """Whether one process wishes to stop; called after every step. `ask`: now in any case."""
        if self.num_processes == 1:
            return wish
        self.steps += 1
        if not ask and self.steps < self.due:
            return False
        seconds = (time.perf_counter() - self.started) / self.steps
        answers = gather_object([(wish, seconds)])
        self.due = int(self.SECONDS / max(seconds for _, seconds in answers))
        self._start()
        return any(wish for wish, _ in answers)


@contextmanager
def _signals() -> Iterator[list[int]]:
    """Collect SIGTERM and SIGINT instead of dying from them; a second Ctrl-C interrupts at once."""
    received: list[int] = []

    def receive(number: int, frame: Any) -> None:
        if received and number == signal.SIGINT:
            raise KeyboardInterrupt
        received.append(number)

    before = {}
    if threading.current_thread() is threading.main_thread():  # no other may set handlers
        before = {n: signal.signal(n, receive) for n in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
