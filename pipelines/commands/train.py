"""`vqvae2 train`: stage 1, with pictures of reconstructions."""

from pipelines.pictures import make_reconstruction_drawer
from vqvae2.config import TrainVQVAEConfig
from vqvae2.data.arrays import PythonImages
from vqvae2.training import train as train_alone


def train(config: TrainVQVAEConfig, *, images: PythonImages | None = None) -> None:
    """Train the autoencoder, with pictures of reconstructions; see `vqvae2.training.train`."""
    train_alone(config, images=images, make_draw=make_reconstruction_drawer)
