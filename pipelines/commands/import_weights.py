"""`vqvae2 import-weights`: a model folder of another implementation's checkpoint."""

import logging
from pathlib import Path

from pipelines.config import ImportWeightsConfig
from pipelines.importers import rosinality_weights
from prior.shards import file_hash
from vqvae2.common.files import check_empty
from vqvae2.common.runs import RunRecord

logger = logging.getLogger(__name__)


def import_weights(config: ImportWeightsConfig) -> None:
    """Write the model folder, and say what the checkpoint contains."""
    output_dir, checkpoint = Path(config.output_dir), Path(config.checkpoint)
    check_empty(output_dir, "run")
    model = rosinality_weights.import_weights(checkpoint, config.image.size)
    notes = {"checkpoint_sha256": file_hash(checkpoint)}
    RunRecord("import-weights", config, "import_config.yaml", notes=notes).write(output_dir)
    model.save_pretrained(output_dir)
    found = model.config
    (top, bottom), (top_dim, bottom_dim) = found.codebook_size_per_level, found.code_dim_per_level
    logger.info(
        f"{output_dir}: {top} codes of {top_dim} dimensions at the top, {bottom} of {bottom_dim} "
        f"at the bottom; {found.num_residual_blocks} residual blocks of {found.residual_channels} "
        f"in {found.hidden_channels} channels; images of {found.image.channels} channels and "
        f"{' x '.join(map(str, found.image.height_width))} pixels."
    )
