"""Sphinx's configuration of the documentation. cattn is imported from where Python finds it."""

import re

from docutils import nodes
from sphinx.ext.autosummary import AutoLink

import cattn

project = "cattn"
author = "the authors of cattn"
version = release = cattn.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.autosummary", "sphinx.ext.napoleon", "sphinx_copybutton"]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = f"cattn {release}"
html_copy_source = False
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True

default_role = "name_or_code"
autosummary_generate = False
# A signature has names and defaults; the types, with their shapes, stand at the parameters.
autodoc_typehints = "none"
autodoc_preserve_defaults = True
autodoc_member_order = "bysource"
# Types are prose ("float array (..., seq, dim)"): as :type: fields each word would be taken for a class.
napoleon_use_param = False
napoleon_use_rtype = False
napoleon_custom_sections = [("Attributes", "params_style"), ("Raises", "params_style")]

myst_heading_anchors = 3
nitpicky = True
nitpick_ignore = [("py:obj", "threadpoolctl.threadpool_limits")]  # of another library: links to those take the network


class NameOrCode(AutoLink):
    """`text` in a docstring: a link where it is a name that can be imported, else code."""

    def run(self):
        (node,), messages = super().run()
        return [nodes.literal(self.rawtext, node.astext()) if isinstance(node, nodes.emphasis) else node], messages


def list_of_shapes(app, what, name, obj, options, lines):
    """Where a docstring of the reference has lines `name : shape` and no sections: as a list."""
    if not name.startswith("cattn.reference.") or "Parameters" in lines:
        return
    in_list = False
    for i, line in enumerate(lines):
        found = re.fullmatch(r"(\w+(?:, \w+)*) : (.*)", line)
        if found:
            lines[i] = f"* {', '.join(f'**{part}**' for part in found[1].split(', '))} -- {found[2]}"
        elif in_list and line:
            lines[i] = f"  {line}"
        in_list = bool(found or (in_list and line))


def without_last_empty_lines(app, document):
    """doctest wants one before the fence that ends a block, a reader does not."""
    for block in document.findall(nodes.literal_block):
        block[:] = [nodes.Text(block.astext().rstrip("\n"))]
        block.rawsource = block.rawsource.rstrip("\n")


def setup(app):
    app.add_role("name_or_code", NameOrCode())
    app.connect("autodoc-process-docstring", list_of_shapes, priority=100)
    app.connect("doctree-read", without_last_empty_lines)
