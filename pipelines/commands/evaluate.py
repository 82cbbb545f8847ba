"""`vqvae2 evaluate`: how good it is, in figures, pictures and words; what to do next."""

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from PIL.Image import Image
from torch import Tensor

from pipelines.conditions import vectors_hash
from pipelines.config import EvaluateConfig, SetConfig
from pipelines.evaluation import figures as measure
from pipelines.evaluation import memorisation, report
from pipelines.evaluation.classifier import (
    Classifier,
    Rows,
    accuracy_scores,
    made_classifier,
)
from pipelines.evaluation.features import Extractor, make_extractor
from pipelines.evaluation.figures import FEWEST, MANY, Figures, refuse_too_few
from pipelines.evaluation.metrics import Moments, frechet_distance
from pipelines.evaluation.sets import ImageSet, Seen, see
from pipelines.model_index import part_hash
from pipelines.pictures import MOST_NAMES, sample_sheet
from pipelines.pipeline import VQVAE2Pipeline
from pipelines.receipts import converted, make_receipt
from pipelines.samples import write_samples
from prior.sampling import SAMPLER_VERSION, Known
from vqvae2.codebook_stats import level_name
from vqvae2.common.accelerate import on_main_process, processes
from vqvae2.common.config import to_dict
from vqvae2.common.errors import UserError
from vqvae2.common.loading import some_rows
from vqvae2.common.lock import writes_output
from vqvae2.common.pictures import MODES, to_pil
from vqvae2.common.runs import RunRecord
from vqvae2.common.threads import set_threads
from vqvae2.config import ImagesConfig, PerceptualConfig, PreprocessingConfig
from vqvae2.data import ImageDataset, ImageSplits, load_images, load_table, picture_size, to_images
from vqvae2.data.decoding import read_picture_file
from vqvae2.data.open_source import open_source, refuse_stream
from vqvae2.inspection import inspect, reconstruction_sheet
from vqvae2.model import VQVAE2
from vqvae2.perceptual import load_perceptual
from vqvae2.training_record import are_its_images, read_training, with_recorded_split

logger = logging.getLogger(__name__)
MOST_INSPECTED = 1000  # held-out images that stage 1 is looked at with
MOST_OF_SETTING = 1000  # samples of each setting that a sweep compares
MOST_LEARNED = 5000  # images of each kind that a classifier learns from, and
MOST_BYTES = 1 << 28  # in all, but a hundred are enough
MOST_OF_LEVEL = 500  # samples that say which prior loses
TEMPERATURES, TOP_PS, GUIDANCES = (0.8, 0.9, 1.0), (0.95,), (1.0, 1.5, 2.0)  # of a sweep


def evaluate(config: EvaluateConfig) -> None:
    """Evaluate as the configuration says, or show evaluations side by side. Repeated, it makes only
    what is missing."""
    if config.compare:
        print(report.compare([Path(folder) for folder in config.compare], config.output_dir))
        return
    for flag, value in (("--data.path", config.data.path), ("--output-dir", config.output_dir)):
        if not value:
            raise UserError(f"{flag} is missing: give it, or --compare with two evaluations.")
    if not (config.pipeline or config.vqvae or config.samples):
        raise UserError("nothing to evaluate: give --pipeline, --vqvae or --samples.")
    _evaluate(config)


@dataclass(frozen=True)
class Subject:
    """What is evaluated, and beside what."""

    folder: Path
    splits: ImageSplits
    extractor: Extractor
    pipeline: VQVAE2Pipeline | None
    vqvae: VQVAE2 | None

    def see(self, images: ImageSet) -> Seen:
        """What the extractor sees in a set; see `pipelines.evaluation.sets.see`."""
        return see(images, self.extractor, _cache())

    def sample(
        self,
        config: EvaluateConfig,
        name: str,
        number: int,
        *,
        labels: Sequence[int] | None = None,
        vectors: Tensor | None = None,
        known: Sequence[Known | None] = (),
        **settings: tuple[float, ...],
    ) -> ImageSet:
        """Samples in a folder of this name, made where they are missing; of each class, if no
        labels are given, as many as it has among the training images, and with their conditions."""
        assert self.pipeline is not None
        names, train = self.splits.class_names, self.splits.train
        numbers = [*(labels or ())]
        if labels is None:
            order = torch.randperm(len(train), generator=torch.Generator().manual_seed(0))
            rows = order.tolist()[:number]
            numbers = [train.label(i) or 0 for i in rows] if self.same_classes and names else []
            vectors = ImageSet.of_dataset("", train).choose(rows).vectors_for(self.pipeline)
        chosen = converted(SetConfig, config, num_images=number, labels=(), **settings)
        given: Any = {"labels": [names[i] for i in numbers] or None, "known": known}
        given["vectors"] = vectors = self.pipeline.as_vectors(vectors)
        receipt = make_receipt(self.pipeline, chosen, **given)
        how: dict[str, Any] = {"known": known, "vectors": vectors, "codes": name == "samples"}
        files = write_samples(self.pipeline, self.folder / name, receipt, **how)
        return ImageSet.of_files(name, files, self.pipeline.vqvae.config.image, numbers)

    @property
    def same_classes(self) -> bool:
        """Whether the priors' classes are those of the images."""
        return self.pipeline is not None and self.pipeline.class_names == self.splits.class_names


@writes_output
def _evaluate(config: EvaluateConfig) -> None:
    # What is evaluated, the real images, and who sees them.
    set_threads(config.num_threads)
    state, folder = processes(), Path(config.output_dir)
    pipeline, vqvae = _load(config)
    lpips, file = _load_lpips(config.lpips_file), config.statistics_file
    statistics = Moments.from_npz(Path(file)) if file is not None else None
    settings = _prepared_as(config.samples) if vqvae is None else vqvae.config.image
    name = config.pipeline or config.vqvae or ""
    training = read_training(config.vqvae or os.devnull)
    if config.pipeline is not None and pipeline is not None:
        training = pipeline.trainings.get("vqvae", {})
    data = with_recorded_split(config.data, training)
    splits = load_images(data, settings)
    facts: dict[str, Any] = {"image_names_hash": splits.facts()["image_names_hash"]}
    if vqvae is not None:
        facts["vqvae_hash"] = part_hash(vqvae)
    if pipeline is not None:
        pipeline.warn_of_noise()
        facts |= {**pipeline.content_hashes(), "sampler_version": SAMPLER_VERSION}
        own = ImageSet.of_dataset("", splits.train).vectors_for(pipeline)
        if pipeline.vector_size and own is None:
            text = "%s: the priors read conditions, but these images have none: they are hidden"
            logger.warning(f"{text}, unless you give --data.condition-column.", data.path)
        facts["conditions_hash"] = vectors_hash(own)
    run = RunRecord("evaluate", config, "evaluate_config.yaml", facts=facts)
    run.check(folder)
    _check_number(splits)
    samples = _given_samples(config, settings, splits)
    if name:  # a model, not images of another one
        are_its_images(name, training, facts, data.path)
    train = ImageSet.of_dataset("training images", splits.train)
    extractor, classifier = _extractor(config, train, splits.class_names)
    if statistics is not None and len(statistics.mean) != extractor.dim:
        what = f"{file} holds {len(statistics.mean)} features, but {extractor.name} has"
        raise UserError(f"{what} {extractor.dim}: give those of the same --features.")
    state.wait_for_everyone()
    if state.is_main_process:
        run.write(folder)
        if classifier is not None:  # for sample --reject
            classifier.save_pretrained(folder / "classifier")
    subject = Subject(folder, splits, extractor, pipeline, vqvae)

    # Samples, what is seen in all sets, and what that says.
    if samples is None and pipeline is not None:
        samples = subject.sample(config, "samples", config.num_samples)
    found, sets = _compare_sets(subject, samples)
    found |= {
        "given": config.samples is not None,
        "guided": _can_be_guided(subject),
        "data": Path(data.path).name,
        **facts,
        "image": to_dict(settings),
    }
    found["extractor"] = report.describe(extractor)
    if samples is not None and pipeline is not None and config.samples is None:
        found["levels"] = _compare_levels(subject, config, sets)
        found["sweep"] = _sweep(subject, config, sets["reference"]) if config.sweep else []
    if statistics is not None and state.is_main_process:
        found["file"] = _against(statistics, sets)
    text = on_main_process(state, partial(_finish, subject, lpips, found, sets))
    if state.is_main_process:
        print(text)


def _against(statistics: Moments, sets: Mapping[str, Any]) -> Figures:
    """The distance of each set from a reference of which only the statistics are known."""
    rows, names = {}, {"samples": "samples", "made": "reconstructions", "real": "real"}
    for key, name in names.items():
        if sets[key] is not None:
            distance = frechet_distance(statistics, sets[key].moments)
            rows[name] = {"count": len(sets[key].features), "distance": distance}
    return rows


def _finish(subject: Subject, lpips: Any, found: Figures, sets: dict[str, Any]) -> str:
    """What one process does alone, and the report; its text."""
    pictures: dict[str, Image] = {}
    names, samples = subject.splits.class_names, sets["samples"]
    if subject.vqvae is not None:
        found["stage 1"], pictures["reconstructions"] = _stage_1(subject, lpips)
    if samples is not None:
        pictures["samples"] = _sheet(samples.images, names)
        made = None if found["given"] else sets["held_out_made"]  # only ours are of its making
        near = [sets["train"], sets["held_out"], made, samples]
        found["memorised"], pairs = memorisation.memorised(subject.vqvae, *near)
        pictures |= {f"closest in {space}": pair for space, pair in pairs.items()}
        found["accuracy"] = _accuracy(sets, names)
    if subject.pipeline is not None and not found["given"] and sets["held_out"]:
        both, same = (sets["train"].images, sets["held_out"].images), subject.same_classes
        found["prior gaps"] = memorisation.prior_gaps(subject.pipeline, *both, same_classes=same)
    return report.write(subject.folder / "report", found, pictures)


def quick_figures(
    pipeline: VQVAE2Pipeline, splits: ImageSplits, samples: Sequence[Path]
) -> Figures:
    """For samples, as many reconstructions and real images, a few figures beside the held-out
    images."""
    train = ImageSet.of_dataset("training images", splits.train)
    classifier, _ = made_classifier(
        _cache(), Rows(train), train.labels, class_names=splits.class_names
    )
    extractor = make_extractor("classifier", classifier=classifier, device=processes().device)
    real = see(ImageSet.of_dataset("held-out images", splits.validation), extractor, _cache())
    other = train.some(len(samples))
    sets = {
        "samples": ImageSet.of_files("samples", samples, pipeline.vqvae.config.image, []),
        "reconstructions": other.reconstructed(pipeline.vqvae),
        "real images": other,
    }
    rows = {}
    for name, images in sets.items():
        found = measure.compare_briefly(real, see(images, extractor, _cache()))
        rows[name] = {extractor.distance_name: found["distance"]}
        rows[name] |= {key: found[key] for key in ("precision", "recall")}
    return rows


def _load(config: EvaluateConfig) -> tuple[VQVAE2Pipeline | None, VQVAE2 | None]:
    pipeline, vqvae = None, None
    if config.pipeline is not None:
        pipeline = VQVAE2Pipeline.from_pretrained(config.pipeline)
    elif config.priors:
        if config.vqvae is None:
            raise UserError("--priors are given without --vqvae: give both.")
        pipeline = VQVAE2Pipeline.from_parts(config.vqvae, config.priors)
    elif config.vqvae is not None:
        vqvae = VQVAE2.from_pretrained(config.vqvae).to(processes().device).eval()
    if pipeline is not None:
        vqvae = pipeline.to(processes().device).vqvae
    return pipeline, vqvae


def _extractor(
    config: EvaluateConfig, images: ImageSet, names: Sequence[str]
) -> tuple[Extractor, Classifier | None]:
    """The network that sees the images, and the classifier that it is, if it is one of ours."""
    classifier = None
    if config.features == "classifier":
        classifier, _ = made_classifier(_cache(), Rows(images), images.labels, class_names=names)
    where = {"classifier": classifier, "device": processes().device}
    return make_extractor(config.features, config.weights_file, **where), classifier


def _cache() -> Path:
    """What is kept of images, by their content, for all evaluations on this machine."""
    root = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(root).expanduser() / "vqvae2" / "evaluation"


def _image_folder(samples: str) -> Path:
    """Where the images are: what `vqvae2 sample` wrote has them in images/."""
    folder = Path(samples)
    return folder / "images" if (folder / "images").is_dir() else folder


def _prepared_as(samples: str | None) -> PreprocessingConfig:
    """Preprocessing to the size and the channels of the first sample."""
    assert samples is not None
    table = load_table(ImagesConfig(path=str(_image_folder(samples))), PreprocessingConfig())
    if not table.is_of_files:
        raise UserError(f"{samples} is no folder of pictures: give one, or --vqvae beside it.")
    picture = read_picture_file(str(table.files[0]))
    mode = getattr(picture, "mode", "I")
    if mode.startswith(("I", "F")):  # of 16 bits or more, or an array
        what = f"{samples} holds pictures that are not of 8 bits, whose black and white are unknown"
        raise UserError(f"{what}: give --vqvae or --pipeline beside it, which says what they are.")
    width, height = picture_size(picture)
    known = {mode: channels for channels, mode in MODES.items()}
    return PreprocessingConfig(size=(height, width), channels=known.get(mode, 3))


def _check_number(splits: ImageSplits) -> None:
    refuse_too_few(splits.train.source.name, len(splits.train))
    if len(splits.validation) < FEWEST:
        text = "%d images are held out, too few to compare with: only the training images are used."
        logger.warning(text, len(splits.validation))


def _given_samples(
    config: EvaluateConfig, settings: PreprocessingConfig, splits: ImageSplits
) -> ImageSet | None:
    """Images of another model, if they are given."""
    if config.samples is None:
        return None
    where, train = ImagesConfig(path=str(_image_folder(config.samples))), splits.train.source
    parts = [refuse_stream(part) for part in open_source(where, settings) if part is not None]
    labels = [label for part in parts for label in part.with_classes_of(train).labels or ()]
    table = load_table(where, settings)
    if len(labels) == len(table):
        table = replace(table, labels=labels, class_names=splits.class_names)
    images = ImageDataset(table, range(len(table)), settings)
    images.check()
    if len(images) < FEWEST:
        what = f"{config.samples} has {len(images)} images"
        raise UserError(f"{what}, too few to judge: give at least {FEWEST}.")
    return ImageSet.of_dataset("samples", images)


def _compare_sets(subject: Subject, samples: ImageSet | None) -> tuple[Figures, dict[str, Any]]:
    """Figures of samples, reconstructions and other real images against held-out and training ones;
    and what was seen, by name."""
    # Real images that no reference has, as many as there are samples, and what becomes of them.
    vqvae, held_out = subject.vqvae, subject.splits.validation
    train = subject.see(ImageSet.of_dataset("training images", subject.splits.train))
    half = len(train.rows) // 2
    number = min(samples.number, half) if samples else half
    order = torch.randperm(len(train.rows), generator=torch.Generator().manual_seed(0))
    real, rest = train.choose(order[:number]), train.choose(order[number:])
    sets: dict[str, Any] = {"train": train, "real": real, "rest": rest}
    sets["samples"] = subject.see(samples) if samples else None
    sets["made"] = subject.see(real.images.reconstructed(vqvae)) if vqvae else None
    sets["held_out"] = sets["held_out_made"] = None
    if len(held_out) >= FEWEST:
        images = ImageSet.of_dataset("held-out images", held_out)
        sets["held_out"] = subject.see(images)
        sets["held_out_made"] = subject.see(images.reconstructed(vqvae)) if vqvae else None
    decides = len(held_out) >= MANY
    sets["reference"] = sets["held_out" if decides else "rest"]
    if not processes().is_main_process:
        return {}, sets

    # Other real images are the best that can be, reconstructions the best that samples can be.
    rows = {"reconstructions": sets["made"], "real": sets["real"]}
    rows = {name: seen for name, seen in rows.items() if seen is not None}
    if sets["samples"]:  # as many of them, of all classes
        places = some_rows(len(sets["samples"].features), number)
        rows = {"samples": sets["samples"].choose(torch.tensor(places)), **rows}
    references = {"held-out images": sets["held_out"], "training images": sets["rest"]}
    found: Figures = {"against": {}, "decides": list(references)[not decides]}
    for title, beside in references.items():
        if beside is not None:
            compared = {name: measure.compare(beside, seen) for name, seen in rows.items()}
            found["against"][title] = compared
    if sets["held_out_made"]:
        compared = {"held out": measure.compare_briefly(sets["held_out"], sets["held_out_made"])}
        found["reconstructions"] = compared

    # By class, and what a classifier would reject.
    names = subject.splits.class_names
    found["classes"], found["few"] = measure.by_class(sets["rest"], rows, names)
    seen, known = sets["samples"], getattr(subject.extractor.network, "config", None)
    if seen and seen.labels is not None and getattr(known, "class_names", ()) == names:
        found["rejection"] = measure.rejection(sets["reference"], seen)
    return found, sets


def _accuracy(sets: Mapping[str, Any], names: Sequence[str]) -> Figures:
    """Classification accuracy scores, where there are classes and enough held-out images."""
    kinds = {"real": "real", "made": "reconstructions", "samples": "samples", "held_out": "test"}
    pixels: dict[str, Any] = {}
    for key, name in kinds.items():
        if sets[key] and sets[key].labels is not None and len(sets[key].labels.unique()) > 1:
            images = sets[key].images
            size = images.pixels([0]).numel()  # bytes
            images = images.some(min(MOST_LEARNED, max(MOST_BYTES // size, 100)))
            pixels[name] = images.pixels(range(images.number)), images.labels
    test = pixels.pop("test", None)
    if test is None or "samples" not in pixels:
        return {}
    try:
        scores = accuracy_scores(pixels, test, class_names=names, device=processes().device)
    except UserError as error:  # of few images, of which a class is rare
        logger.warning("no accuracy score: %s", error)
        return {}
    return {n: {"top 1": s.top_1, "top 5": s.top_5, **s.per_class} for n, s in scores.items()}


def _compare_levels(subject: Subject, config: EvaluateConfig, sets: dict[str, Any]) -> Figures:
    """Figures of images whose codes are real down to a level, and sampled below: which prior loses
    what. Nothing without two levels."""
    pipeline, vqvae = subject.pipeline, subject.vqvae
    if pipeline is None or vqvae is None or len(pipeline.priors) < 2:
        return {}

    # Real codes of the coarser levels, with their labels, as far as the priors know them.
    other: ImageSet = sets["real"].images
    number = min(MOST_OF_LEVEL, sets["samples"].images.number, other.number)
    codes = memorisation.codes_of(vqvae, other.choose(range(number)))
    if pipeline.class_names and not (subject.same_classes and other.labels):
        return {}
    labels = list(other.labels or [])[:number] if subject.same_classes else []
    vectors = other.choose(range(number)).vectors_for(pipeline)
    known = [Known(grid, torch.ones_like(grid, dtype=torch.bool)) for grid in codes]
    found, size = {}, len(pipeline.priors)
    rows = {"all levels sampled": sets["samples"].first(number)}
    for level in range(1, size):
        given = [*known[:level], *[None] * (size - level)]
        name = f"{level_name(level - 1, size)} real, sampled below"
        folder = f"levels/{level}"
        made = subject.sample(config, folder, number, known=given, labels=labels, vectors=vectors)
        rows[name] = subject.see(made)
    rows["all levels real"] = sets["made"].first(number)
    if processes().is_main_process:
        found = {n: measure.compare_briefly(sets["reference"], s) for n, s in rows.items()}
    return found


def _can_be_guided(subject: Subject) -> bool:
    priors = subject.pipeline.priors if subject.pipeline is not None else []
    return bool(priors) and all(prior.config.can_be_guided for prior in priors)


def _sweep(subject: Subject, config: EvaluateConfig, reference: Seen) -> list[Figures]:
    """Figures of several temperatures and top-ps, at each guidance scale."""
    assert subject.pipeline is not None
    guidances = GUIDANCES if _can_be_guided(subject) else (1.0,)
    rows = []
    number = min(config.num_samples, MOST_OF_SETTING)
    varied = _temperatures_and_top_ps(len(subject.pipeline.priors))
    for guidance, (temperatures, top_p) in product(guidances, varied):
        words = " ".join(map(str, temperatures))
        name = f"sweep/temperature_{words.replace(' ', '_')}_top_p_{top_p}_guidance_{guidance}"
        how: Any = {"temperature": temperatures, "top_p": (top_p,), "guidance_scale": (guidance,)}
        seen = subject.see(subject.sample(config, name, number, **how))
        if processes().is_main_process:
            settings = {"temperature": words, "top_p": top_p, "guidance_scale": guidance}
            rows.append({**settings, **measure.compare_briefly(reference, seen)})
    return rows


def _temperatures_and_top_ps(num_levels: int) -> list[tuple[tuple[float, ...], float]]:
    """What a sweep varies: the temperature of all levels; that of the finest one, which draws
    details, so that a low one costs little variety; or top-p."""
    varied: list[tuple[tuple[float, ...], float]]
    varied = [((temperature,), 1.0) for temperature in TEMPERATURES]
    if num_levels > 1:
        coarser = (1.0,) * (num_levels - 1)
        varied += [((*coarser, finest), 1.0) for finest in TEMPERATURES if finest != 1]
    return [*varied, *(((1.0,), top_p) for top_p in TOP_PS)]


def _stage_1(subject: Subject, distance: Any) -> tuple[Figures, Image]:
    """What stage 1 does to held-out images (or training ones, if few are held out)."""
    vqvae, held_out, device = subject.vqvae, subject.splits.validation, processes().device
    assert vqvae is not None
    images = held_out if len(held_out) >= FEWEST else subject.splits.train
    rows = [images.indices[i] for i in some_rows(len(images), MOST_INSPECTED)]
    chosen = ImageDataset(images.source, rows, images.config)
    lpips = None if distance is None else _lpips(distance.to(device), vqvae, chosen)
    found = measure.stage_1(vqvae, inspect(vqvae, chosen, device), lpips)
    found["images"] = "held-out images" if images is held_out else "training images"
    return found, reconstruction_sheet(vqvae, chosen, device, num_images=16)


def _load_lpips(file: str | None) -> Any:
    if file is None:
        return None
    distance = load_perceptual(PerceptualConfig(weights_file=file))
    if not distance.num_weights:
        raise UserError("--lpips-file has a VGG, but no lin0 to lin4: add LPIPS's own weights.")
    return distance


@torch.no_grad()
def _lpips(distance: Any, vqvae: VQVAE2, images: ImageDataset) -> float:
    total = 0.0
    for first in range(0, len(images), 16):
        rows = range(first, min(first + 16, len(images)))
        originals = to_images(images.__getitems__(rows)["images"].to(processes().device))
        made = vqvae(originals).reconstruction.clamp(-1, 1)
        total += distance(made, originals).item() * len(rows)
    return total / len(images)


def _sheet(samples: ImageSet, class_names: Sequence[str]) -> Image:
    """Some samples: eight of each class, or any."""
    rows, names = list(range(min(64, samples.number))), []
    if samples.labels is not None and class_names:
        of_class: list[list[int]] = [[] for _ in class_names]
        for i, label in enumerate(samples.labels):
            of_class[label].append(i)
        shown = [members[:8] for members in of_class if len(members) >= 8][:MOST_NAMES]
        rows = [i for members in shown for i in members] or rows
        names = [class_names[samples.labels[i]] for i in rows]
    return sample_sheet(to_pil(to_images(samples.pixels(rows))), names)
