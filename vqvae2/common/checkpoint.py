"""Training states on the disk: tensors as safetensors, numbers as JSON, nothing that can run code.

A folder `step_00000500` holds, besides state.json (the numbers, and the SHA-256 of the others):

    model.safetensors      the weights
    averaged.safetensors   their running average, if there is one
    optimizer.safetensors  the moments of the i-th parameter, as "i.exp_avg", "i.momentum", ...
    metrics.safetensors    the sums since the last line of metrics.jsonl
    random.safetensors     torch's generators of process r, as "r.cpu" and "r.cuda"
"""

import logging
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from safetensors.torch import save_file
from torch import Tensor, nn

from vqvae2.common.accelerate import on_main_process
from vqvae2.common.artifact import check_weights, content_hash, read_tensors
from vqvae2.common.config import from_dict, to_dict
from vqvae2.common.errors import UserError
from vqvae2.common.files import file_hash, read_json, remove_folder, whole_file, write_json
from vqvae2.common.metrics import Metrics
from vqvae2.common.muon import moment_names

logger = logging.getLogger(__name__)
STATE_NAME = "state.json"
Tensors = Mapping[str, Mapping[str, Tensor]]  # file name without suffix -> name -> tensor


@dataclass(frozen=True, kw_only=True)
class Numbers:
    """What state.json holds."""

    step: int
    best: float | None  #: the lowest held-out loss so far
    count: int  #: batches in the sums of the metrics
    scaler: Any = None  #: the loss scale of fp16
    files: Any = None  #: file name -> SHA-256
    sha256: str = ""  #: of these numbers themselves

    def signed(self) -> "Numbers":
        """The same with the right `sha256`."""
        return replace(self, sha256=content_hash(replace(self, sha256=""), ()))


def step_name(step: int) -> str:
    """The name of what belongs to a step: as text it sorts like the number."""
    return f"step_{step:08d}"


def saved_steps(folder: Path) -> list[int]:
    """The steps whose states are in a folder, in order."""
    names = (re.fullmatch(r"step_(\d+)", path.name) for path in folder.glob("step_*"))
    return sorted(int(match[1]) for match in names if match)


def tidy(folder: Path) -> None:
    """Remove the states that a killed run left half written or half removed."""
    for pattern in (".step_*.partial", ".step_*.removed"):
        for path in folder.glob(pattern):
            _remove(path)


def write_checkpoint(folder: Path, tensors: Tensors, numbers: Numbers) -> None:
    """Write a state aside and rename it; what is aside is removed if that fails."""
    aside = folder.with_name(f".{folder.name}.partial")
    _remove(aside)
    try:
        for name, group in tensors.items():
            with whole_file(aside / f"{name}.safetensors") as path:
                save_file({key: value.detach().contiguous() for key, value in group.items()}, path)
        files = {path.name: file_hash(path) for path in sorted(aside.iterdir())}
        write_json(aside / STATE_NAME, to_dict(replace(numbers, files=files).signed()))
        _sync(aside)
        if folder.exists():  # one that was not whole
            remove_folder(folder)
        aside.rename(folder)
        _sync(folder.parent)
    finally:
        _remove(aside)


def read_checkpoint(folder: Path) -> tuple[dict[str, dict[str, Tensor]], Numbers]:
    """What `write_checkpoint` wrote. Raises UserError: it is not whole."""
    numbers = from_dict(Numbers, read_json(folder / STATE_NAME), str(folder / STATE_NAME))
    if numbers != numbers.signed() or not isinstance(numbers.files, dict):
        raise UserError(f"{folder / STATE_NAME} was changed: restore it.")
    paths = [path for path in folder.iterdir() if path.suffix == ".safetensors" and path.is_file()]
    found = {path.name: file_hash(path) for path in paths}
    for name in sorted(found | numbers.files):
        if found.get(name) != numbers.files.get(name):
            raise UserError(f"{folder / name} is missing or was changed: restore it.")
    return {path.stem: read_tensors(path) for path in paths}, numbers


def _sync(folder: Path) -> None:
    """Let the names in a folder survive a power failure, where the system can."""
    if os.name == "posix":
        number = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(number)
        finally:
            os.close(number)


def _remove(path: Path) -> None:
    path.unlink() if path.is_symlink() else shutil.rmtree(path, ignore_errors=True)


class TrainingState:
    """What must survive of a training, and the folders `step_N` that hold it."""

    def __init__(
        self,
        folder: Path,
        accelerator: Accelerator,
        model: nn.Module,
        averaged: nn.Module | None,
        optimizer: Any,
        metrics: Metrics,
    ) -> None:
        self.folder, self.accelerator, self.optimizer = folder, accelerator, optimizer
        self.model, self.averaged, self.metrics = model, averaged, metrics
        self.step, self.best = 0, float("inf")

    def save(self, keep: int) -> None:
        """Write a checkpoint, and remove all but the last `keep` up to it. For every process."""
        own = {"cpu": torch.get_rng_state()}
        if self.accelerator.device.type == "cuda":
            own["cuda"] = torch.cuda.get_rng_state(self.accelerator.device)
        random: dict[str, Tensor] = {}
        for rank, states in enumerate(gather_object([own])):
            random |= {f"{rank}.{kind}": state for kind, state in states.items()}
        on_main_process(self.accelerator, partial(self._write, random, keep))

    def _write(self, random: Mapping[str, Tensor], keep: int) -> None:
        tensors = {"model": self.model.state_dict(), "metrics": self.metrics.sums, "random": random}
        if self.averaged is not None:
            tensors["averaged"] = self.averaged.state_dict()
        moments: dict[str, Tensor] = {}
        for i, (parameter, _) in enumerate(self._parameters()):
            named = self.optimizer.state.get(parameter, {}).items()
            moments |= {f"{i}.{name}": moment for name, moment in named}
        scaler = self.accelerator.scaler
        numbers = Numbers(
            step=self.step,
            best=self.best if self.best < float("inf") else None,
            count=self.metrics.count,
            scaler=None if scaler is None else scaler.state_dict(),
        )
        target = self.folder / step_name(self.step)
        write_checkpoint(target, {**tensors, "optimizer": moments}, numbers)
        until_now = [step for step in saved_steps(self.folder) if step <= self.step]
        for step in until_now[:-keep]:
            remove_folder(self.folder / step_name(step))
        logger.debug("%s: state saved", target)

    def load_latest(self) -> bool:
        """Continue from the newest whole checkpoint, on every process; False if there are none.

        Raises:
            UserError: there are some, but none is whole, or an earlier version wrote them.
        """
        steps = on_main_process(self.accelerator, self._steps)
        for step in reversed(steps):
            # All processes read it, or none takes it.
            folder, problem = self.folder / step_name(step), None
            try:
                tensors, numbers = self._read(folder)
            except (UserError, OSError) as error:
                problem = str(error)
            problems = [text for text in gather_object([problem]) if text is not None]
            if not problems:
                self._take(tensors, numbers)
                logger.debug("%s: continuing after step %d", self.folder.parent, self.step)
                return True
            logger.warning("%s is not whole, so an older state is taken: %s", folder, problems[0])
        if steps:
            advice = f"restore one, or give --init-from {self.folder.parent} to a new --output-dir"
            problem = problems[0].rstrip(".")
            raise UserError(f"{self.folder}: no state in it is whole ({problem}): {advice}.")
        return False

    def _steps(self) -> list[int]:
        steps = saved_steps(self.folder)
        if steps and (self.folder / step_name(steps[-1]) / "custom_checkpoint_0.pkl").exists():
            raise UserError(
                f"{self.folder} holds the state of an earlier version, which this one never opens "
                "(pickles can run code): finish the run with that version, or start from its model "
                f"with --init-from {self.folder.parent} in another --output-dir."
            )
        return steps

    def _read(self, folder: Path) -> tuple[dict[str, dict[str, Tensor]], Numbers]:
        """A checkpoint that fits this training. Raises UserError: it does not, or is not whole."""
        # The weights.
        tensors, numbers = read_checkpoint(folder)
        for name, module in {"model": self.model, "averaged": self.averaged}.items():
            if module is not None:
                path = folder / f"{name}.safetensors"
                check_weights(path, module.state_dict(), tensors.get(name, {}))

        # The sums, the moments, and the generators.
        sums = tensors.get("metrics", {})
        if bool(sums) != bool(numbers.count) or bool(sums) != ("loss" in sums):
            raise UserError(f"{folder}: the figures are of another training.")
        expected: dict[str, tuple[int, ...]] = {}
        for i, (parameter, moments) in enumerate(self._parameters()):
            for name in moments:
                expected[f"{i}.{name}"] = () if name == "step" else tuple(parameter.shape)
        shapes = {key: tuple(value.shape) for key, value in tensors.get("optimizer", {}).items()}
        if not shapes.items() <= expected.items():
            advice = "it may have begun with another --optimizer"
            raise UserError(f"{folder}: the moments are of another training: {advice}.")
        for key, value in tensors.get("random", {}).items():
            now = torch.get_rng_state() if key.endswith(".cpu") else value
            if (value.dtype, value.shape) != (torch.uint8, now.shape):
                raise UserError(f"{folder}: random.safetensors holds no state of a generator.")
        return tensors, numbers

    def _take(self, tensors: Tensors, numbers: Numbers) -> None:
        """Continue from what `_read` gave."""
        # The networks.
        accelerator = self.accelerator
        self.model.load_state_dict(tensors["model"])
        if self.averaged is not None:
            self.averaged.load_state_dict(tensors["averaged"])

        # The optimizer. Its kernels demand moments that lie in memory as their parameter does.
        moments = tensors.get("optimizer", {})
        for i, (parameter, names) in enumerate(self._parameters()):
            for name in names:
                if (moment := moments.get(f"{i}.{name}")) is None:
                    continue
                like = parameter if name != "step" else moment.to(parameter.device)
                state = self.optimizer.state[parameter]
                state[name] = torch.empty_like(like, requires_grad=False).copy_(moment)
        if accelerator.scaler is not None and numbers.scaler:
            accelerator.scaler.load_state_dict(numbers.scaler)

        # Figures and numbers. (A copy, as above: else the file would stay open.)
        sums = tensors.get("metrics", {})
        self.metrics.sums = {k: v.to(accelerator.device, copy=True) for k, v in sums.items()}
        self.metrics.count, self.step = numbers.count, numbers.step
        self.best = float("inf") if numbers.best is None else numbers.best

        # Random numbers. Other processes, or another kind of device, go on with others.
        random, rank = tensors.get("random", {}), accelerator.process_index
        kinds = {"cpu", accelerator.device.type}
        expected = {f"{i}.{kind}" for i in range(accelerator.num_processes) for kind in kinds}
        if random.keys() != expected:
            logger.warning(
                "%s was saved by other processes or devices: dropout will differ.", self.folder
            )
        if f"{rank}.cpu" in random:
            torch.set_rng_state(random[f"{rank}.cpu"])
        if f"{rank}.cuda" in random and accelerator.device.type == "cuda":
            torch.cuda.set_rng_state(random[f"{rank}.cuda"], accelerator.device)

    def _parameters(self) -> list[tuple[nn.Parameter, tuple[str, ...]]]:
        """What the optimizer learns, in a fixed order, each with the names of its moments."""
        result = []
        for group in self.optimizer.param_groups:
            result += [(parameter, moment_names(group)) for parameter in group["params"]]
        return result
