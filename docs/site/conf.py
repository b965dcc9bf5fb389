"""Sphinx configuration: furo, Markdown by MyST, docstrings by autodoc and napoleon.

Formulas are MathML, made at build: the site loads nothing from elsewhere and works without a
server.
"""

from __future__ import annotations

import re

import latex2mathml.converter
from docutils import nodes
from sphinx.util.nodes import make_refnode

import tokenmill

project = "tokenmill"
author = "the authors of tokenmill"
copyright = author
version = release = tokenmill.__version__
html_title = f"tokenmill {release}"

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 6
highlight_language = "text"
autodoc_member_order = "bysource"
autodoc_typehints = "none"  # docstrings state types, shapes and dtypes
maximum_signature_line_length = 90
add_module_names = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False
napoleon_custom_sections = ["Shape"]

html_theme = "furo"
html_static_path = ["static"]
html_css_files = ["site.css"]
html_copy_source = html_show_sourcelink = False
html_theme_options = {"navigation_with_keys": True}
html_math_renderer = "mathml"


def _mathml(node: nodes.Node, display: str) -> str:
    text = node.astext()
    if display == "block" and ("\\\\" in text or "&" in text) and "\\begin" not in text:
        text = rf"\begin{{aligned}}{text}\end{{aligned}}"
    return latex2mathml.converter.convert(text, display=display)


def _inline(self, node: nodes.Node) -> None:
    self.body.append(_mathml(node, "inline"))
    raise nodes.SkipNode


def _block(self, node: nodes.Node) -> None:
    self.body.append(f'<div class="math">{_mathml(node, "block")}</div>')
    raise nodes.SkipNode


def _link_names(app, doctree: nodes.document, page: str) -> None:
    """`attention`, `nn.TokenMerging` and `attention(kind=)` in a text lead to the API."""
    objects = app.env.get_domain("py").objects
    for literal in list(doctree.findall(nodes.literal)):
        name = re.match(r"(?:tokenmill\.|tm\.)?([A-Za-z][\w.]*)(?:\(|$)", literal.astext())
        entry = name and objects.get(f"tokenmill.{name[1]}")
        if not entry or isinstance(literal.parent, nodes.reference) or entry.docname == page:
            continue
        link = make_refnode(app.builder, page, entry.docname, entry.node_id, literal.deepcopy())
        literal.replace_self(link)


def setup(app) -> None:
    app.connect("doctree-resolved", _link_names)
    app.add_html_math_renderer("mathml", (_inline, None), (_block, None))
