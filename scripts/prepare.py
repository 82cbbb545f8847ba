"""`accelerate launch scripts/prepare.py --flags` is `vqvae2 prepare --flags` on several processes."""

from pipelines.cli import run_script

if __name__ == "__main__":
    run_script("prepare")
