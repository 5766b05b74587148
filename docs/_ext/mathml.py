"""Writes formulas as MathML, which browsers show by themselves: a page needs no script or network.

A formula that docutils cannot translate is a warning, so the build fails.
"""

import re

from docutils import nodes
from docutils.utils.math import latex2mathml
from docutils.utils.math import MathError
from sphinx.util import logging

LOGGER = logging.getLogger(__name__)


def translate(formula, block):
  """MathML of a LaTeX formula.

  Args:
    formula: LaTeX without its dollars.
    block: whether it stands on lines of its own.

  Raises:
    MathError: it has a command that docutils does not know.
  """
  formula = re.sub(r'\\[bB]igg?[lmr]?(?![a-zA-Z])', '', formula)  # MathML chooses sizes itself
  formula = re.sub(r'\\dots(?![a-zA-Z])', r'\\ldots', formula)
  if block and r'\\' in formula and r'\begin' not in formula:
    formula = rf'\begin{{aligned}}{formula}\end{{aligned}}'
  return latex2mathml.tex2mathml(formula, as_block=block)


def write(writer, node, block):
  """Appends a node's formula to the page."""
  try:
    writer.body.append(translate(node.astext(), block))
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
