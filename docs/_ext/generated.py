"""Replaces the line `<!-- generated -->` of a page by text that is made from the code."""

import re

import config_reference

from rlhf_jax.evaluation import glossary

MARK = '<!-- generated -->'


def metrics():
  """The glossary of metrics as Markdown."""
  lines = []
  for title, group in glossary.GROUPS.items():
    lines += [f'## {title}', '']
    for metric in group:
      lines += [f'({metric.anchor})=', f'### `{metric.name}`', '', linked(metric.meaning), '']
      if metric.formula:
        lines += ['$$', metric.formula, '$$', '']
      lines += [f'*Unit:* {linked(metric.unit)}.', '']
      if metric.worry:
        lines += [f'*When to worry:* {linked(metric.worry)}', '']
  return '\n'.join(lines)


def linked(text):
  """A text in which the names of metrics link to their entries."""

  def link(found):
    metric = glossary.find(found.group(1))
    return f'[{found.group()}](#{metric.anchor})' if metric else found.group()

  return re.sub(r'`([^`]+)`', link, text)


PAGES = {'config': config_reference.page, 'metrics': metrics}


def fill(app, page, source):
  """Fills in a page when Sphinx has read it."""
  if page in PAGES:
    source[0] = source[0].replace(MARK, PAGES[page]())


def setup(app):
  """Hooks into the reading of pages."""
  app.connect('source-read', fill)
  return {'parallel_read_safe': True, 'parallel_write_safe': True}
