"""The documentation: its Python runs, and the configuration reference leaves nothing out. (Building the site is a step of its own in .ci/run.)"""

import re
from pathlib import Path

import pytest

from docs.docstrings import as_rst
from docs.flags import all_commands, describe, docstrings, groups
from pipelines.cli import COMMANDS, _flags
from tests.conftest import ROOT, command
from vqvae2 import quantizers
from vqvae2.config import TrainVQVAEConfig

DOCS = ROOT / "docs"
OF_OTHERS = {"--cpu", "--num_processes", "--signal"}  # flags of launchers


def run_python_of(page: str) -> int:
    """Run the page's Python blocks in order, in one namespace; how many there are."""
    text = (DOCS / page).read_text()
    blocks = list(re.finditer(r"```python\n(.*?)```", text, re.DOTALL))
    namespace: dict[str, object] = {}
    for block in blocks:
        above = "\n" * (
            text[: block.start()].count("\n") + 1
        )  # so that an error names the page's own line
        exec(compile(above + block[1], str(DOCS / page), "exec"), namespace)
    return len(blocks)


def test_the_file_formats_page_reads_what_the_commands_write(
    run: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("runs").symlink_to(run.parent)
    command(
        "prepare",
        "--data.path",
        photos,
        "--image.size",
        16,
        "--image.channels",
        1,
        "--output-dir",
        "prepared",
    )
    assert run_python_of("file-formats.md") >= 5


def test_the_extending_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(quantizers, "QUANTIZERS", dict(quantizers.QUANTIZERS))  # the page adds one
    assert run_python_of("extending.md") >= 6


@pytest.mark.parametrize("name", COMMANDS)
def test_the_reference_names_every_flag_with_its_meaning(name: str) -> None:
    config = COMMANDS[name][0]
    text = "\n".join(describe(name))
    flags = [flag for group in groups(config) for flag in group.flags]
    named = {part for flag in flags for part in flag.name.split(", ")}
    for flag in _flags(config):
        positional = flag.removeprefix("--").replace("-", "_").upper()
        assert flag in named or positional in named, flag
    for flag in flags:
        assert f"`{flag.name}`" in text
        assert all((flag.meaning, flag.type, flag.default)), flag.name
    assert (config.__doc__ or "").splitlines()[0] in text


def test_the_reference_takes_meanings_and_defaults_from_the_nearest_class() -> None:
    assert docstrings(TrainVQVAEConfig)["seed"].startswith(
        "Seed of the initial weights"
    )  # of the class that it extends
    (rate,) = [
        flag for flag in next(groups(TrainVQVAEConfig)).flags if flag.name == "--learning-rate"
    ]
    assert (
        rate.default
        == f"default `{TrainVQVAEConfig.__dataclass_fields__['learning_rate'].default}`"
    )
    assert all(f"## vqvae2 {name}\n" in all_commands() for name in COMMANDS)


def test_docstrings_become_restructured_text_that_says_the_same() -> None:
    lines = [
        "argmin |z - e_k|^2, names_, *so*, B*h*w and `a * b`",
        "",
        "    a <- 2 * b",
        "",
        "Args:",
        "    x: |z| * 2",
        "after",
    ]
    assert as_rst(lines) == [
        r"argmin \|z - e_k\|^2, names\_, *so*, B\*h\*w and `a * b`", "", "::", "", "    a <- 2 * b", "", "Args:", r"    x: \|z\| \* 2", "after",
    ]  # fmt: skip


def test_links_between_the_pages_lead_somewhere() -> None:
    pages = [*DOCS.glob("*.md"), *DOCS.glob("api/*.md")]
    links = [
        (page, link)
        for page in pages
        for link in re.findall(r"\]\(([^)#:\s]+)(?:#[^)]*)?\)", page.read_text())
    ]
    assert len(links) > 10
    for page, link in links:
        assert (page.parent / link).exists(), f"{page.name} links to {link}"


def test_the_pages_name_flags_that_exist() -> None:
    flags = {
        name: {*_flags(config), "--config", "--help"} for name, (config, _) in COMMANDS.items()
    }
    known = set().union(*flags.values())
    for page in DOCS.glob("*.md"):
        text = page.read_text().replace("\\\n", " ")
        for line in re.findall(r"^vqvae2 (.*?)(?:  #.*)?$", text, re.MULTILINE):
            name = next(
                " ".join(line.split()[:n]) for n in (2, 1) if " ".join(line.split()[:n]) in COMMANDS
            )
            assert set(re.findall(r"(?<=\s)--[\w.-]+", line)) <= flags[name], (
                f"{page.name}: vqvae2 {line}"
            )
        for span in re.findall(r"`(--[a-z][\w.-]*)[^`]*`", text):
            assert span in known | OF_OTHERS, f"{page.name}: {span}"
