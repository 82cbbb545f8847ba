"""Stage 2: a distribution over grids of codes. It sees codes, labels and condition vectors,
never an image."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from prior.base import Prior
    from prior.config import (
        PixelSNAILConfig,
        PixelSNAILPriorConfig,
        PriorConfig,
        TrainPriorConfig,
        TransformerConfig,
        TransformerPriorConfig,
    )
    from prior.manifest import CodeDataset, Manifest
    from prior.pixelsnail import PixelSNAIL
    from prior.registry import load_prior, make_prior
    from prior.sampling import Known, SamplingConfig
    from prior.transformer import TransformerPrior

# fmt: off
__all__ = [
    "CodeDataset", "Known", "Manifest", "PixelSNAIL", "PixelSNAILConfig", "PixelSNAILPriorConfig",
    "Prior", "PriorConfig", "SamplingConfig", "TrainPriorConfig", "TransformerConfig",
    "TransformerPrior", "TransformerPriorConfig", "load_prior", "make_prior",
]
# fmt: on
_MODULES = ("config", "sampling", "base", "manifest", "pixelsnail", "transformer", "registry")


def __getattr__(name: str) -> Any:
    """Load torch when a name is first used, not when the command line parses its arguments."""
    for module in _MODULES if name in __all__ else ():
        names = vars(importlib.import_module(f"prior.{module}"))
        if name in names:
            return names[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
