"""Whether a long training is compiled: it is tried on the first steps, and kept if it is faster."""

import logging
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vqvae2.common.files import read_json, write_json

logger = logging.getLogger(__name__)
RECORD = "compile.json"
STEPS = 30  # so many warm up, and so many are measured: as they are, and compiled
LONG = 1200.0  # seconds that a training has to take, for compiling may take a minute or two
CLEARLY = 0.95  # the share of the time that compiled steps may take, to be kept
OnMain = Callable[[Callable[[], Any]], Any]


class CompileTrial:
    """Steps 1 to 2 * STEPS as they are, then as many compiled ones if the training is long, then
    whichever was faster. What was decided stands in the run's folder, so that a training that was
    killed takes every step the same way again: its last bits depend on it.

    Args:
        choice: whether to compile, or "auto": try it.
        on_main: runs an action on one process only, and gives its result to all.
    """

    def __init__(
        self,
        model: nn.Module,
        device: torch.device,
        choice: bool | str,
        folder: Path,
        on_main: OnMain,
    ) -> None:
        self.model, self.device, self.path, self.on_main = model, device, folder / RECORD, on_main
        self.is_open, self.compiled = choice == "auto", choice is True
        self.record: dict[str, Any] = {}  # "tried", "before" (seconds), and in the end "compiled"
        if self.compiled:
            model.compile()  # in place: names of weights stay as they are

    def begin(self, step: int) -> None:
        """Continue after a step: an earlier process of this training may have decided."""
        self.record = self.on_main(lambda: read_json(self.path) if self.path.exists() else {})
        passed = 2 * STEPS if not self.record else 4 * STEPS
        if step >= passed and "compiled" not in self.record:
            self.is_open = False  # it went past the trial, in an earlier version or by a flag
        self.begun, self.started = True, (step, self._now())

    def before_step(self, step: int) -> None:
        """To be called before every step, with its number from 1."""
        if not self.is_open:
            return
        tried = self.record.get("tried", True)
        self.is_open = tried and step <= 4 * STEPS
        in_trial = self.is_open and step > 2 * STEPS
        self._compile(in_trial or (not self.is_open and self.record["compiled"]))

    def after_step(self, step: int, num_steps: int) -> None:
        """To be called after every step, of so many."""
        if not self.is_open or "compiled" in self.record:
            return
        if self.begun:  # the first step of a process also starts much
            self.begun, self.started = False, (step, self._now())
        if step % STEPS:
            return
        if step in (STEPS, 3 * STEPS):
            self.started = step, self._now()
        elif step == 4 * STEPS or not self.record:
            first, started = self.started
            seconds = (self._now() - started) / max(1, step - first)
            self.record = self.on_main(partial(self._decide, seconds, step, num_steps))

    def leave_out(self, seconds: float) -> None:
        """Not to count so much time, in which no step was made."""
        if self.is_open:
            step, started = self.started
            self.started = step, started + seconds

    def _decide(self, seconds: float, step: int, num_steps: int) -> dict[str, Any]:
        """The record after a measurement of the seconds of a step."""
        if step == 4 * STEPS:
            before = self.record["before"]
            record = {**self.record, "compiled": seconds < CLEARLY * before}
            took = f"{1e3 * seconds:.0f} ms a step compiled, {1e3 * before:.0f} before"
            way = "compiled" if record["compiled"] else "as it was"
            logger.info("%s: it goes on %s (--compile True or False decides it).", took, way)
        elif seconds * (num_steps - step) > LONG:
            logger.info("a long training: trying whether it is faster compiled, some minutes.")
            record = {"tried": True, "before": seconds}
        else:
            record = {"tried": False, "compiled": False}
        write_json(self.path, record)
        return record

    def _compile(self, wanted: bool) -> None:
        if wanted and not self.compiled:
            torch._dynamo.config.suppress_errors = True  # what cannot be compiled stays as it is
            self.model.compile()
        if not wanted and self.compiled:
            for module in self.model.modules():
                module._compiled_call_impl = None  # what `compile` set
        self.compiled = wanted

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()
