"""`vqvae2 doctor`: what can be wrong with trained parts without showing, checked in seconds, a line per check."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import cast

import pyarrow as pa
import torch
from torch import Tensor

from pipelines.commands.codes import problems
from pipelines.commands.extract import LANES, RECORD_NAME, encode_lanes
from pipelines.config import DoctorConfig
from pipelines.pipeline import part_folders
from prior.audit import (
    Finding,
    audit,
    check_beats_frequencies,
    check_cached_equals_plain,
    check_condition_helps,
    dataset_rows,
    spread,
)
from prior.base import Prior
from prior.manifest import SPLITS, CodeDataset, Manifest, read_manifest, read_shard
from prior.registry import load_prior
from vqvae2.codebook_stats import level_name
from vqvae2.common.accelerate import processes
from vqvae2.common.config import from_dict
from vqvae2.common.errors import UserError
from vqvae2.common.runs import read_record
from vqvae2.config import ImagesConfig
from vqvae2.data import ImageDataset, ImageTable, load_table
from vqvae2.data.augmentation import ORIGINAL, view_change
from vqvae2.model import VQVAE2
from vqvae2.quantizers import Quantizer

MOST_ROWS = 256  # real rows that a likelihood is measured on
DIFFERENT = 0.01  # share of codes that may differ from those extracted on another machine: near a border between two codes the last bits decide


@dataclass(frozen=True)
class Parts:
    """What there is to check; any of it may be missing."""

    vqvae: VQVAE2 | None
    priors: Sequence[Prior]
    codes: Path | None
    manifest: Manifest | None
    complete: bool = False
    """Whether they should be all parts of a pipeline."""


def doctor(config: DoctorConfig) -> int:
    """Print a line for each check, and how many failed; the exit code is 1 if any did.

    Raises:
        UserError: nothing to check, a part that cannot be loaded, or images without the codes and the autoencoder.
    """
    parts = load_parts(config)
    images = find_images(config, parts)
    failed = number = 0
    for finding in examine(parts, images):
        number += 1
        failed += not finding.passed
        print(
            f"{'pass' if finding.passed else 'FAIL'}  {finding.name}: {finding.message}", flush=True
        )
    print(f"\n{failed} of {number} checks failed." if failed else f"\nAll {number} checks passed.")
    for sentence in not_checked(parts, images):
        print(f"Not checked: {sentence}")
    return int(failed > 0)


def load_parts(config: DoctorConfig) -> Parts:
    """Load what the configuration names, without asking whether it fits together.

    Raises:
        UserError: nothing is named, or a pipeline beside its parts; or a part cannot be loaded.
    """
    vqvae: str | Path | None = config.vqvae
    priors: Sequence[str | Path] = config.priors
    if config.pipeline is not None:
        if vqvae is not None or priors:
            raise UserError(
                "--pipeline is given together with --vqvae or --priors: give one or the other."
            )
        vqvae, priors = part_folders(config.pipeline)
    if vqvae is None and not priors and config.codes is None:
        raise UserError(
            "nothing to check: give --pipeline DIR, or any of --vqvae DIR, --codes DIR and --priors DIR DIR ...; the more, the more is checked."
        )
    device = processes().device
    codes = Path(config.codes) if config.codes is not None else None
    return Parts(
        vqvae=VQVAE2.from_pretrained(vqvae).to(device) if vqvae is not None else None,
        priors=[load_prior(prior).to(device) for prior in priors],
        codes=codes,
        manifest=read_manifest(codes) if codes is not None else None,
        complete=config.pipeline is not None,
    )


def find_images(config: DoctorConfig, parts: Parts) -> dict[str, ImageTable]:
    """The images of the code dataset, by split: those named, or those that its record names if they are still there; else none.

    Raises:
        UserError: images are named, but no codes or no autoencoder; or there are no images.
    """
    path, validation_path = config.data.path, config.data.validation_path
    if path is not None and (parts.codes is None or parts.vqvae is None):
        raise UserError(
            "--data.path is given, but images are compared with codes: give --codes DIR and the autoencoder too."
        )
    if path is None and validation_path is not None:
        raise UserError("--data.validation-path is given without --data.path: give both.")
    if parts.codes is None or parts.vqvae is None:
        return {}
    data = (
        ImagesConfig(path=path, validation_path=validation_path)
        if path is not None
        else _recorded_images(parts.codes)
    )
    if data is None:
        return {}
    image = parts.vqvae.config.image
    train = load_table(data, image)
    held_out = (
        load_table(replace(data, path=data.validation_path, validation_path=None), image)
        if data.validation_path is not None
        else train
    )
    return {"train": train, "validation": held_out}


def _recorded_images(codes: Path) -> ImagesConfig | None:
    """Where the record of an extraction says that the images are, if they are still there."""
    record = codes / RECORD_NAME
    recorded = read_record(record).get("data") if record.exists() else None
    if recorded is None:
        return None
    data = from_dict(ImagesConfig, recorded, str(record))
    return (
        data
        if all(
            Path(path).expanduser().exists()
            for path in (data.path, data.validation_path)
            if path is not None
        )
        else None
    )


def examine(parts: Parts, images: Mapping[str, ImageTable]) -> Iterator[Finding]:
    """All checks that these parts allow, the cheap and basic ones first."""
    if (parts.vqvae is not None) + (parts.manifest is not None) + len(parts.priors) > 1:
        yield check_parts(parts)
    if parts.vqvae is not None:
        for level, quantizer in enumerate(parts.vqvae.quantizers):
            yield check_round_trip(
                cast(Quantizer, quantizer), level_name(level, parts.vqvae.config.num_levels)
            )
    datasets: dict[str, CodeDataset] = {}
    if parts.codes is not None and parts.manifest is not None:
        finding, datasets = check_codes(parts.codes, parts.manifest)
        yield finding
        if (
            datasets
            and images
            and parts.vqvae is not None
            and parts.vqvae.config.grids == parts.manifest.grids
        ):
            yield check_extraction(parts.vqvae, parts.codes, parts.manifest, datasets, images)
    for prior in parts.priors:
        for finding in examine_prior(prior, parts.manifest, datasets):
            yield finding._replace(name=f"prior of level {prior.config.level}, {finding.name}")


def not_checked(parts: Parts, images: Mapping[str, ImageTable]) -> list[str]:
    """What was left out for want of a part, and how to have it checked."""
    sentences = []
    if not parts.priors:
        sentences.append("any prior (give --pipeline, or --priors).")
    elif parts.codes is None:
        sentences.append("what the priors have learned (give --codes).")
    if parts.vqvae is None:
        sentences.append("the autoencoder (give --pipeline, or --vqvae).")
    if parts.codes is not None and parts.vqvae is not None and not images:
        sentences.append(
            "whether images still get the codes that are stored (their record names no images that are there: give --data.path)."
        )
    return sentences


def examine_prior(
    prior: Prior, manifest: Manifest | None, datasets: Mapping[str, CodeDataset]
) -> Iterator[Finding]:
    """The structural checks, and with codes that fit the prior those of what it has learned: on held-out rows, if there are two."""
    yield from audit(prior)
    if manifest is None or not datasets or not _fits(prior, manifest):
        return
    held_out = datasets["validation"] if len(datasets["validation"]) > 1 else datasets["train"]
    rows = dataset_rows(prior, held_out, MOST_ROWS)
    yield check_cached_equals_plain(prior, dataset_rows(prior, held_out, 2))._replace(
        name="cache on real codes"
    )
    helps = check_condition_helps(prior, rows)
    if helps is not None:
        yield helps
    yield check_beats_frequencies(prior, rows, datasets["train"])


def _fits(prior: Prior, manifest: Manifest) -> bool:
    """Whether the prior can read the codes at all."""
    config, number = prior.config, prior.config.level + 1
    same_classes = not config.num_classes or config.class_names == manifest.class_names
    return (
        config.grids == manifest.grids[:number]
        and config.codebook_sizes == manifest.codebook_sizes[:number]
        and same_classes
    )


def check_parts(parts: Parts) -> Finding:
    """Every part was made with the same encoder, for the same grids, codebooks and classes."""
    manifest, wrong = parts.manifest, []
    hashes = {"the autoencoder": parts.vqvae.content_hash()} if parts.vqvae is not None else {}
    shapes = (
        {"the autoencoder": (parts.vqvae.config.grids, parts.vqvae.config.codebook_size_per_level)}
        if parts.vqvae is not None
        else {}
    )
    classes = {}
    if manifest is not None:
        hashes["the code dataset"], shapes["the code dataset"] = (
            manifest.encoder_hash,
            (manifest.grids, manifest.codebook_sizes),
        )
        classes["the code dataset"] = manifest.class_names
    for prior in parts.priors:
        name, config = f"the prior of level {prior.config.level}", prior.config
        hashes[name], shapes[name] = config.encoder_hash, (config.grids, config.codebook_sizes)
        if config.num_classes:
            classes[name] = config.class_names
    datasets = {
        f"the prior of level {prior.config.level} was trained on": prior.config.codes_hash
        for prior in parts.priors
    }
    if manifest is not None:
        datasets = {"the code dataset is": manifest.codes_hash, **datasets}
    first, encoder = next(iter(hashes.items()))
    for name, other in hashes.items():
        if other != encoder:
            wrong.append(
                f"{name} belongs to the encoder {other[:12]}, but {first} to {encoder[:12]}"
            )
    for name, other in datasets.items():
        known = next(iter(datasets))
        if other != datasets[known]:
            wrong.append(f"{name} the codes {other[:12]}, but {known} {datasets[known][:12]}")
    for name, (grids, sizes) in shapes.items():
        known_grids, known_sizes = shapes[first]
        number = min(len(grids), len(known_grids))
        if (grids[:number], sizes[:number]) != (known_grids[:number], known_sizes[:number]):
            wrong.append(
                f"{name} has the grids {grids} of {sizes} codes, but {first} has {known_grids} of {known_sizes}"
            )
    for name, names in classes.items():
        known = next(iter(classes))
        if names != classes[known]:
            wrong.append(
                f"{name} has the classes {', '.join(names) or 'none'}, but {known} has {', '.join(classes[known]) or 'none'}"
            )
    levels = [prior.config.level for prior in parts.priors]
    if len(set(levels)) < len(levels):
        wrong.append(f"the priors are of the levels {levels}, some of which come twice")
    if (
        parts.complete
        and parts.vqvae is not None
        and levels != list(range(parts.vqvae.config.num_levels))
    ):
        wrong.append(
            f"the priors are of the levels {levels}, but the pipeline needs {list(range(parts.vqvae.config.num_levels))}, the top first"
        )
    if wrong:
        what_to_do = "The codes of one part mean something else to another: extract with this autoencoder and train the priors on those codes."
        return Finding("parts", False, f"{'; '.join(wrong)}. {what_to_do}")
    return Finding("parts", True, f"{', '.join(hashes)} belong together: encoder {encoder[:12]}.")


@torch.no_grad()
def check_round_trip(quantizer: Quantizer, name: str) -> Finding:
    """Every code of a level, looked up and quantized again, comes back as itself, and with the same embedding."""
    size = int(getattr(quantizer, "codebook_size", 0)) or int(cast(Tensor, quantizer.levels).prod())
    codes = torch.arange(size, device=next(iter(quantizer.buffers())).device)[
        None, :, None
    ]  # (1, K, 1): one image of K codes
    back = quantizer.eval()(quantizer.features_of(codes))
    changed = (back.codes != codes).flatten().nonzero().flatten().tolist()
    if changed:
        pairs = ", ".join(f"{code} as {int(back.codes[0, code, 0])}" for code in changed[:4])
        what = f"{len(changed)} of {size} codes come back as others ({pairs}{', ...' if len(changed) > 4 else ''})"
        what_to_do = (
            "Their codebook vectors are the same, or were cut to fewer digits: such codes are never chosen, and what was extracted with other "
            "weights does not decode to what it was. Restore the weights; if they were trained so, raise quantizer.revival_threshold."
        )
        return Finding(f"round trip, {name}", False, f"{what}. {what_to_do}")
    if not torch.allclose(back.embeddings, quantizer.lookup(codes), atol=1e-4):
        what_to_do = "The decoder gets other vectors for codes than it was trained with: bring lookup in line with forward."
        return Finding(
            f"round trip, {name}",
            False,
            f"looking up a code gives another embedding than quantizing does. {what_to_do}",
        )
    return Finding(
        f"round trip, {name}",
        True,
        f"all {size} codes, looked up and quantized again, come back as themselves.",
    )


def check_codes(folder: Path, manifest: Manifest) -> tuple[Finding, dict[str, CodeDataset]]:
    """Every row is there, once, with codes in [0, K) on the manifest's grids; and the rows, by split, where they can be read."""
    wrong = list(problems(folder, manifest))
    try:
        datasets = {split: CodeDataset(folder, manifest, split) for split in SPLITS}
    except UserError as error:
        return Finding("codes", False, wrong[0] if wrong else str(error)), {}
    if wrong:
        return Finding(
            "codes",
            False,
            f"{wrong[0]}{f' And {len(wrong) - 1} more, see vqvae2 codes verify.' if wrong[1:] else ''}",
        ), datasets
    grids = ", ".join(
        f"{h} x {w} of {size}"
        for (h, w), size in zip(manifest.grids, manifest.codebook_sizes, strict=True)
    )
    numbers = f"{manifest.num_train} training rows and {manifest.num_validation} held out"
    return Finding(
        "codes", True, f"{numbers}, no image twice, all codes inside their codebooks ({grids})."
    ), datasets


def check_extraction(
    vqvae: VQVAE2,
    folder: Path,
    manifest: Manifest,
    datasets: Mapping[str, CodeDataset],
    images: Mapping[str, ImageTable],
) -> Finding:
    """Some images, found by their ids and encoded again, get the codes that are stored."""
    wrong, total, missing = [0] * vqvae.config.num_levels, [0] * vqvae.config.num_levels, 0
    first = ""
    for split, dataset in datasets.items():
        # Images of a source come before its own held-out ones, which may repeat their names.
        found = {name: i for i, name in enumerate(images[split].ids)}
        if split == "train":
            found = {name: i for i, name in reversed(list(enumerate(images[split].ids)))}
        pairs = [
            pair
            for shard in manifest.shards(split)
            for table in read_shard(folder, manifest, split, shard, ["id", "view"])
            for pair in _pairs(table)
        ]
        rows = [row for row in spread(len(pairs), LANES // 2) if pairs[row][0] in found]
        missing += len(spread(len(pairs), LANES // 2)) - len(rows)
        if not rows:
            continue
        pictures = ImageDataset(
            images[split], [found[pairs[row][0]] for row in rows], vqvae.config.image
        )
        pixels = torch.stack([_view(pictures, i, pairs[row][1]) for i, row in enumerate(rows)])
        stored = dataset.__getitems__(rows)["codes"]
        for level, (again, before) in enumerate(
            zip(encode_lanes(vqvae, pixels), stored, strict=True)
        ):
            different = again != before.flatten(1)
            wrong[level] += int(different.sum())
            total[level] += different.numel()
            if different.any() and not first:
                first = f", the first of {split}/{pairs[rows[int(different.any(dim=1).nonzero()[0])]][0]}"
    if not max(total):
        what_to_do = "give the images that the codes were extracted from (--data.path)."
        return Finding(
            "extraction",
            False,
            f"none of the {missing} images asked for is among these images: {what_to_do}",
        )
    names = [level_name(level, vqvae.config.num_levels) for level in range(vqvae.config.num_levels)]
    said = ", ".join(f"{w} of {t} {name}" for w, t, name in zip(wrong, total, names, strict=True))
    if any(w > DIFFERENT * t for w, t in zip(wrong, total, strict=True)):
        what = f"encoding images again gives other codes ({said} codes differ{first})"
        what_to_do = "The codes are of another autoencoder, other images or another preparation, or were changed: extract again, and train the priors on them."
        return Finding("extraction", False, f"{what}. {what_to_do}")
    rest = f" ({missing} images are not there any more)" if missing else ""
    return Finding(
        "extraction",
        True,
        f"images encoded again get their stored codes: {said} codes differ{rest}.",
    )


def _pairs(table: pa.Table) -> Iterator[tuple[str, str]]:
    """Id and view of every row."""
    return zip(table["id"].to_pylist(), table["view"].to_pylist(), strict=True)


def _view(pictures: ImageDataset, index: int, view: str) -> Tensor:
    """A picture as extraction saw it, `(C, H, W)`."""
    return (
        pictures.pixels(index)
        if view == ORIGINAL
        else pictures.changed(index, partial(view_change, view, pictures.config))
    )
