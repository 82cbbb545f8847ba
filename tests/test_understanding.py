"""The guide: all of its code runs, its assertions hold, and figures and notebook are the page's."""

import json
import re
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest

from tests.conftest import ROOT

spec = spec_from_file_location("build", ROOT / "docs" / "build.py")
assert spec is not None
assert spec.loader is not None
build = module_from_spec(spec)
spec.loader.exec_module(build)
PAGE = (ROOT / "docs" / "understanding.md").read_text()


def test_all_of_it_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VQVAE2_DEMO", str(tmp_path / "none"))  # a tiny model is trained on the spot
    build.run(PAGE, tmp_path / "figures")
    drawn = {path.name for path in (tmp_path / "figures").iterdir()}
    assert drawn == set(re.findall(r"\]\(figures/([^)]+)\)", PAGE))
    committed = {path.name: path.stat().st_size for path in (ROOT / "docs" / "figures").iterdir()}
    assert set(committed) == drawn
    assert max(committed.values()) < 200_000


def test_a_false_claim_is_found(tmp_path: Path) -> None:
    claim = "assert torch.equal(looked_up, multiplied)"
    assert claim in PAGE
    first = PAGE[: PAGE.index("## 2.")].replace(
        claim, "assert not torch.equal(looked_up, multiplied)"
    )
    with pytest.raises(AssertionError):
        build.run(first, tmp_path)


def test_the_notebook_is_the_page() -> None:
    text = (ROOT / "docs" / "understanding.ipynb").read_text()
    assert text == build.notebook(PAGE), "run python docs/build.py --notebook-only"
    cells = json.loads(text)["cells"]
    assert ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"] == [
        block.strip("\n") for block in build.code_blocks(PAGE)
    ]
    assert sum(len("".join(cell["source"])) for cell in cells) > 0.95 * len(PAGE) - 20 * len(cells)
