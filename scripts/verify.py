"""`accelerate launch scripts/verify.py` is `vqvae2 verify` on several processes."""

from pipelines.cli import run_script

if __name__ == "__main__":
    run_script("verify")
