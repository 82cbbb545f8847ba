"""The documentation: its Python runs, its flags exist, and the reference leaves nothing out.

Building the site is a step of its own in .ci/run.
"""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from docs.docstrings import as_rst
from docs.flags import all_commands, describe, docstrings, groups
from pipelines.cli import COMMANDS, PLANNED, flag_names, parse, split_command
from tests.conftest import ROOT, command
from vqvae2 import quantizers
from vqvae2.config import TrainVQVAEConfig

DOCS = ROOT / "docs"
PAGES = [*DOCS.glob("*.md"), *DOCS.glob("api/*.md"), *ROOT.glob("*.md")]
OTHERS_FLAGS = {"--cpu", "--num_processes", "--signal", "--version"}  # launchers', and vqvae2's own


def run_python_of(page: str) -> int:
    """Run the page's Python blocks in order, in one namespace; return how many there are."""
    text = (DOCS / page).read_text()
    blocks = list(re.finditer(r"```python\n(.*?)```", text, re.DOTALL))
    namespace: dict[str, object] = {}
    for block in blocks:
        # Empty lines above, so that an error names the page's own line.
        above = "\n" * (text[: block.start()].count("\n") + 1)
        exec(compile(above + block[1], str(DOCS / page), "exec"), namespace)
    return len(blocks)


@pytest.fixture
def in_run(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A working directory in which runs/x has every stage."""
    monkeypatch.chdir(tmp_path)
    Path("runs").symlink_to(run.parent)


@pytest.mark.usefixtures("in_run")
def test_the_file_formats_page_reads_what_the_commands_write(photos: Path) -> None:
    image = ("--image.size", 16, "--image.channels", 1)
    command("prepare", "--data.path", photos, *image, "--output-dir", "prepared")
    sample = ("sample", "--pipeline", "runs/x/pipeline", "--num-images", 4)
    command(*sample, "--output-dir", "out/samples")
    assert run_python_of("file-formats.md") >= 6


@pytest.mark.usefixtures("in_run")
@pytest.mark.parametrize(
    "page", ["getting-started.md", "sampling.md", "codes.md", "compression.md", "scoring.md"]
)
def test_the_guides_python_runs(page: str) -> None:
    assert run_python_of(page) >= 1


def test_all_that_can_be_done_from_python_runs(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("photos").symlink_to(photos)
    assert run_python_of("from-python.md") >= 8


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
    in_the_introduction = {"--config", "--quiet", "--verbose", "--help"}
    assert set(flag_names(name)) - in_the_introduction == named
    for flag in flags:
        assert f"`{flag.name}`" in text
        assert all((flag.meaning, flag.type, flag.default)), flag.name
    assert (config.__doc__ or "").splitlines()[0] in text


def test_the_reference_takes_meanings_and_defaults_from_the_nearest_class() -> None:
    inherited = docstrings(TrainVQVAEConfig)["seed"]
    assert inherited.startswith("Seed of the initial weights")
    flags = {flag.name: flag for flag in next(groups(TrainVQVAEConfig)).flags}
    default = TrainVQVAEConfig.__dataclass_fields__["learning_rate"].default
    assert flags["--learning-rate"].default == f"default `{default}`"
    assert all(f"## vqvae2 {name}\n" in all_commands() for name in COMMANDS)


def test_docstrings_become_restructured_text_that_says_the_same() -> None:
    written = r"""
argmin |z - e_k|^2, names_, *so*, B*h*w and `a * b`

    a <- 2 * b

Args:
    x: |z| * 2
after"""
    expected = r"""
argmin \|z - e_k\|^2, names\_, *so*, B\*h\*w and `a * b`

::

    a <- 2 * b

Args:
    x: \|z\| \* 2
after"""
    assert as_rst(written.splitlines()) == expected.splitlines()


def test_links_between_the_pages_lead_somewhere() -> None:
    links = []
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#:\s]+)(?:#[^)]*)?\)", page.read_text()):
            links.append((page, target))
    assert len(links) > 10
    for page, target in links:
        assert (page.parent / target).exists(), f"{page.name} links to {target}"


def commands_on(page: Path) -> Iterator[list[str]]:
    """The words behind `vqvae2`, `-m pipelines.cli` or `scripts/x.py` of every command line."""
    text = page.read_text().replace("\\\n", " ")
    launched = r"(?:accelerate launch .*|\$LAUNCH |python )?"
    begins = rf"^ *{launched}(vqvae2|-m pipelines\.cli|scripts/\w+\.py) (.+)$"
    for begin, rest in re.findall(begins, text, re.MULTILINE):
        words = shlex.split(rest, comments=True)
        if begin.startswith("scripts/"):
            words.insert(0, Path(begin).stem.replace("_", "-"))
        yield ["tiny" if word == "RECIPE" else "9" if word == "N" else word for word in words]


def test_every_command_on_the_pages_can_be_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A shell's line continuations, dashes and comments included; and planned, where it trains."""
    # An earlier command writes this recipe.
    monkeypatch.chdir(tmp_path)
    recipe = Path("runs/z/imported/finetune.yaml")
    recipe.parent.mkdir(parents=True)
    recipe.write_text("train: {learning_rate: 0.0001}")
    number = 0
    for page in PAGES:
        if page.name != "CHANGELOG.md":  # it names flags of the past
            for words in commands_on(page):
                parse(*split_command(words))
                if words[0] in PLANNED:
                    parse(*split_command(["plan", *words]))
                number += 1
    assert number > 40


def test_the_pages_name_flags_that_exist() -> None:
    every_flag = OTHERS_FLAGS.union(*map(flag_names, COMMANDS))
    for page in PAGES:
        if page.name == "CHANGELOG.md":  # it names flags of the past
            continue
        text = page.read_text().replace("\\\n", " ")
        for flag in re.findall(r"`(--[a-z][\w.-]*)[^`]*`", text):
            # `--image.*` stands for all flags that begin so.
            named = [known for known in every_flag if known.startswith(flag)]
            assert flag in named or (flag.endswith(".") and named), f"{page.name}: {flag}"
        for flag in re.findall(r"`--([a-z][\w.-]*) (?:True|False)`", text):
            is_switch = any(known == f"--no-{flag}" for known in every_flag)
            assert not is_switch, f"{page.name}: --{flag} takes no value"


def test_the_pages_are_wrapped_at_100_columns() -> None:
    for page in PAGES:
        for number, line in enumerate(page.read_text().splitlines(), 1):
            unbreakable = line.lstrip().startswith(("|", "![")) or "](" in line
            assert len(line) <= 100 or unbreakable, f"{page.name}:{number}"
