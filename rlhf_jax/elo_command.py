"""rlhf elo --db=FILE --project=NAME [--round=N] [--ties=half] [--style_control] [--format=csv]

Prints the Elo table of a project's policies, from the judgements in a feedback store: ratings by
maximum likelihood, whose mean is 1000, with 95 % bootstrap intervals over tasks.

python -m rlhf_jax.elo_command does the same.
"""

import csv
import dataclasses
import io
import json
import sys

from rlhf_jax import command_line
from rlhf_jax import errors
from rlhf_jax import svg
from rlhf_jax.evaluation import tables
from rlhf_jax.feedback import bradley_terry
from rlhf_jax.feedback import leaderboard
from rlhf_jax.feedback import pictures

FORMATS = ('table', 'csv', 'json')
COLUMNS = [field.name for field in dataclasses.fields(leaderboard.Standing)] + ['win_rate']


def row(standing):
  """Returns {column: value} of a row, for files."""
  return dataclasses.asdict(standing) | {'win_rate': standing.win_rate}


def text(board, form, about):
  """Returns the table in a format.

  Args:
    board: leaderboard.Leaderboard.
    form: One of FORMATS.
    about: {key: value} beside the policies in JSON, with the notes for the table.
  """
  if form == 'csv':
    out = io.StringIO()
    writer = csv.DictWriter(out, COLUMNS, lineterminator='\n')
    writer.writeheader()
    writer.writerows(map(row, board.standings))
    return out.getvalue().rstrip('\n')
  if form == 'json':
    return json.dumps(about | {'policies': list(map(row, board.standings))}, indent=2)
  rows = [leaderboard.cells(standing) for standing in board.standings]
  return '\n'.join([tables.text(leaderboard.TITLES, rows, width=120), *about['notes']])


def read(url, project, round=None):
  """Returns the battles of a project, and the names of the simulated annotators of the store.

  Args:
    url: File or URL of the store, which must exist.
    project: Name of the project.
    round: Only the battles of this round; None for all.

  Raises:
    UserError: There is no such store or project, or it has no battles.
  """
  from rlhf_jax.feedback import store as store_lib  # needs the extra 'feedback'

  with store_lib.Store.open(url, create=False) as store:
    battles = store.battles(store.project(project), round=round)
    simulated = {person.name for person in store.annotators() if person.simulated}
  where = '' if round is None else f' in round {round}'
  errors.need(
    battles, f'--project={project}: no two policies were compared{where}, so there is no rating'
  )
  return battles, simulated


def start():
  """Reads the command line and prints the table."""
  parser = command_line.Arguments('rlhf elo', __doc__)
  add = parser.add_argument
  add('--db', required=True, help='file or URL of the feedback store')
  add('--project', required=True, help='name of the project')
  add('--round', type=int, help='only the tasks of this round; by default all')
  add('--ties', default='davidson', choices=bradley_terry.TIES, help='model of ties')
  add('--style_control', action='store_true', help='control for lengths, in characters')
  add('--format', default='table', choices=FORMATS, help='how to print; by default table')
  add('--out', default='', help='picture of the ratings over rounds, such as elo.svg or elo.png')
  options = parser.parse_args()
  with command_line.exit_on_error():
    if options.out:
      svg.check_path(options.out)
    battles, simulated = read(options.db, options.project, options.round)
    model = bradley_terry.Model(options.ties, options.style_control)
    board = leaderboard.rate(battles, model)
    about = {
      'project': options.project,
      'round': options.round,
      'ties': model.ties,
      'style_control': model.style_control,
      'nu': board.nu,
      'style': board.style,
      'notes': leaderboard.notes(board, battles, simulated, model),
    }
    print(text(board, options.format, about))
    if options.out:
      pictures.save(options.out, leaderboard.over_rounds(battles, model))
      print(f'picture: {options.out}', file=sys.stderr)


if __name__ == '__main__':
  start()
