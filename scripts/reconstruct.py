"""`accelerate launch scripts/reconstruct.py` is `vqvae2 reconstruct` on several processes."""

from pipelines.cli import run_script

if __name__ == "__main__":
    run_script("reconstruct")
