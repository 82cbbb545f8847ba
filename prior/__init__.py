"""Stage 2: a distribution over grids of codes. It sees integers only, never an image."""

import importlib
from typing import TYPE_CHECKING, Any

from prior.config import (
    PixelSNAILConfig,
    PixelSNAILPriorConfig,
    PriorConfig,
    TrainPriorConfig,
    TransformerConfig,
    TransformerPriorConfig,
)

if TYPE_CHECKING:
    from prior.base import Prior as Prior
    from prior.manifest import CodeDataset as CodeDataset
    from prior.manifest import Manifest as Manifest
    from prior.pixelsnail import PixelSNAIL as PixelSNAIL
    from prior.registry import load_prior as load_prior
    from prior.registry import make_prior as make_prior
    from prior.sampling import Known as Known
    from prior.sampling import SamplingConfig as SamplingConfig
    from prior.transformer import TransformerPrior as TransformerPrior

# Torch is loaded when one of these is first used, not when the command line parses its arguments.
_LAZY = {
    "Prior": "prior.base",
    "CodeDataset": "prior.manifest",
    "Manifest": "prior.manifest",
    "PixelSNAIL": "prior.pixelsnail",
    "load_prior": "prior.registry",
    "make_prior": "prior.registry",
    "Known": "prior.sampling",
    "SamplingConfig": "prior.sampling",
    "TransformerPrior": "prior.transformer",
}
__all__ = [  # noqa: PLE0604
    "PixelSNAILConfig",
    "PixelSNAILPriorConfig",
    "PriorConfig",
    "TrainPriorConfig",
    "TransformerConfig",
    "TransformerPriorConfig",
    *_LAZY,
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_LAZY[name]), name)
