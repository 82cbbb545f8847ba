"""`accelerate launch scripts/prepare.py` is `vqvae2 prepare` on several processes."""

from pipelines.cli import run_script

if __name__ == "__main__":
    run_script("prepare")
