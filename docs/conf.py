"""How the documentation is built: ``scripts/docs``."""

from __future__ import annotations

import durable_spark

project = "airflow-provider-durable-spark"
author = "The durable-spark developers"
copyright = "the durable-spark developers, Apache License 2.0"
release = version = durable_spark.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinxcontrib.mermaid"]
exclude_patterns = ["_build", "examples"]

myst_enable_extensions = ["attrs_inline", "colon_fence", "deflist"]
myst_fence_as_directive = ["mermaid"]  # plain fences, which code hosts draw, too
myst_heading_anchors = 3
highlight_language = "none"

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_class_signature = "separated"
autodoc_default_options = {"members": True, "show-inheritance": True}

html_theme = "furo"
html_title = "Durable Spark for Airflow"
html_static_path = ["_static"]
html_css_files = ["diagrams.css"]
mermaid_fullscreen = False
mermaid_height = "auto"
