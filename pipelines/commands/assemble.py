"""`vqvae2 assemble`: one folder of an autoencoder and its priors."""

import dataclasses
import logging
from pathlib import Path

from pipelines.config import AssembleConfig
from pipelines.pipeline import VQVAE2Pipeline
from vqvae2.common.accelerate import on_main_process, processes
from vqvae2.common.errors import UserError
from vqvae2.common.lock import writes_output
from vqvae2.common.runs import RunRecord
from vqvae2.common.vocabulary import INDEX_NAME

logger = logging.getLogger(__name__)
UNFINISHED = "assemble_config.yaml"  # of what was begun; the index is the record of what is whole


@writes_output
def assemble(config: AssembleConfig) -> None:
    """Write the pipeline folder; continue, repair, or do nothing if it is finished."""
    # The folder is new, or holds these parts.
    folder = Path(config.output_dir)
    pipeline = VQVAE2Pipeline.from_parts(config.vqvae, config.priors)
    run = RunRecord("assemble", config, UNFINISHED, facts=pipeline.content_hashes())
    finished = (folder / INDEX_NAME).exists()
    (dataclasses.replace(run, file_name=INDEX_NAME) if finished else run).check(folder)
    processes().wait_for_everyone()  # all have looked before the first one writes

    # Write what is not whole.
    def write() -> None:
        if not (finished and _is_whole(folder)):
            run.write(folder)
            pipeline.save_pretrained(folder)
        (folder / UNFINISHED).unlink(missing_ok=True)

    on_main_process(processes(), write)
    pipeline.warn_of_noise()
    logger.info(f"{folder}: the pipeline, for vqvae2 sample --pipeline.")


def _is_whole(folder: Path) -> bool:
    try:
        VQVAE2Pipeline.from_pretrained(folder)
    except UserError:
        return False
    return True
