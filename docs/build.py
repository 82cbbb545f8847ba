"""Run docs/understanding.md: its code top to bottom, its figures, and the page as a notebook.

    python docs/build.py                # needs pip install -e ".[docs]"

Run it in the checkout's root. It uses the model of a finished runs/demo, or trains a tiny one.
`--notebook-only` runs nothing and writes the notebook.
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
    # The same drawing gives the same file: no date in the figures, and no random names.
    os.environ.setdefault("SOURCE_DATE_EPOCH", "0")
    import matplotlib.pyplot as plt

    plt.rcParams["svg.hashsalt"] = "understanding"
    namespace: dict[str, object] = {"__name__": "understanding"}
    for match in BLOCK.finditer(page):
        line = page[: match.start(1)].count("\n")  # so that an error names the page's own line
        exec(compile("\n" * line + match.group(1), str(PAGE), "exec"), namespace)
        plt.close("all")


def notebook(page: str) -> str:
    """The page as a notebook (nbformat 4.5): text and code cells in turns."""
    cells: list[dict[str, object]] = []
    for i, content in enumerate(BLOCK.split(page)):
        lines = content.strip("\n").splitlines(keepends=True)
        if not lines:
            continue
        cell: dict[str, object] = {"id": f"cell-{i:03d}", "metadata": {}, "source": lines}
        if i % 2:
            cell = {"cell_type": "code", "execution_count": None, "outputs": [], **cell}
        else:
            cell = {"cell_type": "markdown", **cell}
        cells.append(cell)
    metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    document = {"cells": cells, "metadata": metadata, "nbformat": 4, "nbformat_minor": 5}
    return json.dumps(document, indent=1, ensure_ascii=False) + "\n"


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
