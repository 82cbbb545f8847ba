"""`accelerate launch scripts/reconstruct.py --flags` is `vqvae2 reconstruct --flags` on several processes."""

from pipelines.cli import run_script

if __name__ == "__main__":
    run_script("reconstruct")
