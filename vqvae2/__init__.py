"""Stage 1 of VQ-VAE-2 (Razavi et al. 2019): images to grids of discrete codes, and back."""

import importlib
from typing import TYPE_CHECKING, Any

from vqvae2.config import PreprocessingConfig, QuantizerConfig, TrainVQVAEConfig, VQVAE2Config

if TYPE_CHECKING:
    from vqvae2.model import VQVAE2 as VQVAE2
    from vqvae2.model import VQVAE2Output as VQVAE2Output
    from vqvae2.quantizers import CosineQuantizer as CosineQuantizer
    from vqvae2.quantizers import EMAQuantizer as EMAQuantizer
    from vqvae2.quantizers import FSQuantizer as FSQuantizer
    from vqvae2.quantizers import GradientQuantizer as GradientQuantizer
    from vqvae2.quantizers import Quantized as Quantized
    from vqvae2.quantizers import Quantizer as Quantizer

# Torch is loaded when one of these is first used, not when the command line reads its arguments.
_IN_MODEL = ["VQVAE2", "VQVAE2Output"]
_IN_QUANTIZERS = ["Quantized", "Quantizer", "EMAQuantizer", "CosineQuantizer", "FSQuantizer"]
_LAZY = dict.fromkeys(_IN_MODEL, "vqvae2.model")
_LAZY |= dict.fromkeys([*_IN_QUANTIZERS, "GradientQuantizer"], "vqvae2.quantizers")
__all__ = ["PreprocessingConfig", "QuantizerConfig", "TrainVQVAEConfig", "VQVAE2Config"]
__all__ += [*_LAZY]  # noqa: PLE0604


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return importlib.import_module("importlib.metadata").version("vqvae2")
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_LAZY[name]), name)
