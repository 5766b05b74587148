"""Tables of a run: one row per stage or policy, for the terminal and for the report.

A row is a dict with a `stage` and any of `gold`, `gold_se`, `proxy`, `kl` (nats per sequence),
`win_rate`, `win_low`, `win_high`, `elo`, `elo_low`, `elo_high`; any other key becomes a column of
its own. What a row lacks, or holds as None or NaN, shows as a dash.
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
}
_PARTS = frozenset(('gold_se', 'win_low', 'win_high', 'elo_low', 'elo_high'))


def stages(rows):
  """Column titles, and for each row its cells as strings, without columns that are all empty."""
  known = [key for key in _TITLES if any(_has(row, key) for row in rows)]
  others = dict.fromkeys(key for row in rows for key in row if _has(row, key))
  keys = known + [key for key in others if key not in _TITLES and key not in _PARTS]
  titles = [_TITLES.get(key, key.replace('_', ' ').capitalize()) for key in keys]
  return titles, [[_cell(row, key) for key in keys] for row in rows]


def best(rows):
  """The index of the best row: by gold score, else by win rate, Elo or proxy score; None if no row
  has any of these."""
  for key in ('gold', 'win_rate', 'elo', 'proxy'):
    known = [i for i, row in enumerate(rows) if _has(row, key)]
    if known:
      return max(known, key=lambda i: rows[i][key])
  return None


def stages_table(rows, *, title='', width=100):
  """The table of stages as plain text, at most `width` characters wide."""
  return _table(*stages(rows), title=title, width=width)


def metrics_table(metrics, *, title='', width=100):
  """A table of {name: number} as plain text, at most `width` characters wide."""
  cells = [[name, f'{value:.6g}'] for name, value in metrics.items()]
  return _table(['Metric', 'Value'], cells, title=title, width=width)


def _table(titles, cells, *, title, width):
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
  """A number in few characters, text as it is, and a dash for what is not one."""
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
