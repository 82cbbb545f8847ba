"""The two stages joined: extraction, training with pictures, sampling, and the command line."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipelines.pipeline import PipelineOutput as PipelineOutput
    from pipelines.pipeline import VQVAE2Pipeline as VQVAE2Pipeline

__all__ = ["PipelineOutput", "VQVAE2Pipeline"]


def __getattr__(name: str) -> Any:
    """Load torch when a class is first used, not when the command line parses its arguments."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from pipelines import pipeline

    return getattr(pipeline, name)
