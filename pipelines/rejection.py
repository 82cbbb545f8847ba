"""Classifier rejection sampling (the paper's section 3.3): of the candidates of each class, keep
the share that a classifier finds best."""

import dataclasses
import hashlib
import math
import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pipelines.config import SampleConfig
from pipelines.evaluation.classifier import Classifier
from pipelines.evaluation.network_files import load_network
from pipelines.file_names import sample_files
from pipelines.pipeline import VQVAE2Pipeline
from vqvae2.common.accelerate import on_main_process, processes
from vqvae2.common.artifact import WEIGHTS_NAME
from vqvae2.common.config import check
from vqvae2.common.errors import UserError
from vqvae2.common.files import file_hash, whole_file
from vqvae2.common.runs import RunRecord, read_record
from vqvae2.data import load_picture, to_images
from vqvae2.data.splits import few

KEEP = 0.2  # of the candidates, if nothing else is said
BATCH_SIZE = 64
KEPT, HASH = "kept", "classifier_hash"  # keys of the record


def with_rejection(config: SampleConfig, run: RunRecord, pipeline: VQVAE2Pipeline) -> RunRecord:
    """The record of a run that rejects: bound to its classifier, and with the choice so far.

    Raises:
        UserError: there is neither a classifier nor a choice, or see `load_judge`.
    """
    path, own = Path(config.reject or ""), _record(Path(config.output_dir), run)
    notes = {KEPT: own[KEPT]} if KEPT in own else {}
    if own and HASH not in own:  # perhaps of an earlier version, whose record says less
        what = f"{config.output_dir} holds samples that no classifier chose"
        raise UserError(f"{what}: choose another --output-dir.")
    weights = path / WEIGHTS_NAME if path.is_dir() else path
    if other := _record(path, run):
        if KEPT not in other:
            raise UserError(f"{path} holds no choice: give a classifier.")
        found = hashlib.sha256(other[KEPT].encode()).hexdigest()
    elif weights.is_file():
        load_judge(str(path), pipeline)  # or an error, before anything is written
        found = file_hash(weights)
    elif notes:  # a set whose choice is made needs no classifier
        found = own[HASH]
    else:
        what = f"{path} is no classifier's folder or file and no folder of samples"
        raise UserError(f"{what}: correct --reject.")
    return dataclasses.replace(run, facts={**run.facts, HASH: found}, notes=notes)


def choose(
    config: SampleConfig,
    run: RunRecord,
    pipeline: VQVAE2Pipeline,
    labels: Sequence[int],
    draw: Callable[[Path, int], object],
) -> list[int]:
    """The indices of the candidates to keep, in the record; the kept files are copied to images/.

    Args:
        run: what `with_rejection` gave.
        labels: the numbers of labels that images take in turn; none without classes.
        draw: writes so many candidates to a folder.

    Raises:
        UserError: the classifier does not fit the pipeline, or another set's choice this one.
    """
    # A choice that was made, for this set or for another one; or one among candidates drawn now.
    folder, state = Path(config.output_dir), processes()
    kept = [*map(int, run.notes.get(KEPT, "").split())]
    if (others := chosen_elsewhere(config, run)) is not None:
        kept = others
    elif len(kept) != config.num_images:
        network, columns = load_judge(config.reject or "", pipeline)
        keep, turn = config.keep or KEEP, [*labels] or [0]
        number = len(turn) * math.ceil(math.ceil(config.num_images / len(turn)) / keep - 1e-9)
        draw(folder / "candidates", number)

        def rank() -> list[int]:
            files = [*sample_files(folder / "candidates").values()][:number]
            wanted = [columns[turn[i % len(turn)]] for i in range(number)]
            scores = _scores(network.to(state.device), wanted, files, pipeline, state.device)
            return best(scores, turn, config.num_images, keep)

        kept = on_main_process(state, rank)

    # The record comes first; then files, of which those that are missing can be drawn again.
    if state.is_main_process:
        dataclasses.replace(run, notes={KEPT: " ".join(map(str, kept))}).write(folder)
        chosen = {*kept}
        for index, old in sample_files(folder).items():
            if index not in chosen:
                old.unlink()
        for index, made in sample_files(folder / "candidates").items():
            new = folder / "images" / made.name
            if index in chosen and not new.exists():
                with whole_file(new) as aside:
                    shutil.copyfile(made, aside)
    state.wait_for_everyone()
    return kept


def _record(folder: Path, run: RunRecord) -> dict[str, Any]:
    """The record of a folder of samples; empty without one."""
    path = folder / run.file_name
    return read_record(path) if path.is_file() else {}


def chosen_elsewhere(config: SampleConfig, run: RunRecord) -> list[int] | None:
    """Another set's choice, if `reject` names one. Raises a `UserError` if that set is not drawn by
    the same settings."""
    source = config.reject or ""
    other = _record(Path(source), run)
    if not other:
        return None
    kept = [*map(int, other.get(KEPT, "").split())]
    if len(kept) != config.num_images:
        what = f"{source} records the choice of {len(kept)} images, not of {config.num_images}"
        raise UserError(f"{what}: set --num-images to it, or give the classifier.")
    facts = {key: value for key, value in run.facts.items() if key != HASH}
    settings = {"reject": other["reject"], "keep": config.keep or other["keep"]}
    same = dataclasses.replace(config, **settings)
    try:
        dataclasses.replace(run, config=same, facts=facts).check(Path(source))
    except UserError as error:
        what = f"--reject {source} chose among other samples ({error.args[0].partition(': ')[0]})"
        raise UserError(f"{what}: draw by the same settings, or give the classifier.") from None
    return kept


def best(scores: Sequence[float], turn: Sequence[int], number: int, keep: float) -> list[int]:
    """The indices of the best candidates: of each label as many as `number` images have that take
    the labels in turn, chosen from so many of its first candidates that they are the share `keep`
    of them. Of equal ones, the first. They come with their labels in turn, too."""
    groups: dict[int, list[int]] = {}
    for i in range(len(scores)):
        groups.setdefault(turn[i % len(turn)], []).append(i)
    queues = {}
    for label, count in Counter(turn[i % len(turn)] for i in range(number)).items():
        first = groups[label][: math.ceil(count / keep - 1e-9)]
        queues[label] = iter(sorted(sorted(first, key=lambda i: -scores[i])[:count]))
    return [next(queues[turn[i % len(turn)]]) for i in range(number)]


def load_judge(path: str, pipeline: VQVAE2Pipeline) -> tuple[nn.Module, list[int]]:
    """A classifier, and for each label number which of its logits scores a sample: that of its own
    class; -1, for the highest one, without a class; "as it is" of transformations.

    Args:
        path: the folder of a `Classifier`; or a TorchScript or ONNX file, of a network from images
            `(B, C, H, W)` in [-1, 1] to logits in the order of the pipeline's classes.

    Raises:
        UserError: it is neither, or its images or classes are not the pipeline's.
    """
    # Files say nothing of their classes.
    names, image = pipeline.class_names, pipeline.vqvae.config.image
    if not Path(path).is_dir():
        return load_network(path), [*range(len(names)), -1]

    # Ours says what it takes and tells apart.
    network = Classifier.from_pretrained(path)
    takes = network.config
    shape, right = (takes.channels, *takes.size), (image.channels, *image.height_width)
    check(shape == right, f"{path}: the images' shape", shape, f"{right}, as the pipeline's")
    if not takes.of_labels:
        return network, [0] * (len(names) + 1)
    if missing := set(names) - set(takes.class_names):
        what = f"{path} knows {few(takes.class_names)}, but not {few(sorted(missing))}"
        raise UserError(f"{what}: give a classifier of the pipeline's classes.")
    return network, [*map(takes.class_names.index, names), -1]


@torch.no_grad()
def _scores(
    network: nn.Module,
    columns: Sequence[int],
    files: Sequence[Path],
    pipeline: VQVAE2Pipeline,
    device: torch.device,
) -> list[float]:
    """The logarithm of the probability that a classifier gives to the wanted class of each file."""
    scores: list[float] = []
    for start in range(0, len(files), BATCH_SIZE):
        some = slice(start, start + BATCH_SIZE)
        pixels = [load_picture(str(file), pipeline.vqvae.config.image) for file in files[some]]
        images = to_images(torch.cat(pixels)).to(device)
        try:
            logits = network(images)
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[-1]
            what = f"the classifier fails on images of shape {tuple(images.shape)} ({reason})"
            raise UserError(f"{what}: give one that takes them.") from None
        if not isinstance(logits, torch.Tensor):
            what = f"the classifier's output is a {type(logits).__name__}, not a tensor"
            raise UserError(f"{what}: give a network that returns its logits alone.")
        shape, names = tuple(logits.shape), pipeline.class_names
        fits = isinstance(network, Classifier) or shape == (len(images), len(names) or shape[-1])
        allowed = f"{(len(images), len(names))}, a logit per class of the pipeline"
        check(fits, "the shape of the classifier's output", shape, allowed)
        found = logits.float().log_softmax(dim=1).cpu()
        wanted = torch.tensor(columns[some])[:, None]
        own = torch.where(wanted < 0, found.amax(1, True), found.gather(1, wanted.clamp(min=0)))
        scores += own[:, 0].tolist()
    return scores
