"""The trained whole: an autoencoder and one prior per level, in one folder and behind one call."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor
from torch.nn import functional as F

from pipelines import editing, scoring
from pipelines.belonging import refuse_mismatches
from pipelines.conditions import as_vectors
from pipelines.config import LANES
from pipelines.labels import Labels, label_numbers
from pipelines.model_index import (
    RESTORE,
    changed_parts,
    part_folders,
    part_hash,
    prior_bits,
    training_record,
)
from pipelines.scoring import Scores
from prior.audit import warn_of_noise
from prior.base import Prior
from prior.registry import load_prior
from prior.sampling import Known, SamplingConfig, image_seeds, in_lanes
from prior.vector import with_vectors
from vqvae2.common.artifact import content_hash, local_folder
from vqvae2.common.config import check, check_whole
from vqvae2.common.errors import UserError
from vqvae2.common.files import read_json, write_json
from vqvae2.common.messages import progress_bar
from vqvae2.common.metrics import warn_if_unfinished
from vqvae2.common.pictures import to_pil
from vqvae2.common.runs import command_line, last_names, versions
from vqvae2.common.vocabulary import INDEX_NAME, describe_vectors
from vqvae2.data import as_images
from vqvae2.data.splits import few
from vqvae2.model import VQVAE2


@dataclass(frozen=True)
class PipelineOutput:
    """What sampling returns."""

    images: Any  #: PIL images, or for `output_type="pt"` a tensor `(B, C, H, W)` in [-1, 1]
    codes: tuple[Tensor, ...]  #: `(B, h, w)` int64 per level, coarse to fine


class VQVAE2Pipeline:
    """An autoencoder and a prior per level: `VQVAE2Pipeline.from_pretrained(folder)(9).images`."""

    def __init__(self, vqvae: VQVAE2, priors: Sequence[Prior]) -> None:
        """Join parts, the priors top first. Raises a `UserError` if they do not belong together."""
        refuse_mismatches(vqvae, priors, complete=True)
        self.vqvae, self.priors = vqvae.eval(), [prior.eval() for prior in priors]
        self.trainings: dict[str, Any] = {}  # part -> the record of its training

    @classmethod
    def from_parts(cls, vqvae: str | Path, priors: Sequence[str | Path]) -> Self:
        """Load the parts from their own folders (or Hub ids), the priors top first. Raises as
        `Artifact.from_pretrained` and `refuse_mismatches`."""
        pipeline = cls(VQVAE2.from_pretrained(vqvae), [load_prior(prior) for prior in priors])
        for part, folder in zip(pipeline.parts, [vqvae, *priors], strict=True):
            warn_if_unfinished(Path(folder).expanduser())
            if record := training_record(folder):
                pipeline.trainings[part] = record
        return pipeline

    @classmethod
    def from_pretrained(cls, name: str | Path, *, revision: str | None = None) -> Self:
        """Load a pipeline folder, or a repository of the Hub; see `from_parts` for errors."""
        folder = local_folder(name, revision=revision)
        pipeline = cls.from_parts(*part_folders(folder))
        index = read_json(folder / INDEX_NAME)
        if changed := changed_parts(index, pipeline.parts):
            raise UserError(f"{folder}: {'; '.join(changed)}: {RESTORE}.")
        pipeline.trainings = index.get("trainings") or {}
        records: Any = pipeline.trainings
        is_mapping = isinstance(records, dict)
        is_mapping = is_mapping and all(isinstance(record, dict) for record in records.values())
        check(is_mapping, f"{folder / INDEX_NAME}: trainings", records, "a mapping of mappings")
        return pipeline

    def save_pretrained(self, folder: str | Path) -> None:
        """Write one folder per part, then `model_index.json`, which makes it complete."""
        folder = Path(folder).expanduser()
        for name, part in self.parts.items():
            part.save_pretrained(folder / name)
        index = {
            "vqvae": "vqvae",
            "priors": list(self.parts)[1:],
            "encoder_hash": self.vqvae.content_hash(),
            "codes_hash": self.priors[0].config.codes_hash,
            **self.content_hashes(),
            "versions": versions(),
            "command_line": command_line(),
            "trainings": self.trainings,
        }
        write_json(folder / INDEX_NAME, last_names(index))

    def warn_of_noise(self) -> None:
        """Log a warning for each prior that has learned next to nothing, as far as is known."""
        for name, bits in prior_bits(self.trainings).items():
            warn_of_noise(name, *bits)

    def to(self, device: str | torch.device) -> Self:
        """Move all parts to a device."""
        for part in self.parts.values():
            part.to(device)
        return self

    @property
    def parts(self) -> dict[str, Any]:
        """The models by the names of their folders: vqvae, prior_0, ..."""
        return {"vqvae": self.vqvae} | {f"prior_{p.config.level}": p for p in self.priors}

    def content_hashes(self) -> dict[str, str]:
        """A hash of each part: equal exactly if its configuration and weights are."""
        return {f"{name}_hash": part_hash(part) for name, part in self.parts.items()}

    def content_hash(self) -> str:
        """One hash of all parts."""
        return content_hash(self.content_hashes(), ())

    @property
    def class_names(self) -> tuple[str, ...]:
        """The classes that label numbers stand for; empty if no prior has classes."""
        return max((prior.config.class_names for prior in self.priors), key=len)

    @property
    def can_hide_labels(self) -> bool:
        """Whether the priors have classes, and were trained with label dropout to do without."""
        with_classes = [prior.config for prior in self.priors if prior.config.num_classes]
        return bool(with_classes) and all(config.label_dropout > 0 for config in with_classes)

    @property
    def vector_size(self) -> int:
        """The length V of conditions; 0 if no prior has any. `vector_names`: the attributes."""
        return max(prior.config.vector_size for prior in self.priors)

    @property
    def vector_names(self) -> tuple[str, ...]:
        """What the places of a condition stand for, if they are attributes."""
        return max((prior.config.vector_names for prior in self.priors), key=len)

    @property
    def can_hide_all(self) -> bool:
        """Whether the priors do without classes and conditions, or have none."""
        configs = [prior.config for prior in self.priors]
        given = [config for config in configs if config.num_classes or config.vector_size]
        return all(config.label_dropout > 0 for config in given)

    @torch.no_grad()
    def __call__(
        self,
        num_images: int,
        *,
        labels: Labels = None,
        conditions: Any = None,
        temperature: float | Sequence[float] = 1.0,
        top_k: int | Sequence[int] | None = None,
        top_p: float | Sequence[float] | None = None,
        min_p: float | Sequence[float] | None = None,
        guidance_scale: float | Sequence[float] = 1.0,
        seed: int = 0,
        first_index: int = 0,
        lanes: int = LANES,
        bf16: bool = False,
        compiled: bool | None = None,
        parallel_positions: int = 0,
        known: Sequence[Known | None] = (),
        output_type: str = "pil",
        show_progress: bool = False,
    ) -> PipelineOutput:
        """Sample images: their codes level by level from the top, then all levels decoded.

        Args:
            labels: a class number or name or "none", or several taken in turn; None: all classes,
                or with conditions "none" where that is possible.
            conditions: a tensor `(V,)`, or `(N, V)` of which the rows are taken in turn, or lists
                of names of attributes, for priors that were trained with some; None hides them.
            temperature, top_k, top_p, min_p, guidance_scale: one value, or one per level, coarse to
                fine; see `SamplingConfig`.
            seed: image i is a function of (seed, i, its label and condition), to the bit on the
                same device with the same number of threads, `lanes`, `parallel_positions`,
                `compiled` and `bf16`.
            first_index: index of the first image; 1000 continues a set of 1000 of the same seed.
            lanes: images computed side by side; see `in_lanes`.
            bf16: multiply in bfloat16 in the priors: faster, but gives other images.
            compiled: on CUDA. None: the priors' calls are recorded. True: they are compiled first.
                False: neither. See `Prior.sample`.
            parallel_positions: codes of a level that are guessed and then computed in one call; 0
                chooses; see `prior.predictive`.
            known: per level, codes that are given rather than sampled, for all `num_images`
                images, or None; see `pipelines.editing`.
            output_type: "pil", or "pt" for a tensor in [-1, 1].

        Raises:
            UserError: an unknown label or condition, or a setting out of its range.
        """
        # Refuse impossible settings before anything is computed.
        check_whole("num_images", num_images, 1)
        check_whole("lanes", lanes, 1)
        check_whole("parallel_positions", parallel_positions, 0)
        check_whole("seed", seed, 0)
        check_whole("first_index", first_index, 0)
        check(output_type in ("pil", "pt"), "output_type", output_type, "'pil' or 'pt'")
        known = known or [None] * len(self.priors)
        editing.check_known(known, self.priors, num_images)
        vectors = self.as_vectors(conditions)
        if vectors is not None:
            labels = self.hidden_unless_given(labels)
        numbers = self.label_numbers(labels)
        settings = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
        samplings = SamplingConfig.per_level(len(known), guidance_scale=guidance_scale, **settings)

        # Sample in batches of exactly `lanes` images, and keep those that were asked for.
        outputs: list[list[Tensor]] = []  # per batch: images and, level by level, codes
        options = {"total": num_images, "desc": "sampling", "unit": "image"}
        bar = progress_bar(**options, disable=not show_progress)
        for batch in in_lanes(range(first_index, first_index + num_images), lanes):
            first = batch.start // lanes * lanes
            seeds = image_seeds(seed, first, lanes)
            indices = range(first, first + lanes)
            classes = torch.tensor([numbers[i % len(numbers)] for i in indices] if numbers else [])
            codes: list[Tensor] = []
            for prior, sampling, level in zip(self.priors, samplings, known, strict=True):
                given = level and level.spread(first - first_index, lanes)
                given = given and Known(*(tensor.to(prior.device) for tensor in given))
                own = vectors[[i % len(vectors) for i in indices]] if vectors is not None else None
                condition = with_vectors(prior.config, codes, lanes, own)
                inputs = (
                    [each.to(prior.device) for each in condition],
                    classes.to(prior.device) if prior.config.num_classes else None,
                )
                how: dict[str, Any] = {"sampling": sampling, "bf16": bf16, "compiled": compiled}
                how["window"] = parallel_positions
                codes.append(prior.sample(lanes, *inputs, **how, seeds=seeds, known=given))
            images = self.vqvae.decode_codes(codes).float().clamp(-1, 1)
            asked = slice(batch.start - first, batch.stop - first)
            outputs.append([tensor[asked].cpu() for tensor in (images, *codes)])
            bar.update(len(batch))
        bar.close()
        joined, *all_codes = (torch.cat(tensors) for tensors in zip(*outputs, strict=True))
        return PipelineOutput(to_pil(joined) if output_type == "pil" else joined, tuple(all_codes))

    def label_numbers(self, labels: Labels) -> list[int]:
        """Class names or numbers as numbers; see `pipelines.labels.label_numbers`."""
        return label_numbers(labels, self.class_names, can_hide=self.can_hide_labels)

    def as_vectors(self, conditions: Any) -> Tensor | None:
        """Conditions as vectors; see `pipelines.conditions.as_vectors`."""
        configs = [prior.config for prior in self.priors if prior.config.vector_size]
        can_hide = all(config.label_dropout > 0 for config in configs)
        return as_vectors(conditions, self.vector_size, self.vector_names, can_hide=can_hide)

    def encode(self, images: Any) -> tuple[Tensor, ...]:
        """The codes `(B, h, w)` int64 per level, coarse to fine, of what `as_images` takes: PIL
        images, paths or arrays, one or a list, or a tensor `(B, C, H, W)` in [-1, 1]."""
        return tuple(codes.cpu() for codes in self.vqvae.encode_images(images))

    @torch.no_grad()
    def decode(self, codes: Sequence[Any], *, output_type: str = "pil") -> Any:
        """The images of codes `(B, h, w)` per level, coarse to fine; see `PipelineOutput`."""
        check(output_type in ("pil", "pt"), "output_type", output_type, "'pil' or 'pt'")
        levels = editing.as_codes(codes, self.vqvae)
        batches = zip(*(level.split(32) for level in levels), strict=True)
        images = torch.cat([self.vqvae.decode_codes(few).float().cpu() for few in batches])
        images = images.clamp(-1, 1)
        return to_pil(images) if output_type == "pil" else images

    def reconstruct(self, images: Any, *, output_type: str = "pil") -> Any:
        """What `decode` makes of the codes of images, which are given as to `encode`."""
        return self.decode(self.encode(images), output_type=output_type)

    def variations(
        self, image: Any, keep_levels: int = 1, num_images: int = 4, **options: Any
    ) -> PipelineOutput:
        """Other images with the coarsest levels of this one (of several, in turn), the same as
        `vqvae2 sample --init-image` writes. Labels are hidden where they can be, unless given;
        `options` are those of a call: seed, labels, temperature, ..."""
        return self._edit(editing.keep_levels(self.vqvae, image, keep_levels), num_images, options)

    def inpaint(self, image: Any, mask: Any, num_images: int = 4, **options: Any) -> PipelineOutput:
        """The image repainted where the mask is white; see `known_outside` and `variations`."""
        return self._edit(editing.known_outside(self.vqvae, image, mask), num_images, options)

    def redraw(self, images: Any, marked: Tensor, number: int = 1, labels: Labels = None) -> Tensor:
        """Images, given as to `encode`, so many times: `(number, B, C, H, W)` in [-1, 1], with all
        codes that cover a marked pixel `(B, H, W)` bool drawn anew. Cells of the finest grid
        without one stay as they are. One label for all images, or one per image; None hides them.
        """
        images, marked = as_images(images, self.vqvae.config.image).cpu(), marked.cpu()
        expected = (len(images), *images.shape[2:])
        fits = marked.dtype == torch.bool and tuple(marked.shape) == expected
        seen = f"{tuple(marked.shape)} of {marked.dtype}"
        check(fits, "marked", seen, f"{expected} of torch.bool, a mask for each image")
        check(number >= 1, "number", number, "at least 1")
        rows = marked.flatten(1).any(dim=1).nonzero()[:, 0]
        drawn = images.repeat(number, 1, 1, 1, 1)
        if not len(rows):
            return drawn

        # The marked images only, each with its own label.
        classes = editing.class_tensor(self.numbers_or_hidden(labels), len(images))[rows]
        options: Any = {"labels": self._names(classes), "output_type": "pt"}
        total = number * len(rows)
        painted = self.inpaint(images[rows], marked[rows], total, **options).images
        painted = painted.view(number, len(rows), *images.shape[1:])
        cells = F.adaptive_max_pool2d(marked[rows, None].float(), self.vqvae.config.grids[-1])
        inside = F.interpolate(cells, images.shape[2:])
        drawn[:, rows] = inside * painted + (1 - inside) * images[rows]
        return drawn

    def _edit(self, known: Any, number: int, options: dict[str, Any]) -> PipelineOutput:
        labels = self.hidden_unless_given(options.pop("labels", None))
        return self(
            number, known=editing.repeat_known(known, range(number)), labels=labels, **options
        )

    def log_likelihood(self, images: Any, labels: Labels = None, conditions: Any = None) -> Tensor:
        """ln p of the codes of images, `(B, levels)` float64 in nats: what each prior gives to its
        level; their sum is the joint one. (Codes do not hold all of an image's pixels.) One
        label for all images, or one per image; None hides them, where they can be. Likewise for
        conditions."""
        given = self.numbers_or_hidden(labels), self.as_vectors(conditions)
        return editing.log_likelihood(self.priors, self.encode(images), *given)

    def hidden_unless_given(self, labels: Labels) -> Labels:
        """The labels to use for images that may show anything: "none" if none are given."""
        return "none" if labels is None and self.can_hide_labels else labels

    def numbers_or_hidden(self, labels: Labels) -> list[int]:
        """The numbers of labels, or of the hidden one if none are given."""
        labels = self.hidden_unless_given(labels)
        if labels is None and self.class_names:
            raise UserError("the priors cannot do without labels: give one, or one per image.")
        return self.label_numbers(labels)

    def _names(self, classes: Tensor) -> list[str] | None:
        """Numbers of classes, or of the hidden one, as labels; None without classes. (A number may
        be the name of another class.)"""
        names = (*self.class_names, "none")
        return [names[place] for place in classes.tolist()] if self.class_names else None

    def score(self, images: Any, labels: Labels = None, redraws: int = 0) -> Scores:
        """How unusual images are, given as to `encode`, and where. Labels as in `log_likelihood`;
        or "all", for the class that explains each image best. Conditions are hidden. `redraws`:
        redraw unusual places this many times; places that change more count more. (The redraws of
        an image depend a little on those that are scored with it.)"""
        check_whole("redraws", redraws, 0)
        self.as_vectors(None)  # or say that they cannot be
        every = isinstance(labels, str) and labels == scoring.ALL and bool(self.class_names)
        numbers = self.label_numbers(None) if every else self.numbers_or_hidden(labels)
        images = as_images(images, self.vqvae.config.image).cpu()
        tried = [[number] for number in numbers] if every else [numbers]
        classes = [editing.class_tensor(own, len(images)) for own in tried]
        error, batches = scoring.typical_error(self.trainings), []
        for rows in torch.arange(len(images)).split(scoring.BATCH):
            own, few = [labels_of_all[rows] for labels_of_all in classes], images[rows]
            of_each = scoring.score_batch(self.vqvae, self.priors, few, own, error)
            scores = scoring.best_label(of_each) if every else of_each[0]
            if redraws:
                given = scores.best_labels(self.class_names) if every else self._names(own[0])
                drawn = self.redraw(few, scoring.to_redraw(scores), redraws, given)
                scores = scoring.with_redraws(scores, few, drawn, error)
            batches.append(scores)
        return Scores.join(batches)

    def __repr__(self) -> str:
        classes = f"classes: {few(self.class_names)}" if self.class_names else "no classes"
        parts = [f"{name}: {part!r}" for name, part in self.parts.items()]
        size, names = self.vector_size, self.vector_names
        conditions = [f"conditions: {describe_vectors(size, names)}"] if size else []
        return "\n  ".join([f"{type(self).__name__}:", *parts, classes, *conditions])
