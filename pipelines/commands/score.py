"""`vqvae2 score`: how unusual images are, as a table, and where, as pictures."""

import json
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import torch
from PIL import Image, ImageColor
from torch import Tensor
from torch.nn import functional as F

from pipelines.config import ScoreConfig
from pipelines.file_names import file_names
from pipelines.pipeline import VQVAE2Pipeline
from pipelines.scoring import ALL, BATCH, HEALED, NORMAL_NAME, Normal, Scores
from vqvae2.common.accelerate import check_same_images, on_main_process, processes
from vqvae2.common.config import from_dict
from vqvae2.common.errors import UserError
from vqvae2.common.files import file_hash, read_json, remove_folder, whole_file, write_json
from vqvae2.common.lock import writes_output
from vqvae2.common.metrics import draw_panel
from vqvae2.common.pictures import (
    as_rgb,
    file_suffix,
    in_rows,
    save_image,
    save_picture,
    sheet,
    to_pil,
)
from vqvae2.common.runs import RunRecord
from vqvae2.common.skipped import list_skipped, report_skipped
from vqvae2.common.threads import set_threads
from vqvae2.common.vocabulary import SPLITS
from vqvae2.data import to_images, work_parts
from vqvae2.data.augmentation import no_change
from vqvae2.data.work_parts import Item, Part, Parts, ReadItem, note_path

logger = logging.getLogger(__name__)
PART_SIZE = 1024  # images; what is done of a part is lost when the command is killed
SHOWN = 16  # images at either end of the sheet
TABLE = "scores.parquet"
HEAT = ("#000004", "#57106e", "#bc3754", "#f98e09", "#fcffa4")  # from usual to unusual
MARK = torch.tensor([-1.0, 1.0, 1.0])  # cyan: the edge of what is marked


@dataclass(frozen=True)
class _Job:
    """What a part is written with."""

    config: ScoreConfig
    pipeline: VQVAE2Pipeline
    found: Parts
    names: Mapping[tuple[str, str], str]  #: of pictures: split, image -> file without its suffix
    normal: Normal | None
    thresholds: tuple[float, float]  #: of images, and of places in them


@writes_output
def score(config: ScoreConfig) -> None:
    """Score images as the configuration says; continue, or do nothing if all is there."""
    # By what: the pipeline, the labels, and what is known of normal images.
    set_threads(config.num_threads)
    state, folder = processes(), Path(config.output_dir)
    pipeline = VQVAE2Pipeline.from_pretrained(config.pipeline).to(state.device)
    home = Path(config.pipeline).expanduser()
    if config.labels != ALL or not pipeline.class_names:
        pipeline.numbers_or_hidden(config.labels)  # or a UserError
    normal, thresholds, facts = None, (np.inf, HEALED), pipeline.content_hashes()
    if config.calibrate and not home.is_dir():
        raise UserError(f"{home} is no folder: download the pipeline before --calibrate.")
    if config.false_alarm_rate is not None:
        normal = Normal.load(home, config.labels, config.redraws, pipeline.content_hash())
        thresholds = normal.thresholds(config.false_alarm_rate)
        facts["normal_hash"] = file_hash(home / NORMAL_NAME)

    # What: all images, or to calibrate those that trained nothing.
    run = RunRecord("score", config, "score_config.yaml", facts=facts)
    run.check(folder)
    found = _find(config, pipeline)
    check_same_images(found.facts, found.number())
    run = replace(run, facts={**run.facts, **found.facts})
    run.check(folder)
    finished = (folder / TABLE).exists()
    state.wait_for_everyone()  # all have looked before the first one writes
    if finished:
        if config.calibrate:  # anew, if the pipeline has lost it
            table = pq.read_table(folder / TABLE)
            on_main_process(state, partial(_store_normal, config, pipeline, table, anew=False))
        if (folder / "parts").exists() and state.is_main_process:  # it was killed at the very end
            remove_folder(folder / "parts")
        logger.info("%s: all images are scored already.", folder)
        return
    on_main_process(state, partial(run.write, folder))

    # Each process its parts; then one table of all.
    names: dict[tuple[str, str], str] = {}
    if config.maps or config.heal:
        ids = [(item.split, item.id) for part in found.parts for item in part.items()]
        names = dict(zip(ids, file_names([name for _, name in ids], ""), strict=True))
    job = _Job(config, pipeline, found, names, normal, thresholds)
    rows, choices = folder / "parts", {split: [no_change] for split in SPLITS}
    options: Any = {"description": "scoring", "skip": config.data.on_error == "skip"}
    work_parts.write_parts(found, rows, partial(_write_part, job), choices, state, **options)
    state.wait_for_everyone()
    on_main_process(state, partial(_finish, job, rows))


def _find(config: ScoreConfig, pipeline: VQVAE2Pipeline) -> Parts:
    """All images, in parts; to calibrate, of those that trained the pipeline the held-out ones."""
    settings = pipeline.vqvae.config.image
    if config.calibrate:
        found = work_parts.find_parts(config.data, settings, PART_SIZE)
        trained = pipeline.trainings.get("vqvae", {}).get("image_names_hash")
        if found.facts["image_names_hash"] == trained:
            held_out = []
            for part in found.parts:
                if SPLITS[1] in part.splits:
                    items = partial(_held_out, part)
                    held_out.append(replace(part, splits=SPLITS[1:], items=items))
            return replace(found, parts=tuple(held_out))
        logger.warning(
            "%s: these are not the images that the pipeline was trained on, or not all of them. "
            "Any that it was trained on look less unusual than new ones: leave them out, or give "
            "its --data.path and --data.validation-path, of which it takes those held out.",
            config.data.path,
        )
    return work_parts.find_parts(config.data, replace(settings, validation_fraction=0), PART_SIZE)


def _held_out(part: Part) -> Iterator[Item]:
    return (item for item in part.items() if item.split == SPLITS[1])


def _write_part(
    job: _Job, part: Part, items: Iterator[ReadItem], skipped: Mapping[str, list]
) -> None:
    """Score the images of a part, write their pictures, and then their rows."""
    # The rows of each batch.
    (split,) = part.splits
    tables = []
    while few := list(islice(items, BATCH)):
        ids, found = [row.item.id for row in few], job.found
        images = to_images(torch.stack([row.pixels[0] for row in few]))
        scores = job.pipeline.score(images, job.config.labels, job.config.redraws)
        columns: dict[str, Any] = {"image": ids, "split": [split] * len(ids)}
        if found.labelled:
            labels = [row.item.label for row in few]
            names = found.class_names
            columns["label"] = [str(i) if names is None else names[i or 0] for i in labels]
        columns |= scores.columns(job.pipeline.class_names)
        columns["worst_place"] = scores.unusual_map.amax(dim=(1, 2)).double().numpy()
        if job.normal is not None:
            columns["p_value"] = job.normal.p_values(columns["score"])
            columns["unusual"] = columns["score"] > job.thresholds[0]
            marked = scores.unusual_map > job.thresholds[1]
            columns["unusual_pixels"] = marked.float().mean(dim=(1, 2)).numpy()
        tables.append(pa.table(columns))
        if job.names:
            _draw(job, [job.names[split, name] for name in ids], images, scores)

    # All of them, whole or not at all.
    path = part.path(Path(job.config.output_dir) / "parts", split)
    table = pa.concat_tables(tables) if tables else pa.table({})
    facts = {"skipped": json.dumps(skipped[split])}
    with whole_file(path) as aside:
        pq.write_table(table.replace_schema_metadata(facts), aside)
        write_json(note_path(path), {"sha256": file_hash(aside)})


def _draw(job: _Job, names: Sequence[str], images: Tensor, scores: Scores) -> None:
    """Write pictures of images `(B, C, H, W)`: where each is unusual, and healed."""
    # Heat maps, on one scale for all images.
    size, folder, settings = (
        images.shape[2:],
        Path(job.config.output_dir),
        job.pipeline.vqvae.config,
    )
    marked = scores.unusual_map > job.thresholds[1]
    panels = [to_pil(images), to_pil(edged(images, marked)) if job.normal else []]
    for grid, number in zip(scores.bits_map, settings.codebook_size_per_level, strict=True):
        panels.append(heat(F.interpolate(grid[:, None], size)[:, 0] / (2 * np.log2(number))))
    panels.append(heat(scores.reconstruction_error / 2))
    panels.append(heat(scores.unusual_map / (2 * HEALED)))

    # What is unusual, drawn anew; all else stays as it is.
    if job.config.heal:
        labels: Any = job.config.labels
        if scores.bits_by_label is not None:
            labels = scores.best_labels(job.pipeline.class_names)
        (healed,) = job.pipeline.redraw(images, marked, labels=labels)
        panels += [to_pil(healed), heat((healed - images).square().mean(dim=1) / 2)]
        suffix = file_suffix(settings.image.channels, settings.image.value_range)
        for name, image in zip(names, healed, strict=True):
            path = folder / "healed" / f"{name}{suffix}"
            save_image(image, path, settings.image.value_range)
    for row, name in enumerate(names):
        strip = sheet([[panel[row] for panel in panels if panel]])
        save_picture(strip, folder / "maps" / f"{name}.png")


def heat(values: Tensor) -> list[Image.Image]:
    """Values `(B, H, W)` from 0 to 1, and above as 1, in colours."""
    anchors = np.array([ImageColor.getrgb(colour) for colour in HEAT])
    shares, known = values.clamp(0, 1).numpy(), np.linspace(0, 1, len(HEAT))
    channels = [np.interp(shares, known, anchors[:, channel]) for channel in range(3)]
    return [Image.fromarray(rgb) for rgb in np.stack(channels, axis=-1).round().astype(np.uint8)]


def edged(images: Tensor, marked: Tensor) -> Tensor:
    """Images `(B, C, H, W)` as RGB, with an edge around what is marked `(B, H, W)`."""
    rgb = as_rgb(images)
    outside = F.max_pool2d(1 - marked[:, None].float(), 3, 1, 1).bool()
    return torch.where(marked[:, None] & outside, MARK.view(3, 1, 1), rgb)


def _finish(job: _Job, rows: Path) -> None:
    """Write the table of all rows and the pictures of it, and remove its parts."""
    # The rows in order. The table is written last, as it says that all is done.
    folder, found = Path(job.config.output_dir), job.found
    paths = [path for split in SPLITS for path in found.paths(rows, split)]
    tables = [table for path in paths if len(table := pq.read_table(path))]
    list_skipped(folder, work_parts.skipped_images(paths))
    if not tables:
        if job.config.calibrate:
            what = f"{found.source}: the training held out none of these images"
            raise UserError(f"{what}: calibrate on others, which it has not seen.")
        raise UserError(f"{found.source}: no image is left to score: check data.path.")
    table = pa.concat_tables(tables).replace_schema_metadata(None)
    save_picture(_histogram(table), folder / "histogram.png")
    save_picture(_extremes(table, found), folder / "extremes.png")
    with whole_file(folder / "scores.csv") as aside:
        pyarrow.csv.write_csv(table, aside)
    if job.config.calibrate:
        _store_normal(job.config, job.pipeline, table)
    with whole_file(folder / TABLE) as aside:
        pq.write_table(table, aside)
    remove_folder(rows)

    # In a few words.
    report_skipped(folder)
    values = table["score"].to_numpy()
    shown = f"{min(values):.2f} to {max(values):.2f}, median {np.median(values):.2f}"
    logger.info(f"{folder / TABLE}: {len(values):,} images, scores from {shown}.")
    if job.normal is not None:
        number = int(np.sum(table["unusual"].to_numpy(zero_copy_only=False)))
        logger.info(f"{number:,} of them are more unusual than normal ones: see extremes.png.")


def _store_normal(
    config: ScoreConfig, pipeline: VQVAE2Pipeline, table: pa.Table, *, anew: bool = True
) -> None:
    """Store in the pipeline's folder how unusual a table's images are, as normal ones; without
    `anew`, only if nothing of the kind is stored there."""
    values, places = (tuple(table[name].to_pylist()) for name in ("score", "worst_place"))
    home, pipeline_hash = Path(config.pipeline).expanduser(), pipeline.content_hash()
    normal = Normal(config.labels, pipeline_hash, values, places, config.redraws)
    with suppress(UserError):
        if not anew:
            if Normal.load(home, config.labels, config.redraws, pipeline_hash) != normal:
                text = "%s is of other images, and is kept: remove it to have these again."
                logger.warning(text, home / NORMAL_NAME)
            return
    with suppress(UserError, OSError):
        before = from_dict(Normal, read_json(home / NORMAL_NAME), NORMAL_NAME)
        if before.settings != normal.settings:
            logger.warning("%s was of %s: it is replaced.", home / NORMAL_NAME, before.settings)
    normal.save(home)


def _histogram(table: pa.Table) -> Image.Image:
    """How many images have which score: a curve for each class, or for each split."""
    groups = table["label" if "label" in table.column_names else "split"].to_numpy()
    if len(np.unique(groups)) > 4:
        groups = np.full(len(groups), "all")
    values = table["score"].to_numpy()
    bins = max(4, min(30, math.isqrt(len(values))))
    edges = np.histogram_bin_edges(values, bins)
    curves: dict[str, Sequence[tuple[float, float]]] = {}
    for name in np.unique(groups):
        counts, _ = np.histogram(values[groups == name], edges)
        short = str(name)[:10] if str(name)[:10] not in curves else str(name)
        curves[short] = [*zip((edges[1:] + edges[:-1]) / 2, counts, strict=True)]
    return draw_panel("images", curves, x_name="score")


def _extremes(table: pa.Table, found: Parts) -> Image.Image:
    """The images with the lowest and with the highest scores."""
    # Which, and their pixels, read again.
    order = table["score"].to_numpy().argsort(kind="stable")
    number = max(1, min(SHOWN, len(order) // 2))  # so that none is shown at both ends
    ends = {"usual": order[:number], "unusual": order[: -number - 1 : -1]}
    names = [*zip(table["split"].to_pylist(), table["image"].to_pylist(), strict=True)]
    wanted = {names[i] for indices in ends.values() for i in indices}
    pictures: dict[tuple[str, str], Image.Image] = {}
    for part in found.parts:
        for item in part.items() if wanted - pictures.keys() else ():
            if (item.split, item.id) in wanted:
                (picture,) = to_pil(to_images(item.pixels(no_change)[None]))
                pictures[item.split, item.id] = picture

    # Rows of them.
    rows, titles = [], []
    for title, indices in ends.items():
        for few in in_rows([pictures[names[i]] for i in indices], 8):
            rows.append(few)
            titles.append(title)
    return sheet(rows, titles)
