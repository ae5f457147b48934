"""Sphinx settings; `make docs` builds the pages with warnings as errors and without a network."""

from __future__ import annotations

import dataclasses
import inspect
import sys
from typing import Any

from docutils.nodes import Element
from sphinx.addnodes import pending_xref
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.pycode import ModuleAnalyzer

import moe_lora

project = "moe_lora"
author = "The moe_lora authors"
copyright = author
release = version = moe_lora.__version__

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]

html_theme = "furo"
html_title = f"moe_lora {release}"
html_static_path = ["_static"]
html_css_files = ["print.css"]

myst_heading_anchors = 3
nb_execution_mode = "off"  # notebooks are committed with their outputs

# The docstrings write code in single backticks; what names a documented object becomes a link.
default_role = "py:obj"
add_module_names = False
autodoc_inherit_docstrings = False
autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_use_rtype = False
napoleon_custom_sections = ["Source", "Class attributes"]


def describe_fields(
    app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]
) -> None:
    """Write the help texts of a dataclass's fields, where it has them, as its arguments."""
    if what != "class" or not dataclasses.is_dataclass(obj):
        return
    helps = {f.name: f.metadata["help"] for f in dataclasses.fields(obj) if "help" in f.metadata}
    own = [
        f"    {field}: {text}"
        for field, text in helps.items()
        if field in vars(obj)["__annotations__"]
    ]
    if own:
        start = lines.index("Raises:") if "Raises:" in lines else len(lines)
        lines[start:start] = ["Args:", *own, ""]


def show_constructor(
    app: Sphinx, what: str, name: str, obj: Any, options: Any, signature: str, returns: str
) -> tuple[str, str] | None:
    """Show a router's `__init__`, not the `__new__` that notes its arguments."""
    if what != "class" or not issubclass(obj, moe_lora.Router):
        return None
    parameters = list(inspect.signature(obj.__init__).parameters.values())[1:]
    bare = [p.replace(annotation=inspect.Parameter.empty) for p in parameters]
    return str(inspect.Signature(bare)), returns


def describe_data(
    app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]
) -> None:
    """Write the docstring of a value that a package imports from one of its modules."""
    if what != "data":
        return
    package, _, attribute = name.rpartition(".")
    for module in [m for m in sys.modules if m.startswith(f"{package}.")]:
        documented = ModuleAnalyzer.for_module(module).find_attr_docs()
        if getattr(sys.modules[module], attribute, None) is obj and ("", attribute) in documented:
            lines[:] = documented["", attribute]


def link_top_names(
    app: Sphinx, env: BuildEnvironment, node: pending_xref, content: Element
) -> Element | None:
    """Link `moe_lora.route` to its entry, which is `moe_lora.routing.route`."""
    package, _, name = str(node.get("reftarget", "")).rpartition(".")
    if package != "moe_lora" or name not in moe_lora.__all__:
        return None
    python = env.domains["py"]
    homes = [full for full in python.objects if full.split(".")[2:] == [name]]
    if len(homes) != 1:
        return None
    document = node["refdoc"]
    return python.resolve_xref(env, document, app.builder, "obj", homes[0], node, content)


def setup(app: Sphinx) -> None:
    """Connect the handlers; those of docstrings before napoleon reads the lines."""
    app.connect("autodoc-process-docstring", describe_fields, priority=100)
    app.connect("autodoc-process-docstring", describe_data, priority=100)
    app.connect("autodoc-process-signature", show_constructor)
    app.connect("missing-reference", link_top_names)
