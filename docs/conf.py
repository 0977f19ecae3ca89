"""Settings of the documentation site, which `make docs` builds."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import generate  # noqa: E402

import ties_peft  # noqa: E402

if TYPE_CHECKING:
    from sphinx.application import Sphinx

project = "ties_peft"
release = version = ties_peft.__version__
copyright = "the authors of ties_peft"
extensions = ["myst_parser", "sphinx.ext.autodoc"]
myst_heading_anchors = 3
html_theme = "furo"
html_title = f"ties_peft {release}"
autodoc_member_order = "bysource"
exclude_patterns = ["_build"]
generate.write(HERE / "generated")


def _link_readmes_as_files(app: Sphinx, name: str, source: list[str]) -> None:
    """Link READMEs outside of this folder as files, since the site has no pages of them."""
    source[0] = re.sub(r"\]\((\.\./[^)]*README\.md)\)", r"](path:\1)", source[0])


def _show_docstring_as_text(app: Sphinx, what: str, name: str, obj: object, options: object, lines: list[str]) -> None:
    """Keep the layout of a docstring, whose formulas and lists are plain text and not reStructuredText."""
    lines[:] = [".. code-block:: text", "", *(f"   {line}" for line in lines), ""] if any(lines) else []


def setup(app: Sphinx) -> None:
    """Connect the above to Sphinx."""
    app.connect("autodoc-process-docstring", _show_docstring_as_text)
    app.connect("source-read", _link_readmes_as_files)
