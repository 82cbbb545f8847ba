"""The rules of the house, read off the imports: who may know whom, and that help needs no torch."""

import ast
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipelines.cli import COMMANDS
from tests.conftest import ROOT

ALLOWED = {  # a package -> what of ours it may import
    "vqvae2.common": ("vqvae2.common",),
    "vqvae2": ("vqvae2",),
    "prior": ("prior", "vqvae2.common"),
    "pipelines": ("pipelines", "prior", "vqvae2"),
    "scripts": ("pipelines", "prior", "vqvae2"),
}
OURS = ("vqvae2", "prior", "pipelines", "scripts", "tests", "benchmarks")


def imports_of(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield node.module or ""


def within(module: str, package: str) -> bool:
    return module == package or module.startswith(f"{package}.")


@pytest.mark.parametrize(
    "path",
    [
        p
        for name in ("vqvae2", "prior", "pipelines", "scripts")
        for p in sorted((ROOT / name).rglob("*.py"))
    ],
    ids=str,
)
def test_imports_go_one_way(path: Path) -> None:
    module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
    package = next(name for name in ALLOWED if within(module, name))
    for imported in imports_of(path):
        if any(within(imported, ours) for ours in OURS):
            assert any(within(imported, allowed) for allowed in ALLOWED[package]), (
                f"{module} imports {imported}"
            )


def test_every_subcommand_for_several_processes_has_its_script() -> None:
    """`python scripts/x.py` puts scripts/ first on the path: a script must not bear the name of a module that Python itself imports."""
    assert not {path.stem for path in (ROOT / "scripts").glob("*.py")} & set(
        sys.stdlib_module_names
    )
    for command in set(COMMANDS) - {
        "demo",
        "inspect",
        "doctor",
        "import-weights",
        "plan",
        "codes info",
        "codes view",
        "codes verify",
        "import-codes",
        "completion",
    }:
        assert (
            f'run_script("{command}")'
            in (ROOT / "scripts" / f"{command.replace('-', '_')}.py").read_text()
        )


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_teaches_without_torch(command: str) -> None:
    program = "import sys; from pipelines.cli import main\ntry: main(sys.argv[1:])\nexcept SystemExit: pass\nassert 'torch' not in sys.modules; print('no torch')"
    started = time.perf_counter()
    result = subprocess.run(
        [sys.executable, "-c", program, *command.split(), "--help"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert result.stdout.endswith("no torch\n")
    assert "--config" in result.stdout
    assert "Example: vqvae2" in result.stdout or command in ("", "demo")
    assert (
        time.perf_counter() - started < 5
    )  # half a second when the machine is idle; a torch import would take longer still
