"""Converts formulas to MathML, which browsers show without a script or a network."""

import re

from docutils.utils.math import latex2mathml
import markupsafe


def mathml(formula, *, block):
  """Converts a LaTeX formula to MathML.

  Args:
    formula: LaTeX without dollar signs.
    block: Whether the formula is displayed on its own line.

  Raises:
    docutils.utils.math.MathError: If docutils does not know a command of the formula.
  """
  # MathML chooses the sizes of brackets.
  formula = re.sub(r'\\[bB]igg?[lmr]?(?![a-zA-Z])', '', formula)
  formula = re.sub(r'\\dots(?![a-zA-Z])', r'\\ldots', formula)
  if block and r'\\' in formula and r'\begin' not in formula:
    formula = rf'\begin{{aligned}}{formula}\end{{aligned}}'
  text = latex2mathml.tex2mathml(formula, as_block=block)
  return markupsafe.Markup(re.sub(r'>\n\s*<', '><', text))
