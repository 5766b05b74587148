"""The table of stages, as the terminal shows it."""

import math

import pytest

from rlhf_jax.evaluation import tables

ROWS = [
  {'stage': 'SFT', 'gold': 0.6, 'gold_se': 0.05, 'kl': 0.0, 'elo': 1000.0, 'count': 512},
  {
    'stage': 'PPO [x]',
    'gold': 2.4,
    'kl': math.nan,
    'win_rate': 0.93,
    'win_low': 0.9,
    'win_high': 0.95,
    'elo': 1310.4,
    'elo_low': 1285.4,
    'elo_high': 1335.4,
    'proxy': None,
  },
]


def test_cells():
  titles, cells = tables.stages(ROWS)
  assert titles == ['Stage', 'Gold score', 'KL (nats)', 'Win rate', 'Elo', 'Count']
  assert cells == [
    ['SFT', '0.60 ± 0.05', '0.00', '–', '1000', '512'],
    ['PPO [x]', '2.40', '–', '0.93 [0.90, 0.95]', '1310 ± 25', '–'],
  ]


def test_terminal_table():
  text = tables.stages_table(ROWS, title='Stages', width=80)
  lines = text.splitlines()
  assert lines[0].strip() == 'Stages'
  assert max(map(len, lines)) <= 80
  assert any('PPO [x]' in line and '1310 ± 25' in line for line in lines)
  assert '\x1b' not in text


@pytest.mark.parametrize(
  ('value', 'text'),
  [
    (None, '–'),
    (math.nan, '–'),
    (3, '3'),
    (4096.0, '4096'),
    (0.1234, '0.12'),
    (-12.345, '-12.35'),
    (0.0003, '0.0003'),
    (123.456, '123'),
    (1e9, '1e+09'),
    (math.inf, 'inf'),
    ('text', 'text'),
  ],
)
def test_numbers(value, text):
  assert tables.number(value) in (text, text.replace('12.35', '12.34'))
