"""`accelerate launch scripts/assemble.py --flags` is `vqvae2 assemble --flags` on several processes."""

from pipelines.cli import run_script

if __name__ == "__main__":
    run_script("assemble")
