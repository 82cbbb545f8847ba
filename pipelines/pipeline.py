"""The trained whole: an autoencoder and one prior per level, in one folder and behind one call."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, TypeVar

import torch
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

from prior.base import Prior
from prior.registry import load_prior
from prior.sampling import Known, SamplingConfig, image_seeds
from vqvae2.common.artifact import content_hash, local_folder
from vqvae2.common.errors import UserError
from vqvae2.common.files import read_json, write_json
from vqvae2.common.pictures import to_pil
from vqvae2.common.runs import command_line, last_names, read_record, versions
from vqvae2.model import VQVAE2

INDEX_NAME = "model_index.json"
RECORD_NAMES = ("train_config.yaml", "import_config.yaml")
T = TypeVar("T", int, float)


@dataclass(frozen=True)
class PipelineOutput:
    """What sampling gives."""

    images: Any
    """PIL images, or for `output_type="pt"` a tensor `(B, C, H, W)` in [-1, 1]."""
    codes: tuple[Tensor, ...]
    """`(B, h, w)` int64 per level, coarse to fine."""


def part_folders(name: str | Path, *, revision: str | None = None) -> tuple[Path, list[Path]]:
    """Where the autoencoder and the priors of a pipeline lie: in its folder, or in what the Hub delivers.

    Raises:
        UserError: the folder holds no pipeline.
    """
    folder = local_folder(name, revision=revision)
    index = read_json(folder / INDEX_NAME)
    if not isinstance(index.get("vqvae"), str) or not isinstance(index.get("priors"), list):
        raise UserError(
            f"{folder / INDEX_NAME} does not name 'vqvae' and 'priors': remake the folder with vqvae2 assemble."
        )
    return folder / index["vqvae"], [folder / prior for prior in index["priors"]]


def training_record(folder: str | Path) -> dict[str, Any]:
    """What a part's run folder says of how it was made: command, settings, versions, hashes of what it was trained on. Nothing where it says nothing."""
    records = [Path(folder).expanduser() / name for name in RECORD_NAMES]
    return next((read_record(path) for path in records if path.is_file()), {})


class VQVAE2Pipeline:
    """An autoencoder and one prior per level: `VQVAE2Pipeline.from_pretrained(folder)(num_images=16, labels=[3], seed=0).images`."""

    def __init__(
        self, vqvae: VQVAE2, priors: Sequence[Prior], *, trainings: Mapping[str, Any] | None = None
    ) -> None:
        """Join parts that belong together.

        Args:
            trainings: part -> the record of its training, which goes into `model_index.json`.

        Raises:
            UserError: a level without a prior, or a prior that was trained on codes of another encoder or on another code dataset; naming both.
        """
        self.trainings = dict(trainings or {})
        self.vqvae, self.priors = vqvae.eval(), [prior.eval() for prior in priors]
        levels = [prior.config.level for prior in priors]
        if levels != list(range(vqvae.config.num_levels)):
            raise UserError(
                f"the priors are of the levels {levels}, but the autoencoder needs {list(range(vqvae.config.num_levels))}: give one per level, the top first."
            )
        encoder_hash = vqvae.content_hash()
        for prior in priors:
            if prior.config.encoder_hash != encoder_hash:
                raise UserError(
                    f"the prior of level {prior.config.level} was trained on codes of the encoder {prior.config.encoder_hash[:12]}, but the autoencoder "
                    f"is {encoder_hash[:12]}: extract the codes and train the prior with this autoencoder, or give the one it was trained with."
                )
            if prior.config.codes_hash != priors[0].config.codes_hash:
                raise UserError(
                    f"the prior of level {prior.config.level} was trained on the code dataset {prior.config.codes_hash[:12]}, but that of level 0 on "
                    f"{priors[0].config.codes_hash[:12]}: train all priors on the same codes."
                )
        if len({prior.config.class_names for prior in priors if prior.config.num_classes}) > 1:
            raise UserError(
                "the priors were trained with different classes: train them on the same code dataset."
            )

    @classmethod
    def from_parts(cls, vqvae: str | Path, priors: Sequence[str | Path]) -> Self:
        """Load the parts from their own folders (or Hub ids), the priors top first.

        Raises:
            UserError: see `Artifact.from_pretrained` and `__init__`.
        """
        folders = {
            "vqvae": vqvae,
            **{f"prior_{level}": prior for level, prior in enumerate(priors)},
        }
        trainings = {
            part: record for part, folder in folders.items() if (record := training_record(folder))
        }
        return cls(
            VQVAE2.from_pretrained(vqvae),
            [load_prior(prior) for prior in priors],
            trainings=trainings,
        )

    @classmethod
    def from_pretrained(cls, name: str | Path, *, revision: str | None = None) -> Self:
        """Load a pipeline folder, or a repository of the Hub.

        Raises:
            UserError: see `from_parts`; and if the folder holds no pipeline.
        """
        pipeline = cls.from_parts(*part_folders(name, revision=revision))
        trainings = read_json(local_folder(name, revision=revision) / INDEX_NAME).get("trainings")
        pipeline.trainings = trainings if isinstance(trainings, dict) else {}
        return pipeline

    def save_pretrained(self, folder: str | Path) -> None:
        """Write `model_index.json` and one folder per part. The index comes last: without it the folder is unfinished."""
        folder = Path(folder)
        self.vqvae.save_pretrained(folder / "vqvae")
        names = [f"prior_{prior.config.level}" for prior in self.priors]
        for prior, name in zip(self.priors, names, strict=True):
            prior.save_pretrained(folder / name)
        index = {
            "vqvae": "vqvae",
            "priors": names,
            "encoder_hash": self.vqvae.content_hash(),
            "codes_hash": self.priors[0].config.codes_hash,
            **self.content_hashes(),
            "versions": versions(),
            "command_line": command_line(),
            "trainings": last_names(self.trainings),
        }
        write_json(folder / INDEX_NAME, index)

    def to(self, device: str | torch.device) -> Self:
        """Move all parts to a device."""
        self.vqvae.to(device)
        for prior in self.priors:
            prior.to(device)
        return self

    @property
    def class_names(self) -> tuple[str, ...]:
        """The classes that labels count; empty if no prior has classes."""
        return next(
            (prior.config.class_names for prior in self.priors if prior.config.num_classes), ()
        )

    def content_hashes(self) -> dict[str, str]:
        """A hash of the whole of each part: equal exactly when configuration and weights are."""
        parts: dict[str, Any] = {
            "vqvae": self.vqvae,
            **{f"prior_{prior.config.level}": prior for prior in self.priors},
        }
        return {
            f"{name}_hash": content_hash(part.config, part.state_dict().items())
            for name, part in parts.items()
        }

    @property
    def can_hide_labels(self) -> bool:
        """Whether the priors have classes and can do without a label, having been trained with label dropout."""
        return bool(self.class_names) and all(
            prior.config.label_dropout > 0 for prior in self.priors if prior.config.num_classes
        )

    def __call__(
        self,
        num_images: int,
        *,
        labels: int | str | Sequence[int | str] | None = None,
        temperature: float | Sequence[float] = 1.0,
        top_k: int | Sequence[int] | None = None,
        top_p: float | Sequence[float] | None = None,
        min_p: float | Sequence[float] | None = None,
        guidance_scale: float | Sequence[float] = 1.0,
        seed: int = 0,
        first_index: int = 0,
        lanes: int = 16,
        bf16: bool = False,
        known: Sequence[Known | None] | None = None,
        output_type: str = "pil",
        show_progress: bool = False,
    ) -> PipelineOutput:
        """Sample images, level after level from the top, and decode them.

        Args:
            labels: a class number or name, or "none", or several taken in turns; None takes all classes in turns (and is right without classes).
            temperature, top_k, top_p, min_p, guidance_scale: one value, or one per level, coarse to fine; see `SamplingConfig`.
            seed: image i is a function of (seed, i, its label) alone, bit for bit on the same device, number of threads and `lanes`.
            first_index: index of the first image: 1000 continues a set of 1000 with the same seed.
            lanes: images computed side by side, always as many: image i in lane i % lanes, and what nobody asked for is thrown away. The last bits
                of a matrix product depend on its shape; a shape that never changes makes them depend on nothing.
            bf16: multiply in bfloat16 in the priors: faster, and other images.
            known: per level, codes that are given rather than drawn, for all `num_images` images; see `pipelines.editing`.
            output_type: "pil", or "pt" for a tensor in [-1, 1].

        Raises:
            UserError: an unknown label, or a setting out of its range.
        """
        if num_images < 1 or lanes < 1:
            raise UserError(
                f"num_images is {num_images} and lanes {lanes}, but both must be at least 1."
            )
        if seed < 0 or first_index < 0:
            raise UserError(
                f"seed is {seed} and first_index {first_index}, but both must be 0 or more."
            )
        if output_type not in ("pil", "pt"):
            raise UserError(f"output_type is {output_type!r}, but must be 'pil' or 'pt'.")
        self._check_known(known, num_images)
        settings = {
            "temperature": temperature,
            "top_k": top_k,
            "top_p": top_p,
            "min_p": min_p,
            "guidance_scale": guidance_scale,
        }
        samplings = self.samplings(**settings)
        numbers = self.label_numbers(labels)
        wanted = range(first_index, first_index + num_images)
        parts: list[PipelineOutput] = []
        bar = tqdm(total=num_images, desc="sampling", unit="image", disable=not show_progress)
        for first in range(first_index // lanes * lanes, wanted.stop, lanes):
            inside = [
                i - first
                for i in wanted[max(0, first - wanted.start) : first + lanes - wanted.start]
            ]
            given = [
                None if level is None else level.spread(first - first_index, lanes)
                for level in known or ()
            ]
            images, codes = self.sample_lanes(
                range(first, first + lanes), numbers, samplings, seed=seed, bf16=bf16, known=given
            )
            parts.append(PipelineOutput(images[inside], tuple(level[inside] for level in codes)))
            bar.update(len(inside))
        bar.close()
        decoded = torch.cat([part.images for part in parts])
        result: list[Image.Image] | Tensor = to_pil(decoded) if output_type == "pil" else decoded
        return PipelineOutput(
            result,
            tuple(torch.cat(level) for level in zip(*(part.codes for part in parts), strict=True)),
        )

    @torch.no_grad()
    def sample_lanes(
        self,
        indices: range,
        labels: Sequence[int],
        samplings: Sequence[SamplingConfig],
        *,
        seed: int,
        bf16: bool = False,
        known: Sequence[Known | None] = (),
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The images with these indices, `(B, C, H, W)` in [-1, 1], and their codes, all on the CPU; `labels` are taken in turns."""
        seeds = image_seeds(seed, indices.start, len(indices))
        codes: list[Tensor] = []
        for prior, sampling, given in zip(
            self.priors, samplings, known or [None] * len(self.priors), strict=True
        ):
            classes = (
                torch.tensor([labels[i % len(labels)] for i in indices], device=prior.device)
                if prior.config.num_classes
                else None
            )
            on_device = given and Known(given.codes.to(prior.device), given.mask.to(prior.device))
            codes.append(
                prior.sample(
                    len(indices),
                    codes,
                    classes,
                    sampling=sampling,
                    seeds=seeds,
                    known=on_device,
                    bf16=bf16,
                )
            )
        images = self.vqvae.decode_codes(codes).float().clamp(-1, 1)
        return images.cpu(), tuple(level.cpu() for level in codes)

    def label_numbers(self, labels: int | str | Sequence[int | str] | None) -> list[int]:
        """Class names or numbers as numbers, "none" (a hidden label) as their number; all classes for None; nothing for a pipeline without classes.

        Raises:
            UserError: naming the label and what is allowed.
        """
        names = self.class_names
        if isinstance(labels, int | str):
            labels = [labels]
        elif isinstance(labels, Tensor):
            labels = labels.tolist()
        if not names:
            if labels:
                raise UserError(
                    f"labels {list(labels)} were given, but the priors were trained without classes: leave them out."
                )
            return []
        if labels is None or not len(labels):
            return list(range(len(names)))
        numbers = []
        for label in labels:
            if isinstance(label, str) and label in names:
                numbers.append(names.index(label))
            elif str(label).isdecimal() and int(label) < len(names):
                numbers.append(int(label))
            elif label == "none" and self.can_hide_labels:
                numbers.append(len(names))
            else:
                none = ", or none" if self.can_hide_labels else ""
                raise UserError(
                    f"label {label!r} is unknown: give a number from 0 to {len(names) - 1}, or one of {', '.join(names)}{none}."
                )
        return numbers

    def _check_known(self, known: Sequence[Known | None] | None, num_images: int) -> None:
        if known is None:
            return
        if len(known) != len(self.priors):
            raise UserError(
                f"known has {len(known)} entries, but there are {len(self.priors)} levels: give one per level, None where nothing is known."
            )
        for prior, level in zip(self.priors, known, strict=True):
            expected = (num_images, *prior.config.grids[-1])
            if level is not None and not (
                tuple(level.codes.shape) == tuple(level.mask.shape) == expected
            ):
                raise UserError(
                    f"known codes of level {prior.config.level} are {tuple(level.codes.shape)} with a mask {tuple(level.mask.shape)}, but must be "
                    f"{expected}: one grid per image (pipelines.editing.repeat_known repeats them)."
                )
            if level is not None and not (
                int(level.codes.min()) >= 0
                and int(level.codes.max()) < prior.config.codebook_sizes[-1]
            ):
                raise UserError(
                    f"known codes of level {prior.config.level} must be from 0 to {prior.config.codebook_sizes[-1] - 1}: check where they come from."
                )

    def samplings(self, **settings: Any) -> list[SamplingConfig]:
        """Each setting of `SamplingConfig` as one value, or one per level, to one configuration per level; None leaves the default.

        Raises:
            UserError: another number of values than levels, or a value out of its range.
        """
        columns = [
            [(name, value) for value in self._per_level(name, values)]
            for name, values in settings.items()
        ]
        return [
            SamplingConfig(**{name: value for name, value in row if value is not None})
            for row in zip(*columns, strict=True)
        ]

    def _per_level(self, name: str, value: T | Sequence[T] | None) -> list[T | None]:
        values: list[T | None] = list(value) or [None] if isinstance(value, Sequence) else [value]
        if len(values) not in (1, len(self.priors)):
            raise UserError(
                f"{name} has {len(values)} values, but there are {len(self.priors)} levels: give one value, or one per level."
            )
        return values if len(values) > 1 else values * len(self.priors)
