"""`vqvae2 train-prior`: stage 2, with pictures of samples."""

from pipelines.config import TrainPriorCommandConfig
from pipelines.pictures import make_sample_drawer
from prior.training import train_prior as train_prior_alone


def train_prior(config: TrainPriorCommandConfig) -> None:
    """Train a level's prior, with pictures of samples if the autoencoder is given."""
    draw = make_sample_drawer(config, config.vqvae) if config.vqvae else None
    train_prior_alone(config, draw=draw)
