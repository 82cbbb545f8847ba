"""`vqvae2 import-weights`: a model folder of another implementation's checkpoint."""

import logging
from pathlib import Path

from pipelines.config import ImportWeightsConfig
from pipelines.importers import rosinality_weights
from vqvae2.common.artifact import CONFIG_NAME
from vqvae2.common.files import file_hash
from vqvae2.common.lock import writes_output
from vqvae2.common.runs import RunRecord

logger = logging.getLogger(__name__)


@writes_output
def command(config: ImportWeightsConfig) -> None:
    """Write the model folder, or do nothing if it is finished; log what the checkpoint contains."""
    output_dir, checkpoint = Path(config.output_dir), Path(config.checkpoint)
    model = rosinality_weights.import_weights(checkpoint, config.image.size)
    facts = {"checkpoint_sha256": file_hash(checkpoint)}
    run = RunRecord("import-weights", config, "import_config.yaml", facts=facts)
    run.check(output_dir)
    if (output_dir / CONFIG_NAME).exists():  # the last file
        logger.info(f"{output_dir}: the weights are imported already.")
        return
    run.write(output_dir)
    model.save_pretrained(output_dir)
    found = model.config
    sizes = zip(found.codebook_size_per_level, found.code_dim_per_level, strict=True)
    top, bottom = (f"{size} codes of {dim} dimensions" for size, dim in sizes)
    height, width = found.image.height_width
    logger.info(
        f"{output_dir}: {top} at the top, {bottom} at the bottom; {found.num_residual_blocks} "
        f"residual blocks; images of {found.image.channels} x {height} x {width} pixels."
    )
