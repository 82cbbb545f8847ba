"""`accelerate launch scripts/train_prior.py` is `vqvae2 train-prior` on several processes."""

from pipelines.cli import run_script

if __name__ == "__main__":
    run_script("train-prior")
