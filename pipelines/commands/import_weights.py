"""`vqvae2 import-weights`: a model folder of another implementation's checkpoint."""

import logging
from pathlib import Path

import yaml

from pipelines.config import FINE_TUNING, ImportWeightsConfig
from pipelines.importers.weights import import_weights
from vqvae2.common.accelerate import refuse_several_processes
from vqvae2.common.artifact import CONFIG_NAME
from vqvae2.common.config import to_dict
from vqvae2.common.files import file_hash, write_text
from vqvae2.common.lock import writes_output
from vqvae2.common.runs import RunRecord
from vqvae2.common.vocabulary import IMPORT_RECORD

logger = logging.getLogger(__name__)


@writes_output
def command(config: ImportWeightsConfig) -> None:
    """Write the model folder, or do nothing if it is finished; log what the checkpoint contains."""
    refuse_several_processes()
    output_dir, checkpoint = Path(config.output_dir), Path(config.checkpoint)
    model = import_weights(checkpoint, config.image.size)
    facts = {"checkpoint_sha256": file_hash(checkpoint)}
    run = RunRecord("import-weights", config, IMPORT_RECORD, facts=facts)
    run.check(output_dir)
    if (output_dir / CONFIG_NAME).exists():  # the last file
        logger.info(f"{output_dir}: the weights are imported already.")
        return
    run.write(output_dir)
    train = {"init_from": str(output_dir), "learning_rate": 1e-4, "model": to_dict(model.config)}
    write_text(output_dir / FINE_TUNING, yaml.safe_dump({"train": train}))
    model.save_pretrained(output_dir)
    dims = " and ".join(map(str, model.config.code_dim_per_level))
    logger.info(f"{output_dir}: {model.config.summary()}, of {dims} dimensions.")
