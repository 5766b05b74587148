"""Drawings as SVG text for an HTML page, or as files.

Axes and labels have the colour of the page's text, so they are readable on light and dark pages.
Drawings do not use pyplot, so their memory is freed. The SVG has no style sheet and no style
attributes, because the pages' security policies allow only the page's own style sheet.
"""

import contextlib
import html
import io
import pathlib
import re
import threading

from matplotlib import rc_context
from matplotlib.backend_bases import FigureCanvasBase
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from rlhf_jax.errors import need

BLUE, ORANGE, GREEN = '#3b82f6', '#e07b39', '#22a06b'
# Distinct on light and dark pages; used again from the beginning if there are more lines.
PALETTE = (BLUE, ORANGE, GREEN, '#a855f7', '#e5484d', '#0ea5b7', '#b8860b', '#8b8d98') * 9
INK = '#010203'  # placeholder, which `inline` replaces by the page's text colour
_STYLE = {
  'svg.fonttype': 'none',
  'svg.hashsalt': 'rlhf_jax',
  'font.family': 'sans-serif',
  'font.size': 9,
  'text.color': INK,
  'axes.edgecolor': INK,
  'axes.labelcolor': INK,
  'axes.spines.top': False,
  'axes.spines.right': False,
  'axes.linewidth': 0.6,
  'axes.grid': True,
  'grid.color': INK,
  'grid.alpha': 0.12,
  'grid.linewidth': 0.6,
  'xtick.color': INK,
  'ytick.color': INK,
  'legend.frameon': False,
  'text.parse_math': False,
  'lines.linewidth': 1.5,
}
_LOCK = threading.Lock()  # matplotlib has one style for all threads
_LINES = (
  'stroke-linejoin="round" stroke-linecap="butt"'  # as in the style sheet of matplotlib's SVG
)


def short(name):
  """Returns a name that fits into a legend."""
  return name if len(name) <= 40 else f'{name[:39]}…'


def inline(draw, size, title):
  """Returns the figure that `draw` draws, as self-contained SVG.

  Args:
    draw: Function of a matplotlib Figure.
    size: Width and height in inches.
    title: Text for screen readers.
  """
  out = io.StringIO()
  with _style():
    _draw(draw, size).savefig(out, format='svg', metadata={'Date': None})
  svg = out.getvalue()
  svg = svg[svg.index('<svg') :]
  svg = re.sub(r'<metadata>.*?</metadata>|<style .*?</style>', '', svg, flags=re.DOTALL)
  svg = re.sub(r' xmlns(:\w+)?="[^"]*"', '', svg)
  svg = re.sub(r' (width|height)="[\d.]+pt"', '', svg, count=2)
  svg = re.sub(r'<g id="[^"]*"', '<g', svg)
  svg = re.sub(r'(<[^<>]*) style="([^"]*)"', _attributes, svg)
  tag = f'<svg role="img" aria-label="{html.escape(title)}" {_LINES}'
  return svg.replace('<svg', tag, 1).replace(INK, 'currentColor')


def save(path, draw, size):
  """Saves the figure that `draw` draws, in black on white.

  Args:
    path: File, whose ending gives the format, such as .svg, .png or .pdf.
    draw: Function of a matplotlib Figure.
    size: Width and height in inches.

  Raises:
    UserError: There is no such format.
  """
  check_path(path)
  with _style():
    _draw(draw, size).savefig(path, dpi=200, facecolor='white')


def check_path(path):
  """Raises UserError if there is no format of pictures for the ending of a path."""
  known = FigureCanvasBase.get_supported_filetypes()
  ending = pathlib.Path(path).suffix[1:].lower()
  need(ending in known, f'{path} must end in one of .{", .".join(sorted(known))}')


@contextlib.contextmanager
def _style():
  with _LOCK, rc_context(_STYLE):
    yield


def _draw(draw, size):
  figure = Figure(figsize=size, layout='constrained')
  FigureCanvasSVG(figure)
  figure.patch.set_alpha(0)
  draw(figure)
  for axes in figure.axes:
    axes.patch.set_alpha(0)
  return figure


def _attributes(match):
  """Replaces a tag's style, which the page's security policy forbids, by attributes."""
  properties = (part.partition(':')[::2] for part in match.group(2).split(';') if part.strip())
  stripped = ((name.strip(), value.strip()) for name, value in properties)
  allowed = (
    f' {name}="{value}"' for name, value in stripped if name not in ('font', 'font-family')
  )
  return match.group(1) + ''.join(allowed)
