"""The page of a comparison of runs: one self-contained HTML file with tables and figures."""

from rlhf_jax.evaluation import figures
from rlhf_jax.evaluation import sections
from rlhf_jax.evaluation import tables

FINAL_NOTE = (
  'IQM is the interquartile mean over the runs of a group, with its 95 % bootstrap interval. '
  'Values are means over the last tenth of the budget. Seconds are those of all steps. Collapsed '
  'are the seeds of runs that end worse than they began; unfinished are those of runs without a '
  'final model.'
)
IMPROVEMENT_NOTE = (
  'The probability that a run of the first group ends better than one of the second. If the '
  'interval includes 0.5, the order is uncertain.'
)


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
    path: HTML file, a pathlib.Path, replaced atomically.
    result: Result of runs.compare.
    title: Title of the page.

  Returns:
    The path.
  """
  groups, metric, unit = result['groups'], result['metric'], result['unit']
  summary = (
    f'{metric} of {sum(row["runs"] for row in groups.values())} runs in {len(groups)} groups, '
    f'after {result["budget"]:,.0f} {unit}.'
  )
  if not result['higher_is_better']:
    summary += ' Lower values are better.'
  parts = [_final(result), sections.Section('Learning curves', figures=_figures(result))]
  if result['improvement']:
    parts.append(
      sections.Section(
        'Probability of improvement',
        titles=('Comparison', 'Probability', '95 % interval'),
        rows=[
          (name, f'{p["value"]:.2f}', f'{p["low"]:.2f} to {p["high"]:.2f}')
          for name, p in result['improvement'].items()
        ],
        note=IMPROVEMENT_NOTE,
      )
    )
  sections.write(path, title=title, summary=' '.join([summary, *result['notes']]), sections=parts)
  return path


def _final(result):
  """Returns the section with the table of final figures."""
  titles, cells = tables.stages(rows(result))
  titles[0] = 'Runs with'
  sign = 1 if result['higher_is_better'] else -1
  best = max(range(len(cells)), key=lambda i: sign * list(result['groups'].values())[i]['iqm'])
  return sections.Section('Final figures', titles=titles, rows=cells, best=best, note=FINAL_NOTE)


def _figures(result):
  """Returns the figures of a comparison with their captions."""
  metric = result['metric']
  finals = {
    name: (row['iqm'], row['iqm_low'], row['iqm_high']) for name, row in result['groups'].items()
  }
  drawn = [
    (
      figures.bands(result['curves'], result['unit'], metric),
      'Means over the runs of a group, with 95 % bootstrap bands.',
    ),
    (
      figures.intervals(finals, f'final {metric}'),
      'Interquartile means of the final values, with 95 % bootstrap intervals.',
    ),
  ]
  if result['frontier']:
    drawn.append(
      (
        figures.frontiers(result['frontier'], metric),
        'Each line follows a group through training. At equal KL, the higher line has gained more.',
      )
    )
  return drawn
