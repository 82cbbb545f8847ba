"""`accelerate launch scripts/sample.py --flags` is `vqvae2 sample --flags` on several processes."""

from pipelines.cli import run_script

if __name__ == "__main__":
    run_script("sample")
