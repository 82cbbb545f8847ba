"""To be removed: import it from `vqvae2.common.loading`."""

from vqvae2.common.loading import ordered

__all__ = ["ordered"]
