"""`accelerate launch scripts/evaluate.py` is `vqvae2 evaluate` on several processes."""

from pipelines.cli import run_script

if __name__ == "__main__":
    run_script("evaluate")
