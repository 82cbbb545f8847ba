"""Images as a few dozen bytes: their codes, coded with the probabilities that the priors give them.

A file holds the codes level by level, the top's first, in chunks of images: all chunks of a level,
then those of the next. A chunk is its length, the nudges and a stream of codes: those of a batch
of images, position after position, then those of the next batch.

Encoder and decoder must see the same integers, though one reads all codes at once and the other one
after the other, perhaps on another machine. In float64 their probabilities agree to some 13 digits;
what must not happen is that the last digits decide how one is rounded. The encoder sees all of them
and chooses, for each batch, the nudge (what is added before rounding) that keeps them farthest from
a rounding boundary.

Letters: B images of a batch, h w a level's code grid, T = h*w positions in raster order, K codes.
"""

import copy
import json
import math
import struct
import zlib
from collections.abc import Iterator, Sequence
from contextlib import suppress
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipelines.editing import as_codes
from pipelines.pipeline import VQVAE2Pipeline
from prior.base import Prior
from prior.sampling import Known, in_lanes
from prior.vector import with_vectors
from vqvae2.common.artifact import content_hash
from vqvae2.common.config import check
from vqvae2.common.errors import UserError
from vqvae2.common.messages import progress_bar
from vqvae2.data.splits import check_names
from vqvae2.inspection import decode_level

CODER_VERSION = 1  # of what the bytes mean
MAGIC = b"\x89VQ2"
# Magic, version, whether codes are coded by frequency, the pipeline's hash, the number of images,
# and the bytes of their names, which follow as deflated JSON.
HEADER = struct.Struct("<4sB?8sII")
LENGTH = struct.Struct("<I")  # of a chunk, in bytes
BATCH, BATCH_TABLES = 256, 2**23  # images and probabilities of a batch, at most (but one image)
CHUNK_CODES = 2**18  # of the finest level in a chunk, at most (but one batch)
MOST_NAMES = 1 << 28  # bytes
LOWEST = 1 << 32  # state of the coder; below this bit, its first state holds the checksum
MOST_CODES = 1 << 21  # whose integer probabilities the coder's state can hold
NUDGES = 256


class Damaged(Exception):
    """The bytes mean no codes."""


class Codec:
    """Codes to bytes and back, with the priors of a pipeline. (They hide the label, which
    images to be coded may lack: on the demo it would save 1 %.)"""

    def __init__(self, pipeline: VQVAE2Pipeline) -> None:
        self.pipeline, config = pipeline, pipeline.vqvae.config
        self.sizes, self.grids = config.codebook_size_per_level, config.grids
        allowed = f"at most {MOST_CODES:,} to be compressed"
        check(max(self.sizes) <= MOST_CODES, "a codebook's size", max(self.sizes), allowed)
        positions = math.prod(self.grids[-1])
        self.batch = max(1, min(BATCH, BATCH_TABLES // (positions * max(self.sizes))))
        self.chunk = self.batch * max(1, CHUNK_CODES // (positions * self.batch))

    @cached_property
    def priors(self) -> list[Prior]:
        """The priors in float64 on the CPU."""
        self.refuse_unhidden()
        return [copy.deepcopy(prior).cpu().double().eval() for prior in self.pipeline.priors]

    def refuse_unhidden(self, doing: str = "code") -> None:
        """Raise a `UserError` for priors that must be told the classes of images."""
        if not self.pipeline.can_hide_all:
            what = f"the priors were trained without label dropout, and cannot {doing} unknown"
            instead = "code by frequency (--fast)" if doing == "code" else "leave out --imagine"
            raise UserError(f"{what} classes: {instead}, or retrain them with it.")

    @cached_property
    def hashes(self) -> list[bytes]:
        """What files are bound to: the whole pipeline; by frequency, the autoencoder alone."""
        alone = {"vqvae_hash": self.pipeline.content_hashes()["vqvae_hash"]}
        both = self.pipeline.content_hash(), content_hash(alone, ())
        return [bytes.fromhex(digest)[:8] for digest in both]

    @torch.no_grad()
    def compress(
        self,
        codes: Sequence[Any],
        names: Sequence[str] = (),
        *,
        fast: bool = False,
        show_progress: bool = False,
    ) -> bytes:
        """The bytes of codes `(N, h, w)` per level, coarse to fine (`pipeline.encode` gives them).

        Args:
            names: one per image, or none.
            fast: code each code by how often it has come before in the file, without the priors.

        Raises:
            UserError: the model has no such codes, or names are missing, equal or no names; or see
                `refuse_unhidden`.
        """
        # The header; the checksum is of it and of all codes so far.
        levels = [level.cpu() for level in as_codes(codes, self.pipeline.vqvae)]
        number = len(levels[0])
        check(len(names) in (0, number), "the number of names", len(names), f"{number}, or none")
        check_names(names, "the archive")
        packed = zlib.compress(json.dumps([*names]).encode(), 9) if names else b""
        head = (MAGIC, CODER_VERSION, fast, self.hashes[fast], number, len(packed))
        parts = [HEADER.pack(*head) + packed]
        checksum = zlib.crc32(parts[0])

        # Level by level, each in chunks.
        for level, chunk, counts in self._chunks(number, len(levels), "coding", show_progress):
            intervals, nudges = [], bytearray()
            for rows in in_lanes(chunk, self.batch):
                *condition, grid = [each[rows.start : rows.stop] for each in levels[: level + 1]]
                own = grid.flatten(1).T.contiguous()  # (T, B)
                checksum = _checksum(own, checksum)
                if fast:
                    for row in own:
                        sizes = frequencies(counts).expand(len(rows), -1)
                        intervals += intervals_of(row, sizes)
                        counts.add_(row.bincount(minlength=len(counts)))
                else:
                    logits = self.priors[level](grid, *self._given(condition, len(rows)))
                    scaled = scaled_probabilities(logits.flatten(2).permute(2, 0, 1))  # (T, B, K)
                    nudges.append(safest_nudge(scaled))
                    intervals += intervals_of(own, rounded(scaled, nudges[-1]))
            stream = nudges + write_stream(intervals, precision(len(counts)), checksum)
            parts.append(LENGTH.pack(len(stream)) + stream)
        return b"".join(parts)

    @torch.no_grad()
    def decompress(
        self,
        data: bytes,
        *,
        levels: int | None = None,
        where: str = "the file",
        show_progress: bool = False,
    ) -> list[Tensor]:
        """The codes `(N, h, w)` per level in the bytes that `compress` gave: of the first `levels`,
        or of all.

        Raises:
            UserError: another pipeline or version of the coder wrote them, or they were cut off or
                altered, or this machine computes other probabilities.
        """
        # The header.
        fast, number, _, place = self.read_header(data, where)
        most = len(self.sizes)
        levels = most if levels is None else levels
        check(1 <= levels <= most, "levels", levels, f"from 1 to {most}")
        checksum = zlib.crc32(data[:place])
        codes: list[list[Tensor]] = [[] for _ in range(levels)]

        # Level by level, each in chunks.
        for level, chunk, counts in self._chunks(number, levels, "decoding", show_progress):
            begin = place + LENGTH.size
            place = begin + LENGTH.unpack(data[place:begin].ljust(LENGTH.size, b"\0"))[0]
            if place > len(data):
                what = f"{where} ends within level {level + 1} of {most}, as it was cut off"
                coarse = f", or decode what is whole with --levels {level}" if level else ""
                raise UserError(f"{what}: get all of it{coarse}.")
            batches = in_lanes(chunk, self.batch)
            start = begin if fast else begin + len(batches)
            reader = StreamReader(data[start:place], precision(len(counts)))
            try:
                if start > place:
                    raise Damaged
                for nudge, rows in enumerate(batches, begin):
                    given = [grids[len(codes[level])] for grids in codes[:level]]
                    rounding = None if fast else data[nudge]
                    own = self._read(reader, given, len(rows), counts, rounding)
                    checksum = _checksum(own, checksum)
                    codes[level].append(own.T.unflatten(1, self.grids[level]))
                is_last = level + 1 == most and chunk.stop == number
                reader.finish(checksum, more=is_last and place < len(data))
            except Damaged:
                what = f"{where} was altered, or this machine computes other probabilities"
                advice = "download it again, or decode it with the torch that compressed it"
                raise UserError(f"{what}: {advice}.") from None
        return [torch.cat(grids) for grids in codes]

    def read_header(self, data: bytes, where: str) -> tuple[bool, int, list[str], int]:
        """Whether codes are coded by frequency, how many images there are, their names, and where
        the chunks begin. Raises a `UserError` for what this pipeline and version did not write."""
        if len(data) < HEADER.size or not data.startswith(MAGIC):
            raise UserError(f"{where} is no .vq2 file: give one that vqvae2 compress wrote.")
        _, version, fast, identity, number, length = HEADER.unpack_from(data)
        if version != CODER_VERSION:
            what = f"{where} was written by version {version} of the coder, but this is version"
            raise UserError(f"{what} {CODER_VERSION}: use the vqvae2 that wrote it.")
        if identity != self.hashes[fast]:
            both = f"the pipeline {identity.hex()}, but this one is {self.hashes[fast].hex()}"
            raise UserError(f"{where} was compressed by {both}: give the one that compressed it.")
        end, names, fits = HEADER.size + length, [], number > 0
        with suppress(ValueError, TypeError, RecursionError, zlib.error):
            if length:
                fits, packed = False, data[HEADER.size : end]
                names = json.loads(zlib.decompressobj().decompress(packed, MOST_NAMES))
                fits = len(names) == number and all(isinstance(name, str) for name in names)
        if not fits:
            raise UserError(f"the header of {where} was altered or cut off: get the file anew.")
        check_names(names, str(where))
        return fast, number, names, end

    def decode(self, codes: Sequence[Tensor], *, imagine: bool = False, first: int = 0) -> Tensor:
        """Images `(B, C, H, W)` in [-1, 1] of codes `(B, h, w)` of all levels or the coarsest. The
        others are drawn by the priors, if they are to `imagine` them (by seed 0 and the index of
        the `first`), or left out, if the decoder was trained with level dropout (a `UserError`)."""
        number, missing = len(codes[0]), len(self.sizes) - len(codes)
        if not missing:
            return self.pipeline.decode(codes, output_type="pt")
        model = self.pipeline.vqvae
        codes = [grid.to(model.device) for grid in codes]
        if imagine:
            self.refuse_unhidden("draw")
            known = [Known(grid, torch.ones_like(grid, dtype=torch.bool)) for grid in codes]
            labels = self.pipeline.hidden_unless_given(None)
            options: Any = {"labels": labels, "first_index": first, "output_type": "pt"}
            return self.pipeline(number, known=[*known, *[None] * missing], **options).images
        if not model.config.level_dropout:
            what = "the decoder was trained without level dropout, so it needs all levels"
            raise UserError(f"{what}: decode all, or let the priors draw the others (--imagine).")
        for grid in self.grids[len(codes) :]:
            codes.append(torch.zeros(number, *grid, dtype=torch.int64, device=model.device))
        images = decode_level(model, codes, codes, len(self.sizes) - missing - 1)
        return images.clamp(-1, 1).cpu()

    def _chunks(
        self, number: int, levels: int, doing: str, show_progress: bool
    ) -> Iterator[tuple[int, range, Tensor]]:
        """Level by level: the level, the images of a chunk, and how often each of the level's codes
        has come so far: counts to be updated, from 1, as none is impossible."""
        options: Any = {} if show_progress else {"disable": True}
        bar = progress_bar(total=levels * number, desc=doing, unit="grid", **options)
        for level in range(levels):
            counts = torch.ones(self.sizes[level], dtype=torch.int64)
            for chunk in in_lanes(range(number), self.chunk):
                yield level, chunk, counts
                bar.update(len(chunk))
        bar.close()

    def _given(self, coarser: Sequence[Tensor], number: int) -> tuple[list[Tensor], Tensor | None]:
        """The condition of the level below these, and its labels `(B,)`, if its prior has some: all
        hidden but for the codes."""
        config = self.priors[len(coarser)].config
        labels = torch.full((number,), config.num_classes) if config.num_classes else None
        return with_vectors(config, coarser, number), labels

    def _read(
        self,
        reader: "StreamReader",
        condition: Sequence[Tensor],
        number: int,
        counts: Tensor,
        nudge: int | None,
    ) -> Tensor:
        """The codes `(T, B)` of the level below the condition, position after position; by
        frequency without a nudge."""
        level, step = len(condition), None
        if nudge is not None:
            given = self._given(condition, number)
            step = self.priors[level].make_stepper(number, *given, compiled=False)
        codes = torch.empty(math.prod(self.grids[level]), number, dtype=torch.int64)
        before = torch.full((number, 1), self.sizes[level])
        for position, row in enumerate(codes):
            if step is None or nudge is None:
                sizes = frequencies(counts).expand(number, -1)
            else:
                logits = step(position, torch.full((number,), position), before)[:, 0]  # (B, K)
                sizes = rounded(scaled_probabilities(logits), nudge)
            row.copy_(torch.tensor([reader.read(ends) for ends in sizes.cumsum(dim=1).numpy()]))
            counts += row.bincount(minlength=len(counts))
            before = row[:, None]
        return codes


def precision(size: int) -> int:
    """The bits of an integer probability, where there are `size` codes: each of them has one of at
    least 1, which costs the others less than 0.002 bits per code (0.0004 up to 512 codes)."""
    return max(22, (size - 1).bit_length() + 11)


def scaled_probabilities(logits: Tensor) -> Tensor:
    """Probabilities `(..., K)` of float64 logits, scaled so that they can be `rounded`."""
    size = logits.shape[-1]
    return logits.softmax(dim=-1) * (2 ** precision(size) - 2 * size)


def rounded(scaled: Tensor, nudge: int) -> Tensor:
    """Integer probabilities `(..., K)`, 1 or more, whose sum is at most 2^precision."""
    return (scaled + (nudge + 0.5) / NUDGES).long() + 1


def safest_nudge(scaled: Tensor) -> int:
    """The nudge with which the last digits of scaled probabilities matter least in `rounded`: that
    with the largest distance, relative to the probability, from a rounding boundary."""
    turning = (1 - scaled.frac()).mul_(NUDGES).sub_(0.5)  # the nudge that makes it an integer
    nearest = turning.round()
    distance = (turning - nearest).abs_().div_(scaled)
    place = nearest.long().clamp_(0, NUDGES)
    least = scaled.new_full((NUDGES + 1,), torch.inf)
    least.scatter_reduce_(0, place.flatten(), distance.flatten(), "amin")
    return int(least[:NUDGES].argmax())


def frequencies(counts: Tensor) -> Tensor:
    """Integer probabilities `(K,)` of codes that have come so often."""
    return counts * (2 ** precision(len(counts)) - len(counts)) // counts.sum() + 1


def intervals_of(codes: Tensor, sizes: Tensor) -> list[tuple[int, int]]:
    """Start and size of each code's interval, of codes `(...)` and probabilities `(..., K)`."""
    index = codes[..., None]
    own, ends = sizes.gather(-1, index), sizes.cumsum(dim=-1).gather(-1, index)
    return [*zip((ends - own).flatten().tolist(), own.flatten().tolist(), strict=True)]


def _checksum(codes: Tensor, before: int) -> int:
    return zlib.crc32(codes.numpy().astype("<u4").tobytes(), before)


def write_stream(intervals: Sequence[tuple[int, int]], bits: int, checksum: int) -> bytes:
    """Code symbols, each given by its interval (start and size of 2^bits), as bytes from which
    they are read in the same order: rANS (Duda 2013), which codes the last one first. What it
    starts with is what reading ends with: the checksum."""
    state, written = LOWEST | checksum, bytearray()
    for start, size in reversed(intervals):
        while state >> (40 - bits) >= size:
            written.append(state & 255)
            state >>= 8
        state = (state // size << bits) + state % size + start
    return state.to_bytes(5, "big") + written[::-1]


class StreamReader:
    """Reads symbols from the bytes of `write_stream`. Raises `Damaged` where they cannot be."""

    def __init__(self, stream: bytes, bits: int) -> None:
        self.state, self.bits = int.from_bytes(stream[:5], "big"), bits
        self.rest = iter(stream[5:])

    def read(self, ends: np.ndarray) -> int:
        """The next symbol, of those whose intervals end at `ends` `(K,)`, rising."""
        low = self.state & ((1 << self.bits) - 1)
        symbol = int(ends.searchsorted(low, side="right"))
        if symbol == len(ends):
            raise Damaged
        start = int(ends[symbol - 1]) if symbol else 0
        self.state = (int(ends[symbol]) - start) * (self.state >> self.bits) + low - start
        while self.state < LOWEST:
            following = next(self.rest, None)
            if following is None:
                raise Damaged
            self.state = self.state << 8 | following
        return symbol

    def finish(self, checksum: int, *, more: bool) -> None:
        """Raise `Damaged` unless all bytes are read, and no `more`, and gave this checksum."""
        if self.state != LOWEST | checksum or next(self.rest, None) is not None or more:
            raise Damaged
