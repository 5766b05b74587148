"""Writes formulas as MathML, which browsers show by themselves: a page needs no script or network.

A formula that docutils cannot translate is a warning, so the build fails.
"""

from docutils import nodes
from docutils.utils.math import MathError
from sphinx.util import logging

from rlhf_jax.evaluation.formulas import mathml as translate

LOGGER = logging.getLogger(__name__)


def write(writer, node, block):
  """Appends a node's formula to the page."""
  try:
    writer.body.append(translate(node.astext(), block=block))
  except MathError as error:
    LOGGER.warning('formula %r: %s', node.astext(), error, location=node)
  raise nodes.SkipNode


def inline(writer, node):
  """Writes a formula within a line."""
  write(writer, node, block=False)


def display(writer, node):
  """Writes a formula on lines of its own; a wide one scrolls."""
  writer.body.append('<div class="formula">')
  try:
    write(writer, node, block=True)
  finally:
    writer.body.append('</div>\n')


def setup(app):
  """Adds the renderer 'mathml'."""
  app.add_html_math_renderer('mathml', (inline, None), (display, None))
  return {'parallel_read_safe': True, 'parallel_write_safe': True}
