"""Sphinx settings; the sources are written by build.py."""

import sys
from configparser import ConfigParser
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))
from astroid.manager import AstroidManager  # noqa: E402
from pages import docstring_to_rst, foreign_modules  # noqa: E402

settings = ConfigParser(delimiters=["="])
settings.read(HERE.parent / "settings.ini", encoding="utf-8")
settings = settings["DEFAULT"]

project = settings["title"]
author = settings["author"]
copyright = settings["copyright"]
release = settings["version"]

extensions = [
    "myst_nb",
    "autoapi.extension",
    "sphinx.ext.napoleon",
    "sphinx_design",
    "sphinx_copybutton",
]
suppress_warnings = ["myst.header"]
exclude_patterns = ["_build"]

# notebooks are shown with the outputs stored in them
nb_execution_mode = "off"
nb_merge_streams = True
nb_output_stderr = "remove"
nb_code_prompt_show = "Code"
nb_code_prompt_hide = "Code"
myst_enable_extensions = ["amsmath", "attrs_block", "attrs_inline", "colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3

package = HERE.parent / settings["lib_path"]
autoapi_dirs = [str(package)]
AstroidManager().module_denylist.update(foreign_modules(package))  # or the API reference parses half of torch as well
autoapi_ignore = ["*_modidx*", "*/cli.py"]  # the commands are described by --help and on their page
autoapi_root = "api"
autoapi_options = ["members", "undoc-members", "show-inheritance", "show-module-summary"]
autoapi_add_toctree_entry = False
autoapi_python_class_content = "both"

html_theme = "sphinx_book_theme"
html_title = settings["title"]
html_theme_options = {"show_navbar_depth": 1, "navbar_persistent": [], "use_download_button": False}
html_static_path = ["static", "_generated/static"]
html_css_files = ["site.css"]
html_copy_source = False
mathjax_path = "mathjax.js"


def markdown_docstrings(app, what, name, obj, options, lines):  # noqa: ANN001, ANN201
    "Docstrings are markdown; the API reference reads RST."
    lines[:] = docstring_to_rst(lines)


def setup(app):  # noqa: ANN001, ANN201
    "Connect the docstring filter before napoleon's."
    app.connect("autodoc-process-docstring", markdown_docstrings, priority=1)
