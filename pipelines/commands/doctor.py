"""`vqvae2 doctor`: silent errors of trained parts, found in seconds; a line per check."""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch

from pipelines.belonging import ADVICE, mismatches
from pipelines.config import DoctorConfig
from pipelines.encoding import LANES, encode_lanes
from pipelines.model_index import RESTORE, changed_parts, part_folders, prior_bits
from prior.audit import (
    audit,
    check_beats_frequencies,
    check_cache,
    check_condition_helps,
    check_vector_helps,
)
from prior.base import Prior
from prior.manifest import CodeDataset, Manifest, read_manifest, read_rows
from prior.probes import dataset_rows, nats_per_code, spread
from prior.registry import load_prior
from prior.shards import column_name
from prior.verification import problems
from vqvae2.codebook_stats import level_name
from vqvae2.common.accelerate import processes, refuse_several_processes
from vqvae2.common.artifact import local_folder
from vqvae2.common.checks import Failed, Finding, check
from vqvae2.common.config import from_dict
from vqvae2.common.errors import UserError
from vqvae2.common.files import read_json
from vqvae2.common.runs import read_record
from vqvae2.common.vocabulary import EXTRACTION_RECORD, INDEX_NAME, SPLITS, describe_grids
from vqvae2.config import ImagesConfig
from vqvae2.data import ImageDataset, ImageTable, open_source
from vqvae2.data.augmentation import view_change
from vqvae2.model import VQVAE2
from vqvae2.quantizers import Quantizer

MOST_ROWS = 256  # real rows that a likelihood is measured on
ROUND_TRIP = "Restore the weights, or retrain on more images or with a higher revival_threshold."
DIFFERENT = 0.01  # share of codes that another machine may change: last bits decide near a border


def doctor(config: DoctorConfig) -> int:
    """Print a line per check, how many failed and what was not checked; exit code 1 if any failed.
    Raises a `UserError` if there is nothing to check, or something cannot be loaded."""
    refuse_several_processes()
    given, results = load(config), []
    for name, passed, message in examine(**given):
        results.append(passed)
        print(f"{'pass' if passed else 'FAIL'}  {name}: {message}", flush=True)
    failed, number = results.count(False), len(results)
    print(f"\n{failed} of {number} checks failed." if failed else f"\nAll {number} checks passed.")

    # What was left out for want of something.
    has_images = bool(given["images"]) or not (given["codes"] and given["vqvae"])
    unchecked = {
        "any prior (give --pipeline, or --priors)": not given["priors"],
        "what the priors have learned (give --codes)": given["priors"] and not given["codes"],
        "the autoencoder (give --pipeline, or --vqvae)": not given["vqvae"],
        "whether images still get the codes that are stored (give --data.path)": not has_images,
    }
    for what, is_missing in unchecked.items():
        if is_missing:
            print(f"Not checked: {what}.")
    return int(failed > 0)


def load(config: DoctorConfig) -> dict[str, Any]:
    """What the configuration names, as arguments of `examine`; raises as `doctor`."""
    # The autoencoder and the priors.
    folder, prior_folders = part_folders(config.pipeline, config.vqvae, config.priors)
    if folder is None and not prior_folders and config.codes is None:
        some = "--pipeline DIR, or any of --vqvae DIR, --codes DIR and --priors DIR DIR"
        raise UserError(f"nothing to check: give {some}; the more you give, the more is checked.")
    device, codes = processes().device, Path(config.codes) if config.codes is not None else None
    vqvae = VQVAE2.from_pretrained(folder).to(device) if folder is not None else None
    priors = [load_prior(prior_folder).to(device) for prior_folder in prior_folders]

    # The images that the codes were extracted from.
    images: dict[str, ImageTable] = {}
    if vqvae is not None and codes is not None and config.data.path:
        images = images_of(config.data, vqvae)
    elif vqvae is not None and codes is not None:
        with suppress(UserError):  # they are not there any more: a line says what is not checked
            recorded = recorded_images(codes)
            images = images_of(recorded, vqvae) if recorded is not None else {}
    index = config.pipeline and read_json(local_folder(config.pipeline) / INDEX_NAME)
    loaded = {"vqvae": vqvae, "priors": priors, "codes": codes, "images": images}
    return {**loaded, "index": index}


def images_of(data: ImagesConfig, vqvae: VQVAE2) -> dict[str, ImageTable]:
    """The images of both splits, if they are in tables: streams are not searched."""
    train, held_out = open_source(data, vqvae.config.image)
    both = {"train": train, "validation": held_out or train}
    return {split: table for split, table in both.items() if isinstance(table, ImageTable)}


def recorded_images(codes: Path) -> ImagesConfig | None:
    """Where the record of an extraction says that the images are, if they are still there."""
    record = codes / EXTRACTION_RECORD
    if not record.exists() or "data" not in (recorded := read_record(record)):
        return None
    data = from_dict(ImagesConfig, recorded["data"], str(record))
    paths = (data.path, data.validation_path or data.path)
    return data if all(Path(path).expanduser().exists() for path in paths) else None


def examine(
    vqvae: VQVAE2 | None = None,
    priors: Sequence[Prior] = (),
    codes: Path | None = None,
    images: Mapping[str, ImageTable] | None = None,
    *,
    index: Mapping[str, Any] | None = None,
) -> Iterator[Finding]:
    """All checks that these allow, the cheap and basic ones first: of the folder `codes`, by the
    `images` that it was extracted from, by split; of a pipeline by what its `index` says."""
    # Together, and the autoencoder alone.
    manifest, complete = read_manifest(codes) if codes is not None else None, index is not None
    if index is not None:
        parts = {"vqvae": vqvae} | {f"prior_{prior.config.level}": prior for prior in priors}
        yield check_files(index, parts)
    if (vqvae is not None) + (manifest is not None) + len(priors) > 1:
        yield check_belonging(vqvae, priors, manifest, complete)
    if vqvae is not None:
        is_source = manifest is not None and manifest.encoder_hash == vqvae.content_hash()
        rows = sum(map(manifest.num_rows, SPLITS)) if manifest is not None and is_source else None
        for level, quantizer in enumerate(vqvae.quantizers):
            number = rows and rows * math.prod(vqvae.config.grids[level])
            yield check_round_trip(quantizer, level_name(level, len(vqvae.quantizers)), number)

    # The codes, and the priors with them.
    datasets: dict[str, CodeDataset] = {}
    if codes is not None and manifest is not None:
        yield check_codes(codes, manifest, datasets)
        if datasets and images and vqvae is not None and vqvae.config.grids == manifest.grids:
            yield check_extraction(vqvae, codes, manifest, images)
    for prior in priors:
        for finding in examine_prior(prior, manifest, datasets):
            yield finding._replace(name=f"prior of level {prior.config.level}, {finding.name}")

    # Without codes there is only what the pipeline says of its trainings.
    for name, bits in prior_bits(index.get("trainings")).items() if index and not codes else ():
        finding = check_beats_frequencies(*bits)
        yield finding._replace(name=f"{name}, {finding.name} when it was trained")


def examine_prior(
    prior: Prior, manifest: Manifest | None, datasets: Mapping[str, CodeDataset]
) -> Iterator[Finding]:
    """The structural checks, and with codes that the prior can read those of what it has learned:
    on held-out rows, if there are two."""
    yield from audit(prior)
    if not datasets or mismatches(None, [prior], manifest, facts=("grids", "classes")):
        return
    held_out = datasets["validation"] if len(datasets["validation"]) > 1 else datasets["train"]
    few, rows = (dataset_rows(prior, held_out, number) for number in (2, MOST_ROWS))
    if manifest is not None and manifest.other_views != prior.config.views:
        rows = rows._replace(views=None)  # they are other views' numbers
    yield check_cache(prior, few)._replace(name="cache on real codes")
    yield from filter(None, [check_condition_helps(prior, rows), check_vector_helps(prior, rows)])
    alone = held_out.unigram_bits(prior.config.level, datasets["train"])
    found = check_beats_frequencies(nats_per_code(prior, rows) / math.log(2), alone)
    kind = "held-out" if held_out is datasets["validation"] else "training"
    yield found._replace(message=f"{len(rows.codes)} {kind} rows: {found.message}")


@check("files", f"{RESTORE[0].upper()}{RESTORE[1:]}.")
def check_files(index: Mapping[str, Any], parts: Mapping[str, Any]) -> str:
    """No part of a pipeline was changed after it was assembled."""
    if changed := changed_parts(index, parts):
        raise Failed("; ".join(changed))
    return f"{', '.join(parts)} are as they were assembled"


@check("parts", ADVICE)
def check_belonging(
    vqvae: VQVAE2 | None, priors: Sequence[Prior], manifest: Manifest | None, complete: bool
) -> str:
    """Everything was made with the same encoder, for the same grids, codebooks and classes."""
    wrong = mismatches(vqvae, priors, manifest, complete=complete)
    if wrong:
        raise Failed("; ".join(wrong))
    names = ["the autoencoder"] if vqvae is not None else []
    names += ["the code dataset"] if manifest is not None else []
    names += [f"the prior of level {prior.config.level}" for prior in priors]
    return f"{', '.join(names)} belong together"


@check("round trip, {1}", ROUND_TRIP)
def check_round_trip(quantizer: Quantizer, name: str, num_features: int | None = None) -> str:
    """Every code of a level comes back from looking it up and quantizing, with its embedding; or
    as one nearly equal, where all images have fewer features, if known, than there are codes."""
    size, tensors = quantizer.codebook_size, [*quantizer.parameters(), *quantizer.buffers()]
    device = tensors[0].device if tensors else None
    codes = torch.arange(size, device=device)[None, :, None]  # (1, K, 1)
    back = quantizer.eval()(quantizer.features_of(codes))
    changed = (back.codes != codes).flatten().nonzero().flatten().tolist()
    few = num_features is not None and num_features < size
    if changed and not few:
        pairs = ", ".join(f"{code} as {int(back.codes[0, code, 0])}" for code in changed[:4])
        seen = f"{len(changed)} of {size} codes come back as other codes ({pairs})"
        raise Failed(f"{seen}: their codebook vectors are equal, or were rounded")
    kept = back.codes == codes  # (1, K, 1), and the embeddings are (1, D, K, 1)
    if not torch.allclose(back.embeddings * kept, quantizer.lookup(codes) * kept, atol=1e-4):
        raise Failed("looking up a code gives another embedding than quantizing does")
    if changed:
        seen = f"{len(changed)} of {size} codes come back as other codes that are nearly equal"
        return f"{seen}: all images have only {num_features} features, too few images to fill it"
    return f"all {size} codes, looked up and quantized again, come back as themselves"


@check("codes", "vqvae2 codes verify lists all problems.")
def check_codes(folder: Path, manifest: Manifest, datasets: dict[str, CodeDataset]) -> str:
    """Every row is there, once, with codes in [0, K). Fills `datasets`, if they can be read."""
    wrong = list(problems(folder, manifest))
    try:
        datasets |= {split: CodeDataset(folder, manifest, split) for split in SPLITS}
    except UserError as error:
        wrong.append(str(error))
    if wrong:
        raise Failed(wrong[0].removesuffix("."))
    shown = ", ".join(describe_grids(manifest.grids, manifest.codebook_sizes))
    rows = f"{manifest.num_train} training rows and {manifest.num_validation} held out"
    return f"{rows}, no image twice, all codes inside their codebooks ({shown})"


@check("extraction", "Give this autoencoder's own codes and images, or extract again.")
def check_extraction(
    vqvae: VQVAE2, folder: Path, manifest: Manifest, images: Mapping[str, ImageTable]
) -> str:
    """Some images, found by their ids and encoded again, get the codes that are stored."""
    record = folder / EXTRACTION_RECORD
    bf16 = record.exists() and read_record(record).get("mixed_precision") == "bf16"
    levels, missing, changed = range(manifest.num_levels), 0, []
    wrong, total = [0 for _ in levels], [0 for _ in levels]
    for split, source in images.items():
        # Rows spread over the split, and their images.
        chosen = spread(manifest.num_rows(split), LANES // 2)
        table = read_rows(folder, manifest, split, chosen)
        indices = {name: i for i, name in enumerate(source.ids)}
        rows = [row for row in table.to_pylist() if row["id"] in indices]
        missing += len(table) - len(rows)
        if not rows:
            continue

        # Encode them again, as the view that each row is of.
        config = vqvae.config.image
        pictures = ImageDataset(source, [indices[row["id"]] for row in rows], config)
        pixels = []
        for i, row in enumerate(rows):
            pixels.append(pictures.changed(i, partial(view_change, row["view"], config)))
        for level, codes in enumerate(encode_lanes(vqvae, torch.stack(pixels), bf16=bf16)):
            different = codes != torch.tensor([row[column_name(level)] for row in rows])
            wrong[level] += int(different.sum())
            total[level] += different.numel()
            changed += [f"{split}/{rows[i]['id']}" for i in different.any(dim=1).nonzero()]

    # How many codes of each level differ.
    if not max(total):
        raise Failed(f"none of the {missing} images asked for is among these images")
    counts = [f"{wrong[i]} of {total[i]} {level_name(i, len(levels))}" for i in levels]
    seen = f"{', '.join(counts)} codes differ"
    if any(wrong[level] > DIFFERENT * total[level] for level in levels):
        raise Failed(f"encoding images again gives other codes: {seen}, the first of {changed[0]}")
    gone = f" ({missing} images are not there any more)" if missing else ""
    return f"images encoded again get their stored codes: {seen}{gone}"
