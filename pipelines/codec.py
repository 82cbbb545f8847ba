"""Images as a few dozen bytes: their codes, coded with the probabilities that the priors give them.

A file holds the codes level by level, the top's first, in chunks of images that are coded together
(all chunks of a level, then those of the next); `HEADER` and `CHUNK` are what begins both.

Encoder and decoder must see the same integers, though one reads all codes at once and the other one
after the other, perhaps on another machine. In float64 their probabilities agree to some 13 digits;
what must not happen is that the last digits decide how one is rounded. The encoder sees all of them
and chooses, for each chunk, the nudge (what is added before rounding) that keeps them farthest from
where rounding turns.

Letters: B images of a chunk, h w a level's code grid, T = h*w positions in raster order, K codes.
"""

import copy
import json
import math
import struct
import zlib
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor

from pipelines.editing import as_codes, log_likelihood
from pipelines.pipeline import VQVAE2Pipeline
from prior.base import Prior
from prior.sampling import Known
from vqvae2.common.accelerate import exact_convolutions
from vqvae2.common.artifact import content_hash
from vqvae2.common.config import check
from vqvae2.common.errors import UserError
from vqvae2.common.messages import progress_bar
from vqvae2.quantizers import Quantizer

CODER_VERSION = 1  # of what the bytes mean
MAGIC = b"\x89VQ2"
# Magic, version, whether codes are coded by frequency, the pipeline's hash, the number of images,
# and the bytes of their names, which follow as deflated JSON.
HEADER = struct.Struct("<4sB?8sII")
CHUNK = struct.Struct("<IB")  # the bytes of the stream, which follows; the nudge
CHUNK_IMAGES, CHUNK_TABLES = 256, 2**23  # at most, but one image; the latter in probabilities
MOST_NAMES = 1 << 28  # bytes
LOWEST = 1 << 32  # state of the coder; below this bit, its first state holds the checksum
NUDGES = 256
Intervals = list[tuple[int, int]]  # of symbols: start and size


class Unpacked(NamedTuple):
    """What a file holds."""

    names: list[str]  #: of the images; empty if they have none
    codes: list[Tensor]  #: `(N, h, w)` int64 per level, coarse to fine, as many as were asked for
    labels: Tensor | None  #: `(N,)`, the classes that the priors were told; None if hidden


class Damaged(Exception):
    """The bytes mean no codes."""


class Codec:
    """Codes to bytes and back, with the priors of a pipeline."""

    def __init__(self, pipeline: VQVAE2Pipeline) -> None:
        self.pipeline, config = pipeline, pipeline.vqvae.config
        self.sizes, self.grids = config.codebook_size_per_level, config.grids
        images = CHUNK_TABLES // (math.prod(self.grids[-1]) * max(self.sizes))
        self.chunk_images = max(1, min(CHUNK_IMAGES, images))
        # Classes that must be told, because the priors cannot hide them.
        self.num_told = 0 if pipeline.can_hide_labels else len(pipeline.class_names)

    @cached_property
    def priors(self) -> list[Prior]:
        """The priors in float64 on the CPU."""
        return [copy.deepcopy(prior).cpu().double() for prior in self.pipeline.priors]

    @cached_property
    def hashes(self) -> list[bytes]:
        """What files are bound to: the whole pipeline; by frequency, the autoencoder alone."""
        every = self.pipeline.content_hashes()
        parts: Any = (every, {"vqvae_hash": every["vqvae_hash"]})
        return [bytes.fromhex(content_hash(part, ()))[:8] for part in parts]

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

        Labels are hidden. Priors that cannot hide them are told, for each image, the class with
        which its top codes cost least; so is the file.

        Args:
            names: one per image, or none.
            fast: code each code by how often it has come before in the file, without the priors.

        Raises:
            UserError: the model has no such codes, or names are missing.
        """
        # The header; the checksum is of it and of all codes so far.
        levels = [level.cpu() for level in as_codes(codes, self.pipeline.vqvae)]
        number, labels = len(levels[0]), dict[range, Tensor | None]()
        check(len(names) in (0, number), "the number of names", len(names), f"{number}, or none")
        packed = zlib.compress(json.dumps([*names]).encode(), 9) if names else b""
        head = (MAGIC, CODER_VERSION, fast, self.hashes[fast], number, len(packed))
        parts = [HEADER.pack(*head) + packed]
        checksum = zlib.crc32(parts[0])

        # Level by level, each in chunks.
        for level, rows, counts in self._chunks(number, len(levels), "coding", show_progress):
            chunk = [grid[rows.start : rows.stop] for grid in levels[: level + 1]]
            own = chunk[-1].flatten(1).T.contiguous()  # (T, B)
            checksum, nudge, intervals = _checksum(own, checksum), 0, Intervals()
            bits = precision(len(counts))
            if fast:
                intervals = intervals_by_frequency(own.numpy(), counts)
            else:
                if not level:
                    labels[rows] = self._choose_labels(chunk[0])
                    intervals = self._intervals_of_labels(labels[rows], bits)
                nudge, by_prior = self._intervals(chunk, labels[rows])
                intervals += by_prior
            stream = write_stream(intervals, bits, checksum)
            parts.append(CHUNK.pack(len(stream), nudge) + stream)
        return b"".join(parts)

    @torch.no_grad()
    def decompress(
        self,
        data: bytes,
        *,
        levels: int | None = None,
        where: str = "the file",
        show_progress: bool = False,
    ) -> Unpacked:
        """The codes in the bytes that `compress` gave: those of the first `levels`, or of all.

        Raises:
            UserError: another pipeline or version of the coder wrote them, or they were cut off or
                altered, or this machine computes other probabilities.
        """
        # The header.
        fast, number, names, place = self.read_header(data, where)
        most = len(self.sizes)
        levels = most if levels is None else levels
        check(1 <= levels <= most, "levels", levels, f"from 1 to {most}")
        checksum, labels = zlib.crc32(data[:place]), dict[range, Tensor | None]()
        codes: list[list[Tensor]] = [[] for _ in range(levels)]

        # Level by level, each in chunks.
        for level, rows, counts in self._chunks(number, levels, "decoding", show_progress):
            begin = place + CHUNK.size
            length, nudge = CHUNK.unpack(data[place:begin].ljust(CHUNK.size, b"\0"))
            place = begin + length
            if place > len(data):
                what = f"{where} ends within level {level + 1} of {most}, as it was cut off"
                coarse = f", or decode what is whole with --levels {level}" if level else ""
                raise UserError(f"{what}: get all of it{coarse}.")
            reader = StreamReader(data[begin:place], precision(len(counts)))
            try:
                if fast:
                    own = read_by_frequency(reader, len(rows), math.prod(self.grids[level]), counts)
                else:
                    if not level:
                        labels[rows] = self._read_labels(reader, len(rows))
                    place_of = rows.start // self.chunk_images
                    condition = [chunks[place_of] for chunks in codes[:level]]
                    own = self._read(reader, len(rows), condition, labels[rows], nudge)
                checksum = _checksum(own, checksum)
                is_last = level + 1 == most and rows.stop == number
                reader.finish(checksum, more=is_last and place < len(data))
            except Damaged:
                what = f"{where} was altered, or this machine computes other probabilities"
                advice = "get it anew, or decode it with the version of torch that compressed it"
                raise UserError(f"{what}: {advice}.") from None
            codes[level].append(own.T.unflatten(1, self.grids[level]))
        told = [label for label in labels.values() if label is not None]
        joined = [torch.cat(chunks) for chunks in codes]
        return Unpacked(names, joined, torch.cat(told) if told and self.num_told else None)

    def read_header(self, data: bytes, where: str) -> tuple[bool, int, list[str], int]:
        """Whether codes are coded by frequency, how many images there are, their names, and where
        the chunks begin. Raises a `UserError` for what this pipeline and version did not write."""
        if len(data) < HEADER.size or not data.startswith(MAGIC):
            raise UserError(f"{where} is no .vq2 file: give one that vqvae2 compress wrote.")
        _, version, fast, identity, number, length = HEADER.unpack_from(data)
        if version != CODER_VERSION:
            what = f"{where} was written by version {version} of the coder, but this is version"
            raise UserError(f"{what} {CODER_VERSION}: use the vqvae2 of that time.")
        if identity != self.hashes[fast]:
            both = f"the pipeline {identity.hex()}, but this one is {self.hashes[fast].hex()}"
            raise UserError(f"{where} was compressed by {both}: give the one that compressed it.")
        end, names, fits = HEADER.size + length, [], number > 0
        if length:
            try:
                unpacked = zlib.decompressobj().decompress(data[HEADER.size : end], MOST_NAMES)
                names = json.loads(unpacked)
                fits = len(names) == number and all(isinstance(name, str) for name in names)
            except (ValueError, TypeError, RecursionError, zlib.error):
                fits = False
        if not fits:
            raise UserError(f"the header of {where} was altered or cut off: get the file anew.")
        return fast, number, names, end

    @torch.no_grad()
    @exact_convolutions()
    def decode(self, unpacked: Unpacked, rows: range, *, imagine: bool = False) -> Tensor:
        """Images `(B, C, H, W)` in [-1, 1] of these rows. Levels that are missing are drawn by the
        priors, if they shall `imagine` them, or left out, which needs a decoder that was trained
        with level dropout (else a `UserError`)."""
        # Decode all levels; or let the priors draw the missing ones.
        pipeline, model = self.pipeline, self.pipeline.vqvae
        codes = [grid[rows.start : rows.stop].to(model.device) for grid in unpacked.codes]
        missing = model.config.num_levels - len(codes)
        if not missing:
            return pipeline.decode(codes, output_type="pt")
        if imagine:
            names, labels = [*pipeline.class_names, "none"], unpacked.labels
            given = labels[rows.start : rows.stop] if labels is not None else []
            known = [Known(grid, torch.ones_like(grid, dtype=torch.bool)) for grid in codes]
            options: Any = {"known": [*known, *[None] * missing], "first_index": rows.start}
            options["labels"] = [names[label] for label in given] or None
            if pipeline.can_hide_labels:
                options["labels"] = "none"
            return pipeline(len(rows), **options, output_type="pt").images

        # Leave them out, as level dropout does.
        if not model.config.level_dropout:
            what = "the decoder was trained without level dropout, so it needs all levels"
            raise UserError(f"{what}: decode all, or let the priors draw the others (--imagine).")
        embeddings = []
        for level, quantizer in enumerate(cast(Sequence[Quantizer], model.quantizers)):
            if level < len(codes):
                embeddings.append(quantizer.lookup(codes[level]))
            else:
                nothing = torch.zeros(len(rows), *self.grids[level], dtype=torch.int64)
                embeddings.append(0 * quantizer.lookup(nothing.to(model.device)))
        return model.decode(embeddings).clamp(-1, 1).cpu()

    def _chunks(
        self, number: int, levels: int, doing: str, show_progress: bool
    ) -> Iterator[tuple[int, range, np.ndarray]]:
        """Level by level: the level, the rows of a chunk, and how often each of the level's codes
        has come, to be counted on; once more than it has, so that none is impossible."""
        options = {"total": levels * number, "desc": doing, "unit": "grid"}
        bar = progress_bar(**options, disable=not show_progress)
        for level in range(levels):
            counts = np.ones(self.sizes[level], dtype=np.int64)
            for first in range(0, number, self.chunk_images):
                rows = range(first, min(first + self.chunk_images, number))
                yield level, rows, counts
                bar.update(len(rows))
        bar.close()

    def _choose_labels(self, top: Tensor) -> Tensor | None:
        """The label `(B,)` that the priors are told of each image, of its top codes `(B, h, w)`;
        None without classes."""
        if not self.num_told:
            classes = len(self.pipeline.class_names)
            return torch.full((len(top),), classes) if classes else None
        each = [log_likelihood(self.priors[:1], [top], [label]) for label in range(self.num_told)]
        return torch.cat(each, dim=1).argmax(dim=1)

    def _intervals_of_labels(self, labels: Tensor | None, bits: int) -> Intervals:
        """Classes that must be told, all as likely."""
        if labels is None or not self.num_told:
            return []
        size = 2**bits // self.num_told
        return [(label * size, size) for label in labels.tolist()]

    def _read_labels(self, reader: "StreamReader", number: int) -> Tensor | None:
        """The labels that `_choose_labels` chose for this number of images."""
        if not self.num_told:
            return self._choose_labels(torch.empty(number, 0, 0))
        ends = np.arange(1, self.num_told + 1) * (2**reader.bits // self.num_told)
        return torch.tensor([reader.read(ends) for _ in range(number)])

    def _intervals(self, chunk: Sequence[Tensor], labels: Tensor | None) -> tuple[int, Intervals]:
        """The nudge for codes `(B, h, w)` per level, and the intervals of the finest, (T, B)."""
        *condition, own = chunk
        prior = self.priors[len(condition)]
        logits = prior(own, condition, labels if prior.config.num_classes else None)
        scaled = scaled_probabilities(logits.flatten(2).permute(2, 0, 1))  # (T, B, K)
        nudge = safest_nudge(scaled)
        sizes, index = rounded(scaled, nudge), own.flatten(1).T[..., None]  # index (T, B, 1)
        ends = sizes.cumsum(dim=2).gather(2, index).flatten()
        own_sizes = sizes.gather(2, index).flatten()
        return nudge, [*zip((ends - own_sizes).tolist(), own_sizes.tolist(), strict=True)]

    def _read(
        self,
        reader: "StreamReader",
        number: int,
        condition: list[Tensor],
        labels: Tensor | None,
        nudge: int,
    ) -> Tensor:
        """The codes `(T, B)` of the level below the condition, one position after the other."""
        prior = self.priors[len(condition)]
        told = labels if prior.config.num_classes else None
        step = prior.make_stepper(number, condition, told, compiled=False)
        codes = torch.empty(prior.config.num_positions, number, dtype=torch.int64)
        before = torch.full((number, 1), prior.config.codebook_sizes[-1])
        for position, row in enumerate(codes):
            logits = step(position, torch.full((number,), position), before)[:, 0]  # (B, K)
            ends = rounded(scaled_probabilities(logits), nudge).cumsum(dim=1).numpy()
            row.copy_(torch.tensor([reader.read(each) for each in ends]))
            before = row[:, None]
        return codes


def precision(size: int) -> int:
    """The bits of an integer probability, where there are `size` codes: each of them has one of at
    least 1, which costs the others less than 0.002 bits per code."""
    return max(20, (size - 1).bit_length() + 11)


def scaled_probabilities(logits: Tensor) -> Tensor:
    """Probabilities `(..., K)` of float64 logits, scaled so that they can be `rounded`."""
    size = logits.shape[-1]
    return logits.softmax(dim=-1) * (2 ** precision(size) - 2 * size)


def rounded(scaled: Tensor, nudge: int) -> Tensor:
    """Integer probabilities `(..., K)`, 1 or more, whose sum is at most 2^precision."""
    return (scaled + (nudge + 0.5) / NUDGES).long() + 1


def safest_nudge(scaled: Tensor) -> int:
    """The nudge with which the last digits of scaled probabilities matter least in `rounded`: that
    with the largest distance, relative to the probability, to where rounding turns."""
    turning = (1 - scaled.frac()).mul_(NUDGES).sub_(0.5)  # the nudge that makes it an integer
    nearest = turning.round()
    distance = (turning - nearest).abs_().div_(scaled)
    place = nearest.long().clamp_(0, NUDGES)
    least = scaled.new_full((NUDGES + 1,), torch.inf)
    least.scatter_reduce_(0, place.flatten(), distance.flatten(), "amin")
    return int(least[:NUDGES].argmax())


def intervals_by_frequency(codes: np.ndarray, counts: np.ndarray) -> Intervals:
    """The intervals of codes `(T, B)`, by how often each has come: `counts` `(K,)` move on."""
    intervals = Intervals()
    for row in codes:
        sizes = _sizes(counts)
        starts = sizes.cumsum() - sizes
        intervals += zip(starts[row].tolist(), sizes[row].tolist(), strict=True)
        np.add.at(counts, row, 1)
    return intervals


def read_by_frequency(
    reader: "StreamReader", number: int, length: int, counts: np.ndarray
) -> Tensor:
    """The codes `(T, B)` that `intervals_by_frequency` coded."""
    codes = np.empty((length, number), dtype=np.int64)
    for row in codes:
        ends = _sizes(counts).cumsum()
        row[:] = [reader.read(ends) for _ in range(number)]
        np.add.at(counts, row, 1)
    return torch.from_numpy(codes)


def _sizes(counts: np.ndarray) -> np.ndarray:
    free = 2 ** precision(len(counts)) - len(counts)
    return counts * free // counts.sum() + 1


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
