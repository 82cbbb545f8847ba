"""`vqvae2 sample`: new images as files."""

import logging
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from PIL.Image import Image

from pipelines.conditions import CONDITIONS_NAME, read_conditions
from pipelines.config import SampleConfig, SetConfig
from pipelines.editing import for_masks
from pipelines.file_names import sample_files
from pipelines.labels import Labels
from pipelines.receipts import (
    RECEIPT_NAME,
    SetReceipt,
    known_codes,
    load_pipeline,
    make_receipt,
)
from pipelines.rejection import choose, chosen_elsewhere, with_rejection
from pipelines.samples import samplings_of, write_samples
from prior.sampling import SAMPLER_VERSION
from vqvae2.common.accelerate import on_main_process, processes
from vqvae2.common.config import from_dict
from vqvae2.common.errors import UserError
from vqvae2.common.files import read_json
from vqvae2.common.lock import writes_output
from vqvae2.common.pictures import to_pil
from vqvae2.common.runs import RunRecord, read_record
from vqvae2.common.threads import set_threads
from vqvae2.config import PreprocessingConfig
from vqvae2.data import load_picture, to_images

logger = logging.getLogger(__name__)


@writes_output
def sample(config: SampleConfig) -> None:
    """Write samples as the configuration says; a folder with other settings' samples is refused."""
    # The settings, or a receipt's; the pipeline, and the codes of an image that is edited.
    wanted, file = None, config.receipt
    if file is not None:
        if not (Path(file).is_file() and Path(file).suffix == ".json"):
            raise UserError(f"--receipt {file} is no JSON file: give a set's {RECEIPT_NAME}.")
        wanted = from_dict(SetReceipt, read_json(Path(file)), file)
        settings = {field.name: getattr(wanted, field.name) for field in fields(SetConfig)}
        config = replace(config, receipt=None, **settings)
    set_threads(config.num_threads)
    pipeline = load_pipeline(config)
    pipeline.warn_of_noise()
    pipeline.to(processes().device)
    known = known_codes(config, pipeline.vqvae)
    labels: Labels = list(config.labels) or None
    if known:
        labels = pipeline.hidden_unless_given(labels)

    # Refuse wrong settings, and another run's folder, before anything is written.
    samplings_of(config, [prior.config for prior in pipeline.priors])
    given, beside = config.conditions, Path(file or "receipt").with_name(CONDITIONS_NAME)
    if wanted is not None and wanted.conditions_hash and not (config.attributes or given):
        if not beside.exists():
            what = f"the set of {file} was drawn with conditions, which are in {CONDITIONS_NAME}"
            raise UserError(f"{what}: put that beside it, or give --conditions.")
        given = str(beside)
    vectors = pipeline.as_vectors(read_conditions(given, config.attributes))
    receipt = make_receipt(pipeline, config, labels=labels, vectors=vectors, known=known)
    if wanted is not None and wanted.conditions_hash != receipt.conditions_hash:
        what = f"the set of {file} was drawn with other conditions"
        raise UserError(f"{what}: give those beside it, {beside}, or none if there are none.")
    if wanted is not None:
        wanted.refuse_other(receipt, f"the set of {file}")
        if remark := wanted.elsewhere(receipt):
            logger.warning("The set was %s.", remark)
    folder, new = Path(config.output_dir), SAMPLER_VERSION
    facts = {**pipeline.content_hashes(), "known_hash": receipt.known_hash, "sampler_version": new}
    facts["conditions_hash"] = receipt.conditions_hash
    run = RunRecord("sample", config, "sample_config.yaml", facts=facts)
    run = with_rejection(config, run, pipeline) if config.reject else run
    record = folder / run.file_name
    if (begun := read_record(record).get("sampler_version", 1) if record.exists() else new) != new:
        what = f"{folder} holds a set of version {begun} of the sampler, but this is version {new}"
        advice = "which draws other images of the same seed: choose another --output-dir"
        raise UserError(f"{what}, {advice}.")
    run.check(folder)
    if config.reject is None:
        _refuse_fewer(folder, config.num_images)
    else:
        chosen_elsewhere(config, run)
    processes().wait_for_everyone()
    on_main_process(processes(), lambda: run.write(folder))

    # Sample; with a classifier, first the candidates among which it chooses.
    options: dict[str, Any] = {"known": known, "front": _given(config, pipeline.vqvae.config.image)}
    options["vectors"] = vectors
    if config.reject is not None:

        def draw(candidates: Path, number: int) -> None:
            of_all = replace(receipt, num_images=number)
            write_samples(pipeline, candidates, of_all, **options)

        numbers = pipeline.label_numbers(list(receipt.labels) or None)
        options["only"] = choose(config, run, pipeline, numbers, draw)
    write_samples(pipeline, folder, receipt, npz=config.npz, **options)


def _refuse_fewer(folder: Path, number: int) -> None:
    """Raise a `UserError` where a set of more images would be left half described."""
    there = sample_files(folder)
    if max(there, default=-1) >= number:
        what = f"{folder} holds {len(there)} samples, more than --num-images {number}"
        raise UserError(f"{what}: ask for as many or more, or choose another --output-dir.")


def _given(config: SampleConfig, settings: PreprocessingConfig) -> dict[str, Image]:
    """The image that is edited, and its mask if there is one, as the pipeline sees them."""
    files = {"original": (config.init_image, settings), "mask": (config.mask, for_masks(settings))}
    given = {}
    for name, (file, how) in files.items():
        if file is not None:
            given[name] = to_pil(to_images(load_picture(file, how)))[0]
    return given
