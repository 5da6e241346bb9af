"""The site: `make docs` builds it from the pages in this folder, and fails on every broken link."""

from __future__ import annotations

from cdcsync import __version__

project = "cdcsync"
author = "the cdcsync authors"
version = release = __version__

extensions = ["myst_parser"]
source_suffix = {".md": "markdown"}
exclude_patterns = ["_build"]
# Headings can be linked to as on a forge: status.md#how-exact-is-the-lag.
myst_heading_anchors = 4
suppress_warnings = ["myst.header"]

html_theme = "furo"
html_title = f"cdcsync {__version__}"
html_static_path = ["pictures"]
html_show_copyright = False
html_theme_options = {
    "light_css_variables": {"color-brand-primary": "#0f766e", "color-brand-content": "#0f766e"},
    "dark_css_variables": {"color-brand-primary": "#4fc3b5", "color-brand-content": "#4fc3b5"},
}
