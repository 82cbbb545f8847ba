"""`accelerate launch scripts/inspect.py --flags` is `vqvae2 inspect --flags`."""

from pipelines.cli import run_script

if __name__ == "__main__":
    run_script("inspect")
