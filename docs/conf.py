"""How Sphinx makes the site of these pages: `sphinx-build -W --keep-going -b html docs build/site`."""

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
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
exclude_patterns = ["**.ipynb"]  # a notebook is a page's text once more
suppress_warnings = (
    [] if (HERE / "understanding.md").exists() else ["toc.not_readable"]
)  # the guide is a text of its own

# Pages: Markdown with $formulas$ and terms with their meaning below.
myst_enable_extensions = ["dollarmath", "amsmath", "deflist", "attrs_inline"]
myst_heading_anchors = 4
myst_dmath_double_inline = True

# API: what is between single backticks is code; members in the order in which they are written.
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


def complete(app: Any, page: str, source: list[str]) -> None:
    """The page `configuration` ends with every flag of every command; a link to a file of the code leads to where the API reference speaks of it."""
    if page == "configuration":
        source[0] += all_commands()
    source[0] = TO_CODE.sub(
        lambda link: f"{{py:mod}}`{link[1]} <{link[2].replace('/', '.')}>`", source[0]
    )


def clean_docstring(
    app: Any, what: str, name: str, thing: Any, options: Any, lines: list[str]
) -> None:
    """Docstrings are prose with formulas in it; make it reStructuredText that says the same."""
    lines[:] = as_rst(lines)
    if what in ("attribute", "data", "property"):
        lines[:0] = [
            "..",
            "",
        ]  # an empty comment; else Napoleon takes what stands before a colon in the first line for a type


def draw_formula(translator: Any, node: Any) -> None:
    """A formula as MathML, which browsers draw by themselves: no script, nothing from the network."""
    block = node.tagname == "math_block"
    tex = node.astext()
    html = convert(
        tex.replace(r"\arg", r"\operatorname{arg}"), display="block" if block else "inline"
    )
    html = html.replace(
        "<mo>&#x02016;</mo>", '<mo stretchy="false">&#x02016;</mo>'
    )  # else the bar before a power hangs lower than the other
    if "\\" in html:
        log.warning("the formula %r holds a command that is not known", tex, location=node)
    translator.body.append(
        f'<div class="math">{html}</div>' if block else f'<span class="math">{html}</span>'
    )
    raise nodes.SkipNode


def setup(app: Any) -> None:
    """What Sphinx calls."""
    app.connect("source-read", complete)
    app.connect(
        "autodoc-process-docstring", clean_docstring, priority=400
    )  # before Napoleon reads the sections
    app.add_html_math_renderer("mathml", (draw_formula, None), (draw_formula, None))
