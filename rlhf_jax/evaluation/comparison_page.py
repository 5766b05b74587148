"""The page of a comparison of runs: one self-contained HTML file with tables and figures."""

import pathlib

import markupsafe

from rlhf_jax.evaluation import figures
from rlhf_jax.evaluation import page
from rlhf_jax.evaluation import tables

TEMPLATE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{{ policy }}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{{ title }}</title>
<style>{{ style }}</style>
</head>
<body>
<main>
<h1>{{ title }}</h1>
<p>{{ metric }} of {{ count }} runs in {{ groups|length }} groups, after {{ budget }} {{ unit }}.
{% if not higher %}Lower values are better.{% endif %}</p>
{% for note in notes %}<p class="note">{{ note }}</p>
{% endfor %}
<h2 id="table">Final figures</h2>
<div class="scroll"><table>
<thead><tr>{% for name in titles %}<th>{{ name }}</th>{% endfor %}</tr></thead>
<tbody>
{% for row in groups %}<tr{% if loop.index0 == best %} class="best"{% endif %}>
{% for cell in row %}<td>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}</tbody></table></div>
<p class="note">IQM is the interquartile mean over the runs of a group, with its 95 % bootstrap
interval. Values are means over the last tenth of the budget. Seconds are those of all steps.
Collapsed are the seeds of runs that end worse than they began; unfinished are those of runs without
a final model.</p>

<h2 id="curves">Learning curves</h2>
<div class="wide"><figure>{{ curves }}<figcaption>Means over the runs of a group, with 95 %
bootstrap bands.</figcaption></figure>
<figure>{{ intervals }}<figcaption>Interquartile means of the final values, with 95 % bootstrap
intervals.</figcaption></figure>
{% if frontier %}<figure>{{ frontier }}<figcaption>Each line follows a group through training. At
equal KL, the higher line has gained more.</figcaption></figure>{% endif %}</div>

{% if improvement %}
<h2 id="improvement">Probability of improvement</h2>
<div class="scroll"><table>
<thead><tr><th class="text">Comparison</th><th>Probability</th><th>95 % interval</th></tr></thead>
<tbody>
{% for name, value, interval in improvement %}<tr><td class="text">{{ name }}</td>
<td>{{ value }}</td><td>{{ interval }}</td></tr>
{% endfor %}</tbody></table></div>
<p class="note">The probability that a run of the first group ends better than one of the second. If
the interval includes 0.5, the order is uncertain.</p>
{% endif %}
</main>
</body>
</html>
"""


def rows(result):
  """Returns the rows of the table, for tables.stages; see runs.compare."""
  table = []
  for name, row in result['groups'].items():
    iqm = f'{row["iqm"]:.3f} [{row["iqm_low"]:.3f}, {row["iqm_high"]:.3f}]'
    values = {key: value for key, value in row.items() if not key.startswith('iqm')}
    values |= {key: ', '.join(values[key]) or None for key in ('collapsed', 'unfinished')}
    table.append({'stage': name, 'IQM': iqm} | values)
  return table


def write(path, result, *, title):
  """Writes the page of a comparison.

  Args:
    path: HTML file, replaced atomically.
    result: Result of runs.compare.
    title: Title of the page.

  Returns:
    The path, a pathlib.Path.
  """
  titles, cells = tables.stages(rows(result))
  titles[0] = 'Runs with'
  sign = 1 if result['higher_is_better'] else -1
  best = max(range(len(cells)), key=lambda i: sign * list(result['groups'].values())[i]['iqm'])
  intervals = {
    name: (row['iqm'], row['iqm_low'], row['iqm_high']) for name, row in result['groups'].items()
  }
  axis = result['metric']
  html = page.render(
    {
      'title': title,
      'metric': axis,
      'unit': result['unit'],
      'budget': f'{result["budget"]:,.0f}',
      'higher': result['higher_is_better'],
      'count': sum(row['runs'] for row in result['groups'].values()),
      'notes': result['notes'],
      'titles': titles,
      'groups': cells,
      'best': best,
      'curves': _safe(figures.bands(result['curves'], result['unit'], axis)),
      'intervals': _safe(figures.intervals(intervals, f'final {axis}')),
      'frontier': _safe(figures.frontiers(result['frontier'], axis)) if result['frontier'] else '',
      'improvement': [
        (name, f'{p["value"]:.2f}', f'{p["low"]:.2f} to {p["high"]:.2f}')
        for name, p in result['improvement'].items()
      ],
    },
    TEMPLATE,
  )
  path = pathlib.Path(path)
  page.replace(path, html)
  return path


def _safe(svg):
  return markupsafe.Markup(svg)
