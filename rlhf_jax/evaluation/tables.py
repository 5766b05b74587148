"""Tables for the terminal and the report, with one row per stage or policy.

A row is a dict with a `stage` and any of `gold`, `gold_se`, `proxy`, `kl` (nats per sequence),
`win_rate`, `win_low`, `win_high`, `elo`, `elo_low`, `elo_high`. Any other key becomes a column.
Missing values, None and NaN are shown as a dash.
"""

import io
import math

import rich.box
import rich.console
import rich.markup
import rich.table

from rlhf_jax import errors

_TITLES = {
  'stage': 'Stage',
  'gold': 'Gold score',
  'proxy': 'Proxy score',
  'kl': 'KL (nats)',
  'win_rate': 'Win rate',
  'elo': 'Elo',
  'kl_per_token': 'KL per token',
  'IQM': 'IQM',
  'eos_rate': 'EOS rate',
  'peak_gib': 'Peak GiB',
}
_PARTS = frozenset(('gold_se', 'win_low', 'win_high', 'elo_low', 'elo_high'))


def stages(rows):
  """Returns column titles, and the cells of each row as strings, without empty columns."""
  known = [key for key in _TITLES if any(_has(row, key) for row in rows)]
  others = dict.fromkeys(key for row in rows for key in row if _has(row, key))
  keys = known + [key for key in others if key not in _TITLES and key not in _PARTS]
  titles = [_TITLES.get(key, key.replace('_', ' ').capitalize()) for key in keys]
  return titles, [[_cell(row, key) for key in keys] for row in rows]


def best(rows):
  """Returns the index of the best row, or None if no row has a gold score, win rate, Elo or proxy.

  The first of these that any row has determines the best row.
  """
  for key in ('gold', 'win_rate', 'elo', 'proxy'):
    known = [i for i, row in enumerate(rows) if _has(row, key)]
    if known:
      return max(known, key=lambda i: rows[i][key])
  return None


def stages_table(rows, *, title='', width=100):
  """Returns the table of stages as plain text, at most `width` characters wide."""
  return text(*stages(rows), title=title, width=width)


def metrics_table(metrics, *, title='', width=100):
  """Returns a table of {name: number} as plain text, at most `width` characters wide."""
  cells = [[name, f'{value:.6g}'] for name, value in metrics.items()]
  return text(['Metric', 'Value'], cells, title=title, width=width)


def text(titles, cells, *, title='', width=100):
  """Returns a table as plain text, at most `width` characters wide.

  Args:
    titles: Titles of the columns.
    cells: Rows, lists of strings.
    title: Title of the table, or ''.
    width: In characters.
  """
  table = rich.table.Table(title=title or None, box=rich.box.SIMPLE_HEAD, title_justify='left')
  for i, name in enumerate(titles):
    table.add_column(name, justify='right' if i else 'left')
  for row in cells:
    table.add_row(*(rich.markup.escape(errors.printable(cell)) for cell in row))
  out = io.StringIO()
  console = rich.console.Console(
    file=out, width=width, color_system=None, highlight=False, force_jupyter=False
  )
  console.print(table)
  return '\n'.join(line.rstrip() for line in out.getvalue().splitlines()).strip('\n')


def number(value):
  """Formats a number in few characters; returns texts unchanged and a dash for None and NaN."""
  if value is None or (isinstance(value, float) and math.isnan(value)):
    return '–'
  if isinstance(value, (bool, str)):
    return str(value)
  if isinstance(value, int) or (abs(value) < 1e6 and value == int(value)):
    return str(int(value))
  return f'{value:.2f}' if 0.01 <= abs(value) < 100 else f'{value:.3g}'


def _has(row, key):
  value = row.get(key)
  return value is not None and not (isinstance(value, float) and math.isnan(value))


def _cell(row, key):
  if not _has(row, key):
    return '–'
  value = row[key]
  if key == 'gold':
    return f'{value:.2f}' + (f' ± {row["gold_se"]:.2f}' if _has(row, 'gold_se') else '')
  if key == 'win_rate':
    interval = _has(row, 'win_low') and _has(row, 'win_high')
    return f'{value:.2f}' + (f' [{row["win_low"]:.2f}, {row["win_high"]:.2f}]' if interval else '')
  if key == 'elo':
    interval = _has(row, 'elo_low') and _has(row, 'elo_high')
    return f'{value:.0f}' + (f' ± {(row["elo_high"] - row["elo_low"]) / 2:.0f}' if interval else '')
  if key in ('proxy', 'kl'):
    return f'{value:.2f}'
  return number(value)
