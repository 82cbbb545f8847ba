"""`accelerate launch scripts/sample.py` is `vqvae2 sample` on several processes."""

from pipelines.cli import run_script

if __name__ == "__main__":
    run_script("sample")
