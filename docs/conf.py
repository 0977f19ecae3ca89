"""Settings of the documentation site, which `make docs` builds."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import docstrings  # noqa: E402
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
html_static_path = ["_static"]
html_css_files = ["site.css"]
autodoc_member_order = "bysource"
autodoc_class_signature = "separated"  # the fields of a report are no arguments of a user's
autodoc_typehints_format = "short"
maximum_signature_line_length = 100
exclude_patterns = ["_build"]
generate.write(HERE / "generated")


def _link_readmes_as_files(app: Sphinx, name: str, source: list[str]) -> None:
    """Link READMEs outside of this folder as files, since the site has no pages of them."""
    source[0] = re.sub(r"\]\((\.\./[^)]*README\.md)\)", r"](path:\1)", source[0])


def _read_docstring(app: Sphinx, what: str, name: str, obj: object, options: object, lines: list[str]) -> None:
    """Write a docstring, which is plain text with formulas and lists, as reStructuredText."""
    lines[:] = docstrings.restructured(docstrings.read("\n".join(lines)))


def setup(app: Sphinx) -> None:
    """Connect the above to Sphinx."""
    app.connect("autodoc-process-docstring", _read_docstring)
    app.connect("source-read", _link_readmes_as_files)
