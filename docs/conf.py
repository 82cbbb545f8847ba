"""How Sphinx builds the site: `sphinx-build -W --keep-going -b html docs build/site`."""

import re
import sys
from pathlib import Path
from typing import Any

from docutils import nodes
from latex2mathml.converter import convert
from sphinx.util import logging

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]
from docstrings import as_rst  # noqa: E402
from flags import all_commands  # noqa: E402

project = "vqvae2"
copyright = "the vqvae2 authors, Apache-2.0"  # noqa: A001
html_title = "vqvae2"
smartquotes = False  # commands in running text keep their dashes
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
exclude_patterns = ["**.ipynb"]  # the notebook repeats a page

# Pages: Markdown with $formulas$ and definition lists.
myst_enable_extensions = ["dollarmath", "amsmath", "deflist", "attrs_inline"]
myst_heading_anchors = 4
myst_dmath_double_inline = True

# API: single backticks are code; members in the order of the source.
default_role = "code"
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_default_options = {"members": True, "show-inheritance": True}
autodoc_class_signature = "mixed"
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 80
napoleon_use_rtype = False
add_module_names = False

html_theme = "furo"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_math_renderer = "mathml"
html_copy_source = False
html_show_sphinx = False

log = logging.getLogger(__name__)
TO_CODE = re.compile(r"\[`?([^\]`]+)`?\]\(\.\./([\w/]+)\.py\)")
MODULES = re.compile(r"^% modules ([\w.]+):(.*)$", re.MULTILINE)


def complete(app: Any, page: str, source: list[str]) -> None:
    """Fill in what is generated: all flags, all modules, and links from code files to the API."""
    if page == "configuration":
        source[0] += all_commands()
    source[0] = MODULES.sub(lambda line: sections(line[1], line[2].split()), source[0])
    source[0] = TO_CODE.sub(
        lambda link: f"{{py:mod}}`{link[1]} <{link[2].replace('/', '.')}>`", source[0]
    )


def sections(package: str, first: list[str]) -> str:
    """A section for every module of a package: those named first, then the others by name."""
    folder = HERE.parent / package.replace(".", "/")
    names = sorted(path.stem for path in folder.glob("*.py") if not path.stem.startswith("_"))
    missing = set(first) - set(names)
    if missing:
        log.warning("%s has no module %s", package, ", ".join(sorted(missing)))
    text = ""
    for name in dict.fromkeys([*first, *names]):
        module = f"{package}.{name}"
        text += f"\n## `{module}`\n\n```{{eval-rst}}\n.. automodule:: {module}\n```\n"
    return text


def clean_docstring(
    app: Any, what: str, name: str, thing: Any, options: Any, lines: list[str]
) -> None:
    """Docstrings are prose with formulas in it; make them valid reStructuredText."""
    lines[:] = as_rst(lines)
    if what in ("attribute", "data", "property"):
        # An empty comment first, or Napoleon takes words before a colon for a type.
        lines[:0] = ["..", ""]


def draw_formula(translator: Any, node: Any) -> None:
    """A formula as MathML, which browsers draw without any script."""
    block = node.tagname == "math_block"
    tex = node.astext().replace(r"\arg", r"\operatorname{arg}")
    html = convert(tex, display="block" if block else "inline")
    # Without this the bar before a power hangs lower than the other.
    html = html.replace("<mo>&#x02016;</mo>", '<mo stretchy="false">&#x02016;</mo>')
    if "\\" in html:
        log.warning("unknown command in the formula %r", tex, location=node)
    if block:
        translator.body.append(f'<div class="math">{html}</div>')
    else:
        translator.body.append(f'<span class="math">{html}</span>')
    raise nodes.SkipNode


def setup(app: Any) -> None:
    """Called by Sphinx."""
    app.connect("source-read", complete)
    # Before Napoleon (priority 500) reads the sections.
    app.connect("autodoc-process-docstring", clean_docstring, priority=400)
    app.add_html_math_renderer("mathml", (draw_formula, None), (draw_formula, None))
