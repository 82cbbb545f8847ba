"""The subcommand `vqvae2 import-weights` as a file."""

from pipelines.cli import run_script

if __name__ == "__main__":
    run_script("import-weights")
