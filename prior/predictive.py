"""Sampling in fewer steps than positions, and not one code different: predictive sampling.

A code is drawn with noise of its own (`prior.noise`), so that an image is a function of its noise:
the one set of codes of which each is drawn from the logits that the codes before it give. To find
it, codes that are not known yet are guessed, and the logits of a window of them computed in one
call. The first code drawn is right, for what it depends on is known; and so is each one behind it,
as long as all the guesses before it were what has now been drawn. What is not, is guessed better
the next time (Wiggers and Hoogeboom 2020; Song et al. 2021). A window of 1 is sampling as usual.

Letters: B batch, T positions, W those of a window, K codebook size.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from prior.cuda_graphs import Stepper, as_it_is, fused
from prior.noise import Noise
from prior.sampling import Known, SamplingConfig, draw

# Positions of all images together that a call computes at not much more than the cost of one: it
# reads all weights anyway (see benchmarks/sampling.py). Other numbers here mean other last bits of
# the images: increment SAMPLER_VERSION.
ROWS = {"cpu": 64, "cuda": 1024}
MOST = {"cpu": 32, "cuda": 64}
# Families without windows compute whole grids on a CPU up to so many weights x images x the root of
# the positions: the arithmetic of a grid then costs less than the steps that it saves, as the calls
# grow with that root (6 for 16 positions, 8 to 14 for 64, 21 for 256, of trained PixelSNAILs).
GRID_WORK = 65_000_000


def choose_window(batch_size: int, num_positions: int, device_type: str) -> int:
    """The window that is fastest for a batch: a power of 2, and 1 where guessing does not pay. It
    may be decided by nothing else, because an image's last bits depend on it."""
    window, rows, most = 1, ROWS.get(device_type, 1024), MOST.get(device_type, 64)
    while 2 * window * batch_size <= rows and 2 * window <= min(most, num_positions):
        window *= 2
    return window


def grid_pays(batch_size: int, num_positions: int, num_parameters: int, device_type: str) -> bool:
    """Whether a family without windows computes whole grids rather than one position after another.
    It may be decided by nothing else, as above."""
    work = num_parameters * batch_size * num_positions**0.5
    return work <= GRID_WORK and device_type == "cpu"


class Guesses:
    """The codes of a batch while they are drawn: of each image, the first ones are right."""

    def __init__(
        self, noise: Noise, num_positions: int, sampling: SamplingConfig, known: Known | None
    ) -> None:
        self.noise, self.sampling = noise, sampling
        shape = (len(noise.seeds), num_positions)
        self.codes = torch.zeros(shape, dtype=torch.int64, device=noise.seeds.device)
        self.given: Tensor | None = None  # (B, T) bool: what is known beforehand
        if known is not None:
            self.given = known.mask.flatten(1)
            self.codes.copy_(torch.where(self.given, known.codes.flatten(1), 0))
        self.num_right = torch.zeros_like(self.codes[:, 0])  # (B,)
        self.settle_window: Callable = settle

    def compile(self) -> None:
        """Draw by compiled code: on a GPU it would be hundreds of short kernels."""
        self.settle_window = fused(settle)

    def window(self, width: int) -> tuple[Tensor, Tensor]:
        """The first position `(B,)` of each image's window, which begins where codes are not known
        to be right, and the guesses before its positions, `(B, W)`; K before position 0."""
        first = self.num_right.clamp(max=self.codes.shape[1] - width)
        before = F.pad(self.codes, (1, 0), value=self.noise.codebook_size)
        return first, before.gather(1, places_of(first, width))

    def settle(self, first: Tensor, logits: Tensor) -> None:
        """Draw the codes of the windows from their logits `(B, W, K)`; find out which are right."""
        tensors = first, logits, self.codes, self.num_right, self.given
        drawn, number = self.settle_window(*tensors, self.noise, self.sampling)
        self.codes.scatter_(1, places_of(first, logits.shape[1]), drawn)
        self.num_right.copy_(first + number)


def settle(
    first: Tensor,
    logits: Tensor,
    codes: Tensor,
    num_right: Tensor,
    given: Tensor | None,
    noise: Noise,
    sampling: SamplingConfig,
) -> tuple[Tensor, Tensor]:
    """The codes of the windows `(B, W)`, and how many of them are right `(B,)`; changes nothing."""
    places = places_of(first, logits.shape[1])
    drawn, guessed = draw(logits, noise.at(places), sampling), codes.gather(1, places)
    is_settled = places < num_right[:, None]
    if given is not None:
        is_settled = is_settled | given.gather(1, places)
    drawn = torch.where(is_settled, guessed, drawn)
    in_a_row = (drawn == guessed)[:, :-1].long().cumprod(dim=1).sum(dim=1)
    return drawn, 1 + in_a_row


def places_of(first: Tensor, width: int) -> Tensor:
    """The positions `(B, W)` of windows."""
    return first[:, None] + torch.arange(width, device=first.device)


def sample_codes(
    step: Stepper,
    guesses: Guesses,
    width: int,
    record: Callable[[Callable[[int], None]], Callable[[int], None]] = as_it_is,
) -> tuple[Tensor, int]:
    """All codes `(B, T)`, and the number of calls that they took. `record` may make each call, by
    its number, one that does the same faster; see `RecordedCalls`."""

    def call(number: int) -> None:
        first, before = guesses.window(width)
        guesses.settle(first, step(number, first, before))

    recorded, calls, num_positions = record(call), 0, guesses.codes.shape[1]
    least, every = -(-num_positions // width), 1 if guesses.codes.device.type == "cpu" else 4
    while True:
        recorded(calls)
        calls += 1
        if calls == num_positions:  # each call finds at least one code
            break
        # Looking waits for the GPU: so look only once the end is possible, and then now and then.
        look = width > 1 and calls >= least and (calls - least) % every == 0
        if look and int(guesses.num_right.min()) == num_positions:
            break
    return guesses.codes, calls
