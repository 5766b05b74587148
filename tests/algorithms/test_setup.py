"""What the keys of config.data make of files, and what is said about them."""

import json

import pytest

from rlhf_jax import errors
from rlhf_jax.algorithms import setup
from rlhf_jax.algorithms import sft
from rlhf_jax.data import formats


def data(path, **changes):
  config = sft.config().data
  config.update({'path': str(path), **changes})
  return config


def test_a_table_under_other_names(tmp_path):
  path = tmp_path / 'a.dat'
  path.write_text('question\tanswer\n007\t"a\nb"\n')
  columns = 'prompt=question,completion=answer'
  with pytest.raises(errors.UserError, match=r"a\.dat: the suffix '\.dat' is not known"):
    setup.read_examples(data(path, columns=columns), formats.completions, None)
  assert setup.read_examples(
      data(path, columns=columns, format='tsv'), formats.completions, None) == [
          formats.Completion('007', 'a\nb')]


def test_pairs_left_out_and_empty_prompts_are_said(tmp_path, caplog):
  path = tmp_path / 'a.jsonl'
  pair = lambda prompt, chosen: json.dumps(
      {'prompt': prompt, 'chosen': chosen, 'rejected': 'b'}) + '\n'
  path.write_text(pair('p', 'a'))
  assert len(setup.read_examples(data(path), formats.comparisons, None)) == 1
  assert not caplog.records
  path.write_text(pair('p', 'b') + pair('', 'a'))
  assert len(setup.read_examples(data(path), formats.comparisons, None)) == 1
  (record,) = caplog.records
  assert record.getMessage() == (
      f'{path}: 1 of 2 records kept; 1 left out: all completions are the same (first: {path}:1); '
      f'1 kept with an empty prompt (first: {path}:2)')
  caplog.clear()
  path.write_text(pair('', 'a'))
  setup.read_examples(data(path), formats.comparisons, None)
  assert '1 kept with an empty prompt' in caplog.text
