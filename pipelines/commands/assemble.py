"""`vqvae2 assemble`: one folder of an autoencoder and its priors."""

import logging
from pathlib import Path

from pipelines.config import AssembleConfig
from pipelines.pipeline import INDEX_NAME, VQVAE2Pipeline
from vqvae2.common.accelerate import processes
from vqvae2.common.files import check_empty
from vqvae2.common.lock import writes_output

logger = logging.getLogger(__name__)


@writes_output
def assemble(config: AssembleConfig) -> None:
    """Write the pipeline folder."""
    output_dir = Path(config.output_dir)
    if output_dir.is_file() or not (output_dir / INDEX_NAME).exists():
        check_empty(output_dir, "pipeline")
    pipeline = VQVAE2Pipeline.from_parts(config.vqvae, config.priors)
    if processes().is_main_process:
        pipeline.save_pretrained(output_dir)
    logger.info(f"{output_dir}: the pipeline, for vqvae2 sample --pipeline.")
