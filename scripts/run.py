"""`accelerate launch scripts/run.py` is `vqvae2 run` on several processes."""

from pipelines.cli import run_script

if __name__ == "__main__":
    run_script("run")
