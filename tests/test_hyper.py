"""Sweeps: the runs that sweep, product and zip list, and the names of runs and groups."""

import numpy as np
import pytest

from rlhf_jax import errors
from rlhf_jax import hyper


def test_product_varies_the_last_sweep_fastest():
  runs = hyper.product([hyper.sweep(':algorithm', ('ppo', 'grpo')), hyper.sweep('seed', range(2))])
  assert runs == [
    {':algorithm': 'ppo', 'seed': 0},
    {':algorithm': 'ppo', 'seed': 1},
    {':algorithm': 'grpo', 'seed': 0},
    {':algorithm': 'grpo', 'seed': 1},
  ]


def test_zip_pairs_runs_and_refuses_different_lengths():
  runs = hyper.zip([hyper.sweep('a', (1, 2)), hyper.sweep('b', 'xy')])
  assert runs == [{'a': 1, 'b': 'x'}, {'a': 2, 'b': 'y'}]
  with pytest.raises(errors.UserError, match=r'not of \[1, 2\]'):
    hyper.zip([hyper.sweep('a', (1,)), hyper.sweep('b', (1, 2))])


def test_a_key_set_twice_is_refused():
  with pytest.raises(errors.UserError, match='sets seed twice'):
    hyper.product([hyper.sweep('seed', (1,)), hyper.sweep('seed', (2,))])


@pytest.mark.parametrize(
  'runs, message',
  [
    (None, 'must return a list of dicts'),
    ([], 'lists no runs'),
    ([{'seed': 1}, {'seed': 1}], 'lists the run seed=1 twice'),
    # Names omit characters that folder names may not contain.
    ([{'a': 'x/y'}, {'a': 'x:y'}], 'lists the run a=x_y twice'),
  ],
)
def test_check_refuses(runs, message):
  with pytest.raises(errors.UserError, match=f'^file.py:3: .*{message}'):
    hyper.check(runs, 'file.py:3')


def test_scalars_of_numpy_become_plain_numbers():
  runs = hyper.product([hyper.sweep('seed', np.arange(2)), hyper.sweep('a', np.float32([0.5]))])
  checked = hyper.check(runs, 'file.py:3')
  assert checked == [{'seed': 0, 'a': 0.5}, {'seed': 1, 'a': 0.5}]
  assert {type(value) for run in checked for value in run.values()} == {int, float}


def test_names_use_the_last_part_of_a_key_unless_it_is_ambiguous():
  runs = [{'rl.kl_coef': 0.1, 'optim.name': 'adam', 'critic.name': 'b', ':seed': 3}]
  assert hyper.name(runs[0], runs) == 'kl_coef=0.1-optim.name=adam-critic.name=b-seed=3'
  assert hyper.group(runs[0], runs) == 'kl_coef=0.1-optim.name=adam-critic.name=b'


def test_a_group_of_one_key_is_named_by_its_value():
  runs = hyper.product([hyper.sweep(':algorithm', ('ppo', 'grpo')), hyper.sweep(':seed', (0, 1))])
  assert [hyper.group(run, runs) for run in runs] == ['ppo', 'ppo', 'grpo', 'grpo']
