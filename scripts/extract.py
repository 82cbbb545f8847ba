"""`accelerate launch scripts/extract.py` is `vqvae2 extract` on several processes."""

from pipelines.cli import run_script

if __name__ == "__main__":
    run_script("extract")
