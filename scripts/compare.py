"""`accelerate launch scripts/compare.py` is `vqvae2 compare` on several processes."""

from pipelines.cli import run_script

if __name__ == "__main__":
    run_script("compare")
