"""`accelerate launch scripts/train_prior.py --flags` is `vqvae2 train-prior --flags` on several processes."""

from pipelines.cli import run_script

if __name__ == "__main__":
    run_script("train-prior")
