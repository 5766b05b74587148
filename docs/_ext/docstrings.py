"""Lets docstrings be plain text in the API reference.

reStructuredText gives `*` and `|` a meaning, so a formula such as |a - b| * c would be an error.
They are escaped here, except in backticks. An indented paragraph between the summary and the
sections, such as a formula or a table, is shown as a literal block.
"""

import re

from sphinx.domains.python import PyObject

SECTION = re.compile(r'(Args|Arguments|Attributes|Raises|Returns|Yields):$')


def plain(lines):
  """The lines of a docstring as reStructuredText, with its sections left for napoleon."""
  end = next((i for i, line in enumerate(lines) if SECTION.match(line)), len(lines))
  described = []
  for block, literal in blocks(lines[:end]):
    described += ['', '.. code-block:: none', '', *block, ''] if literal else escape(block)
  return described + escape(lines[end:])


def blocks(lines):
  """Splits lines into runs: (lines, whether they are an indented paragraph).

  An indented paragraph follows a blank line and is indented by two or more.
  """
  runs = []
  for i, line in enumerate(lines):
    literal = bool(runs) and runs[-1][1]
    if line.strip():
      starts = line.startswith('  ') and not lines[i - 1].strip()
      literal = line.startswith('  ') if literal else starts
    if not runs or runs[-1][1] != literal:
      runs.append(([], literal))
    runs[-1][0].append(line)
  return runs


def escape(lines):
  """The lines with `*` and `|` escaped where they are not in backticks."""
  pattern = re.compile(r'(`[^`]*`)|([*|])')
  text = pattern.sub(lambda found: found.group(1) or '\\' + found.group(2), '\n'.join(lines))
  return text.split('\n') if lines else []


def process(app, what, name, subject, options, lines):
  """Rewrites a docstring before napoleon reads it."""
  lines[:] = plain(lines)


def restore(app, what, name, subject, options, lines):
  """Undoes that napoleon takes the text before the first colon of a property for its type."""
  found = next((line for line in lines if line.startswith(':type: ')), None)
  if what in ('attribute', 'property') and found:
    lines.remove(found)
    lines[0] = f'{found.removeprefix(":type: ")}: {lines[0]}'


def skip(app, what, name, subject, skipped, options):
  """Leaves out what every named tuple or dataclass of arrays has: fields, and `replace`."""
  field = type(subject).__name__ == '_tuplegetter'
  return True if field or (what == 'class' and name == 'replace') else None


def annotate(app, what, name, subject, options, signature, returned):
  """Writes the types of arrays in a signature as the source does."""
  return source_types(signature), source_types(returned)


def source_types(text):
  """A signature, or None, with `Float[Array, 'B R']` and `Num[ArrayLike, '']` as in the source."""
  if not text:
    return text
  text = re.sub(r'~?\b(?:jax\.)?jaxlib\._jax\.Array\b', 'Array', text.replace('~jaxtyping.', ''))
  array = r"(\w+)\[Array, ('[^']*')\] \| \1\[[~\w.]*ndarray, \2\]"
  scalars = r'(?: \| [~\w.]*(?:number|bool|int|float|complex)\b)+'
  return re.sub(array + scalars, r'\1[ArrayLike, \2]', text)


def setup(app):
  """Hooks into autodoc; napoleon's priority is 500."""
  app.setup_extension('sphinx.ext.autodoc')
  app.connect('autodoc-process-docstring', process, priority=400)
  app.connect('autodoc-process-docstring', restore, priority=600)
  app.connect('autodoc-process-signature', annotate)
  app.connect('autodoc-skip-member', skip)
  for field in PyObject.doc_field_types:  # as the docstrings call them
    field.label = {'variable': 'Attributes', 'parameter': 'Args'}.get(field.name, field.label)
  return {'parallel_read_safe': True, 'parallel_write_safe': True}
