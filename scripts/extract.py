"""`accelerate launch scripts/extract.py --flags` is `vqvae2 extract --flags` on several processes."""

from pipelines.cli import run_script

if __name__ == "__main__":
    run_script("extract")
