"""Configures Sphinx for the documentation site; `make docs` builds it.

A build fetches nothing and runs no notebook.
"""

import pathlib
import sys

DOCS = pathlib.Path(__file__).resolve().parent
ROOT = DOCS.parent
sys.path[:0] = [str(ROOT), str(DOCS / '_ext')]

project = 'rlhf_jax'
author = 'The rlhf_jax authors'
copyright = author

extensions = [
  'myst_nb',
  'docstrings',
  'generated',
  'mathml',
  'notebooks',
  'sphinx.ext.autodoc',
  'sphinx.ext.napoleon',
  'sphinx_copybutton',
]
exclude_patterns = ['_build', '_ext']

html_theme = 'sphinx_book_theme'
html_title = 'rlhf_jax'
html_show_sphinx = False
html_show_copyright = False
html_theme_options = {
  'footer_content_items': [],
  'navbar_persistent': [],  # the sidebar has the search field
}
html_math_renderer = 'mathml'
html_static_path = ['_static']
html_css_files = ['site.css']

# Notebooks are committed with their outputs; the tests execute them.
nb_execution_mode = 'off'
myst_enable_extensions = ['amsmath', 'colon_fence', 'deflist', 'dollarmath']
myst_heading_anchors = 4

# Quotes in texts are often code, such as 'adam'.
smartquotes = False

# Docstrings write code as `name`.
default_role = 'code'
autodoc_default_options = {'members': True, 'member-order': 'bysource'}
autodoc_typehints_format = 'short'
python_maximum_signature_line_length = 90
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_use_rtype = False
copybutton_prompt_text = r'>>> |\.\.\. |\$ '
copybutton_prompt_is_regexp = True
