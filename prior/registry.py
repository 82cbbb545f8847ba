"""The families of priors: how each is made from a configuration, and loaded from a folder."""

from pathlib import Path

from prior.base import Prior
from prior.config import PriorConfig
from prior.pixelsnail import PixelSNAIL
from prior.transformer import TransformerPrior
from vqvae2.common.artifact import CONFIG_NAME, local_folder
from vqvae2.common.errors import UserError
from vqvae2.common.files import read_json

FAMILIES: tuple[type[Prior], ...] = (TransformerPrior, PixelSNAIL)


def make_prior(config: PriorConfig) -> Prior:
    """The prior that a configuration describes, with fresh weights."""
    (family,) = (family for family in FAMILIES if family.config_class is type(config))
    return family(config)


def load_prior(name: str | Path, *, revision: str | None = None) -> Prior:
    """Load a prior of any family from a local folder or the Hub, in evaluation mode on the CPU.
    Raises as `Artifact.from_pretrained`, and a `UserError` if the folder holds no prior."""
    folder = local_folder(name, revision=revision)
    architecture = read_json(folder / CONFIG_NAME).get("architecture")
    for family in FAMILIES:
        if family.__name__ == architecture:
            return family.from_pretrained(folder)
    names = " or ".join(family.__name__ for family in FAMILIES)
    seen = f"{folder} holds a model of kind {architecture!r}"
    raise UserError(f"{seen}, but a prior ({names}) was expected: check the path.")
