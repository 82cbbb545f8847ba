"""The rules of the house, read off the imports: who may know whom; help needs no torch."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipelines.cli import COMMANDS
from tests.conftest import ROOT

ALLOWED = {  # a package -> what of ours it may import; the longest name counts
    "vqvae2.__main__": ("pipelines.cli",),
    "vqvae2.common": ("vqvae2.common",),
    "vqvae2": ("vqvae2",),
    "prior": ("prior", "vqvae2.common"),
    "pipelines": ("pipelines", "prior", "vqvae2"),
    "scripts": ("pipelines", "prior", "vqvae2"),
}
OURS = ("vqvae2", "prior", "pipelines", "scripts", "tests", "benchmarks")
PACKAGES = ("vqvae2", "prior", "pipelines", "scripts")
FILES = [path for name in PACKAGES for path in sorted((ROOT / name).rglob("*.py"))]
WITHOUT_SCRIPT = {"demo", "inspect", "doctor", "plan", "import-weights", "import-codes"}
WITHOUT_SCRIPT |= {"completion", "compress", "decompress"}
RUN_OTHERS = {"run", "compare", "demo"}  # commands that run other commands
HELP = """
import sys
from pipelines.cli import main
try: main(sys.argv[1:])
except SystemExit: pass
assert 'torch' not in sys.modules
print('no torch')
"""


def imports_of(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield node.module or ""


def within(module: str, packages: tuple[str, ...]) -> bool:
    return any(module == name or module.startswith(f"{name}.") for name in packages)


@pytest.mark.parametrize("path", FILES, ids=str)
def test_imports_go_one_way(path: Path) -> None:
    module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
    package = next(name for name in ALLOWED if within(module, (name,)))
    for imported in imports_of(path):
        assert not within(imported, OURS) or within(imported, ALLOWED[package]), (
            f"{module} imports {imported}"
        )


@pytest.mark.parametrize("path", sorted((ROOT / "pipelines").rglob("*.py")), ids=str)
def test_commands_are_known_to_those_alone_that_run_others(path: Path) -> None:
    known = [name for name in imports_of(path) if within(name, ("pipelines.commands",))]
    assert not known or path.stem in RUN_OTHERS, f"{path} imports {known}"


def test_every_subcommand_for_several_processes_has_its_script() -> None:
    for command in COMMANDS:
        if command not in WITHOUT_SCRIPT and not command.startswith("codes "):
            script = ROOT / "scripts" / f"{command.replace('-', '_')}.py"
            assert f'run_script("{command}")' in script.read_text()


def test_no_script_hides_a_module_of_python() -> None:
    """`python scripts/x.py` puts scripts/ first on the path of imports."""
    names = {path.stem for path in (ROOT / "scripts").glob("*.py")}
    assert not names & set(sys.stdlib_module_names)


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_teaches_without_torch(command: str) -> None:
    program = [sys.executable, "-c", HELP, *command.split(), "--help"]
    result = subprocess.run(program, capture_output=True, text=True, check=True)
    assert result.stdout.endswith("no torch\n")
    assert "--config" in result.stdout
    assert "Example: vqvae2" in result.stdout or command in ("", "demo")


def test_python_m_vqvae2_is_the_command() -> None:
    program = [sys.executable, "-m", "vqvae2", "--help"]
    result = subprocess.run(program, capture_output=True, text=True, check=True)
    assert result.stdout.startswith("usage: vqvae2 SUBCOMMAND")


@pytest.mark.parametrize("path", FILES, ids=str)
def test_long_functions_have_a_comment_at_the_head_of_their_paragraphs(path: Path) -> None:
    """A function of more than 25 lines, its docstring aside, says what its parts are for."""
    text = path.read_text()
    lines = text.splitlines()
    for node in ast.walk(ast.parse(text)):
        if not isinstance(node, ast.FunctionDef):
            continue
        body = node.body[1:] if ast.get_docstring(node) else node.body
        if body and body[-1].end_lineno - body[0].lineno >= 25:  # type: ignore[operator]
            code = lines[node.lineno : body[-1].end_lineno]
            comments = [line for line in code if line.strip().startswith("#")]
            assert comments, f"{path}:{node.lineno} {node.name}"
