"""`rlhf elo` prints and draws the table of a store, against numbers by hand."""

import csv
import io
import json
import math
import sys

import pytest

import jury
from rlhf_jax import cli
from rlhf_jax import runtime
from rlhf_jax.feedback import store as store_lib


@pytest.fixture(scope='module')
def database(tmp_path_factory):
  path = tmp_path_factory.mktemp('elo') / 'jury.db'
  with store_lib.Store.open(path) as store:
    jury.fill(store)
    store.add_project('empty')
  return path


@pytest.fixture
def call(database, monkeypatch, capsys):
  """Returns a function that runs `rlhf elo` and returns what it prints."""

  def run(*arguments, db=database, project='capitals'):
    monkeypatch.setattr(sys, 'argv', ['rlhf', 'elo', f'--db={db}', f'--project={project}'])
    sys.argv += arguments
    monkeypatch.setattr(runtime, 'exit_now', lambda message, status: sys.exit(message))
    cli.main()
    return capsys.readouterr().out

  return run


def test_table_of_a_round(call):
  # Round 0: sft won 3 games, lost 6 and tied 3 of 12. With half a virtual win and loss the
  # policies have 3 + 1.5 + 0.5 = 5 and 8 of 13 points: odds of 1.6, 400 log10(1.6) = 81.648, so
  # 1000 + 40.8 and 1000 - 40.8.
  out = call('--round=0', '--ties=half')
  rows = [line.split() for line in out.splitlines()]
  [ppo] = [row for row in rows if row[:1] == ['ppo']]
  [sft] = [row for row in rows if row[:1] == ['sft']]
  assert ppo[1] == '1041' and sft[1] == '959'
  assert ppo[5:10] == ['12', '6', '3', '3', '0.62']  # games, wins, ties, losses; 7.5 / 12
  assert sft[5:10] == ['12', '3', '3', '6', '0.38']
  assert rows.index(ppo) < rows.index(sft)
  assert '12 games, 4 of them judged by simulated annotators.' in out
  assert 'A tie counts as half a win.' in out


def test_davidsons_ties_as_json(call):
  found = json.loads(call('--round=0', '--format=json'))
  assert found['ties'] == 'davidson' and found['project'] == 'capitals'
  # The model of one pair is saturated: 6.5 wins, 3 ties and 3.5 losses of ppo.
  assert found['nu'] == pytest.approx(3 / math.sqrt(6.5 * 3.5), abs=1e-6)
  ppo, sft = found['policies']
  assert ppo['elo'] - sft['elo'] == pytest.approx(400 * math.log10(6.5 / 3.5), abs=1e-6)
  assert ppo['low'] < ppo['elo'] < ppo['high']


def test_all_rounds_as_csv(call):
  rows = list(csv.DictReader(io.StringIO(call('--format=csv'))))
  # Round 1 adds 3 rankings of three policies, 9 games, and one of ppo against ppo2.
  games = {row['policy']: int(row['games']) for row in rows}
  assert games == {'ppo2': 7, 'ppo': 19, 'sft': 18}
  assert [row['policy'] for row in rows] == ['ppo2', 'ppo', 'sft']
  assert float(rows[0]['win_rate']) == 1


def test_style_control_is_named(call):
  assert 'log-odds change by' in call('--round=1', '--style_control')


def test_the_picture_has_the_policies_of_all_rounds(call, tmp_path):
  call(f'--out={tmp_path}/elo.svg')
  picture = (tmp_path / 'elo.svg').read_text()
  assert all(f'>{name}<' in picture for name in ('sft', 'ppo', 'ppo2'))
  assert 'round: battles of this round and all before' in picture
  call('--round=0', f'--out={tmp_path}/one.png')
  assert (tmp_path / 'one.png').read_bytes().startswith(b'\x89PNG')


@pytest.mark.parametrize(
  ('arguments', 'options', 'message'),
  [
    ((), {'project': 'other'}, "no project 'other'; its projects: 'capitals', 'empty'"),
    ((), {'project': 'empty'}, 'no two policies were compared'),
    (('--round=7',), {}, 'no two policies were compared in round 7'),
    ((), {'db': 'missing.db'}, 'sqlite:///missing.db: there is no such file'),
    ((), {'db': 'sqlite+pysqlite:///missing.db'}, 'missing.db: there is no such file'),
    (('--out=elo.doc',), {'db': 'missing.db'}, 'elo.doc must end in one of'),
    (('--out=elo.doc',), {}, 'elo.doc must end in one of'),
    (('--ties=no',), {}, 'davidson'),
  ],
)
def test_errors_take_one_line(arguments, options, message, call):
  with pytest.raises(SystemExit) as caught:
    call(*arguments, **options)
  assert message in str(caught.value) and '\n' not in str(caught.value)
