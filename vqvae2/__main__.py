"""`python -m vqvae2` is the command `vqvae2`."""

from pipelines.cli import run_script

if __name__ == "__main__":
    run_script()
