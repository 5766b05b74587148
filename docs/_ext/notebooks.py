"""Copies the notebooks of `notebooks/` into `docs/tutorials/` before a build.

Sphinx reads pages below `docs/` only. In the copies, links to `../docs/PAGE` become `../PAGE`.
"""

import json
import pathlib


def page(text):
  """The text of a notebook as a page of the site."""
  notebook = json.loads(text.replace('(../docs/', '(../'))
  # Without it lines such as `!pip install` are highlighted as Python, with a warning.
  notebook['metadata'].setdefault('language_info', {})['pygments_lexer'] = 'ipython3'
  return json.dumps(notebook, indent=1)


def copy(app):
  """Copies the notebooks that changed and deletes the copies of those that are gone."""
  docs = pathlib.Path(app.srcdir)
  sources = {path.name: path for path in (docs.parent / 'notebooks').glob('*.ipynb')}
  for path in (docs / 'tutorials').glob('*.ipynb'):
    if path.name not in sources:
      path.unlink()
  for name, source in sources.items():
    text, target = page(source.read_text(encoding='utf-8')), docs / 'tutorials' / name
    if not target.exists() or target.read_text(encoding='utf-8') != text:
      target.write_text(text, encoding='utf-8')


def setup(app):
  """Copies before Sphinx looks for pages."""
  app.connect('builder-inited', copy)
  return {'parallel_read_safe': True, 'parallel_write_safe': True}
