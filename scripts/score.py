"""`accelerate launch scripts/score.py` is `vqvae2 score` on several processes."""

from pipelines.cli import run_script

if __name__ == "__main__":
    run_script("score")
