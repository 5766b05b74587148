"""Formulas as MathML, which browsers show by themselves: a page needs no script or network."""

import re

from docutils.utils.math import latex2mathml
import markupsafe


def mathml(formula, *, block):
  """MathML of a LaTeX formula.

  Args:
    formula: LaTeX without its dollars.
    block: whether it stands on lines of its own.

  Raises:
    docutils.utils.math.MathError: it has a command that docutils does not know.
  """
  formula = re.sub(r'\\[bB]igg?[lmr]?(?![a-zA-Z])', '', formula)  # MathML chooses sizes itself
  formula = re.sub(r'\\dots(?![a-zA-Z])', r'\\ldots', formula)
  if block and r'\\' in formula and r'\begin' not in formula:
    formula = rf'\begin{{aligned}}{formula}\end{{aligned}}'
  text = latex2mathml.tex2mathml(formula, as_block=block)
  return markupsafe.Markup(re.sub(r'>\n\s*<', '><', text))
