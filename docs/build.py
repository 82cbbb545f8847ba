"""Run docs/understanding.md: its code from top to bottom, its figures into docs/figures/, and the same page as a notebook.

    python docs/build.py                # needs pip install -e ".[docs]"; with a finished runs/demo its model is used, else one trained on the spot

Run it in the checkout's root. `--notebook-only` runs nothing and writes the notebook.
"""

import argparse
import json
import os
import re
from pathlib import Path

PAGE = Path(__file__).parent / "understanding.md"
NOTEBOOK = PAGE.with_suffix(".ipynb")
BLOCK = re.compile(r"^```python\n(.*?)^```\n", re.MULTILINE | re.DOTALL)


def code_blocks(page: str) -> list[str]:
    """The page's Python code, block by block."""
    return BLOCK.findall(page)


def run(page: str, figures: Path) -> None:
    """Run the page's code in one namespace, with its assertions; figures go into a folder."""
    os.environ.setdefault("MPLBACKEND", "Agg")
    os.environ["VQVAE2_FIGURES"] = str(figures)
    os.environ.setdefault(
        "SOURCE_DATE_EPOCH", "0"
    )  # no date in the figures: the same drawing gives the same file
    import matplotlib.pyplot as plt

    plt.rcParams["svg.hashsalt"] = "understanding"  # nor random names
    namespace: dict[str, object] = {"__name__": "understanding"}
    for match in BLOCK.finditer(page):
        line = page[: match.start(1)].count("\n")  # so that an error names the page's own line
        exec(compile("\n" * line + match.group(1), str(PAGE), "exec"), namespace)
        plt.close("all")


def notebook(page: str) -> str:
    """The page as a notebook (nbformat 4.5): text and code cells in turns."""
    cells: list[dict[str, object]] = []
    for i, part in enumerate(BLOCK.split(page)):  # text and code in turns
        text = part.strip("\n")
        if not text:
            continue
        common = {"id": f"cell-{i:03d}", "metadata": {}, "source": text.splitlines(keepends=True)}
        cells.append(
            {"cell_type": "code", "execution_count": None, "outputs": [], **common}
            if i % 2
            else {"cell_type": "markdown", **common}
        )
    kernel = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    return (
        json.dumps(
            {"cells": cells, "metadata": kernel, "nbformat": 4, "nbformat_minor": 5},
            indent=1,
            ensure_ascii=False,
        )
        + "\n"
    )


def main() -> None:
    """Regenerate everything."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--notebook-only", action="store_true")
    options = parser.parse_args()
    page = PAGE.read_text()
    if not options.notebook_only:
        run(page, PAGE.parent / "figures")
    NOTEBOOK.write_text(notebook(page))


if __name__ == "__main__":
    main()
