"""Sphinx's settings for the reference, which is made of the docstrings: `sphinx-build -W examples/reference OUTPUT`."""

from inductor_x86q.version import __version__

project = "inductor_x86q"
release = __version__
extensions = ["sphinx.ext.autodoc", "sphinx.ext.napoleon"]
default_role = "py:obj"  # `name` in a docstring is a link where there is such a name
highlight_language = "python"
autodoc_member_order = "bysource"
python_maximum_signature_line_length = 88
html_theme_options = {"description": "int8 for torch.compile on x86 CPUs", "page_width": "1160px"}
html_sidebars = {"**": ["about.html", "searchfield.html", "localtoc.html"]}
html_show_copyright = False
smartquotes = False  # what stands in quotes is to be copied
html_copy_source = False
