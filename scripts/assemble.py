"""`accelerate launch scripts/assemble.py` is `vqvae2 assemble` on several processes."""

from pipelines.cli import run_script

if __name__ == "__main__":
    run_script("assemble")
