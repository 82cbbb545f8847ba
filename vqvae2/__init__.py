"""Stage 1 of VQ-VAE-2 (Razavi, van den Oord, Vinyals 2019): images to grids of discrete codes, and back."""

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

_LAZY = {  # torch is loaded when one of these is first used, not when the command line parses its arguments
    "VQVAE2": "vqvae2.model",
    "VQVAE2Output": "vqvae2.model",
    "Quantized": "vqvae2.quantizers",
    "Quantizer": "vqvae2.quantizers",
    "EMAQuantizer": "vqvae2.quantizers",
    "CosineQuantizer": "vqvae2.quantizers",
    "FSQuantizer": "vqvae2.quantizers",
    "GradientQuantizer": "vqvae2.quantizers",
}
__all__ = ["PreprocessingConfig", "QuantizerConfig", "TrainVQVAEConfig", "VQVAE2Config", *_LAZY]  # noqa: PLE0604


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_LAZY[name]), name)
