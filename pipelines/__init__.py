"""The two stages joined: extraction, training with pictures, sampling, and the command line."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipelines.pipeline import PipelineOutput as PipelineOutput
    from pipelines.pipeline import VQVAE2Pipeline as VQVAE2Pipeline

_LAZY = {
    "VQVAE2Pipeline": "pipelines.pipeline",
    "PipelineOutput": "pipelines.pipeline",
}  # torch loads when they are first used
__all__ = [*_LAZY]  # noqa: PLE0604


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_LAZY[name]), name)
