"""`accelerate launch scripts/train.py` is `vqvae2 train` on several processes."""

from pipelines.cli import run_script

if __name__ == "__main__":
    run_script("train")
