"""`vqvae2 import-weights`: a model folder of another implementation's checkpoint."""

from pathlib import Path

from pipelines.config import ImportWeightsConfig
from pipelines.importers.rosinality_weights import import_weights as import_rosinality
from prior.shards import file_hash
from vqvae2.common.files import check_empty
from vqvae2.common.runs import RunRecord


def import_weights(config: ImportWeightsConfig) -> None:
    """Write the model folder of another implementation's checkpoint, and say what was found."""
    check_empty(Path(config.output_dir), "run")
    model = import_rosinality(Path(config.checkpoint), config.size)
    RunRecord(
        "import-weights",
        config,
        "import_config.yaml",
        notes={"checkpoint_sha256": file_hash(Path(config.checkpoint))},
    ).write(Path(config.output_dir))
    model.save_pretrained(config.output_dir)
    found = model.config
    levels = [
        f"{k} codes of {d} dimensions"
        for k, d in zip(found.codebook_size_per_level, found.code_dim_per_level, strict=True)
    ]
    print(
        f"{config.output_dir}: two levels ({', '.join(levels)}, top first), {found.image.channels} channels, {found.num_residual_blocks} residual "
        f"blocks of {found.residual_channels} in {found.hidden_channels} channels; for images of {' x '.join(map(str, found.image.height_width))} pixels."
    )
