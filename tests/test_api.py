"""`import rlhf_jax as rl`: what load, train, compare and Run return, write and refuse."""

import html
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import tempfile

import datasets
import jax
import numpy as np
import pandas
import pytest
from safetensors.numpy import load_file

import rlhf_jax as rl
from rlhf_jax import errors
from rlhf_jax.rewards import functions
import tiny

TESTS = pathlib.Path(__file__).resolve().parent
SMALL = {'batch_size': 16, 'log_every': 1, 'optim.learning_rate': 3e-3, 'optim.warmup_steps': 0}
ON_POLICY = SMALL | {
  'data.max_prompt_length': 6,
  'sampling.max_new_tokens': 6,
  'rl.epochs': 1,
  'samples_every': 1,
}
PPO = ON_POLICY | {'critic.kind': 'trunk', 'optim.warmup_from': 0.0}
OFFLINE = SMALL | {'data.max_length': 16, 'data.held_out': None}


def records(path):
  return [json.loads(line) for line in path.read_text().splitlines()]


def numbers(run):
  """The metrics without those that are times."""
  return run.metrics[
    [
      name
      for name in run.metrics
      if not name.startswith(('seconds', 'tokens_per_second', 'memory'))
    ]
  ]


def same_parameters(one, other):
  """Returns whether two Hugging Face folders hold the same bits."""
  one, other = (load_file(path / 'model.safetensors') for path in (one, other))
  return one.keys() == other.keys() and all(np.array_equal(one[name], other[name]) for name in one)


def test_default_lengths_fit_the_model(world, tmp_path, capsys):
  """The base config's 256 + 64 tokens become halves of the model's context of 32."""
  run = rl.train(
    world / 'model',
    prompts=[{'prompt': 'w1 w2', 'number': 1}] * 8,
    reward_fn=tiny.good_words,
    steps=1,
    workdir=tmp_path / 'run',
    overrides={
      'batch_size': 8,
      'data.max_prompt_length': 6,
      'critic.kind': 'trunk',
      'optim.warmup_steps': 0,
      'optim.warmup_from': 0.0,
    },
  )
  assert run.config['data']['max_prompt_length'] == 6
  assert run.config['sampling']['max_new_tokens'] == 16
  assert 'sampling.max_new_tokens=16' in capsys.readouterr().out


def test_distillation_needs_no_reward(world, tmp_path):
  overrides = {
    'batch_size': 8,
    'log_every': 1,
    'data.max_prompt_length': 6,
    'sampling.max_new_tokens': 4,
    'distillation.teacher': str(world / 'model'),
  }
  run = rl.train(
    world / 'model',
    prompts=['w1 w2', 'w3'] * 8,
    algorithm='distillation',
    steps=1,
    workdir=tmp_path / 'run',
    overrides=overrides,
  )
  # The teacher is the student, whose samples are all that it learns from.
  assert run.metrics.loc[0, 'distillation/loss'] == pytest.approx(0.0, abs=1e-6)


def test_importing_the_package_imports_no_jax():
  code = 'import rlhf_jax, sys; assert "jax" not in sys.modules and "train" in rlhf_jax.__all__'
  subprocess.run([sys.executable, '-c', code], check=True, cwd=TESTS.parent)


@pytest.fixture(scope='module')
def ppo(world, tmp_path_factory):
  """Returns three steps of PPO on a list of records, with a function that can be imported."""
  prompts = records(world / 'prompts.jsonl')
  return rl.train(
    world / 'model',
    prompts=prompts,
    reward_fn=tiny.good_words,
    steps=3,
    workdir=tmp_path_factory.mktemp('ppo') / 'run',
    overrides=PPO,
  )


def test_a_run_has_metrics_samples_a_policy_and_a_report(ppo, world):
  assert list(ppo.metrics.index) == [0, 1, 2] and not ppo.stopped
  assert not same_parameters(ppo.workdir / 'model', world / 'model')
  assert len(ppo.samples) == 3 * 16
  for step, samples in ppo.samples.groupby('step'):
    scores = tiny.good_words(
      samples.prompt, samples.response, response_tokens=None, metadata=[{'number': 0}]
    )
    np.testing.assert_allclose(samples.score, scores, atol=1e-6)
    assert ppo.metrics.loc[step, 'objective/scores'] == pytest.approx(np.mean(scores), abs=1e-6)
  assert len(ppo.policy.sample(['w1', 'w2'], max_new_tokens=3).responses) == 2
  page = ppo.report()
  assert page == ppo.workdir / 'report.html' and page.read_text().startswith('<!')
  shown = re.search("srcdoc='(.*?)'", page._repr_html_(), re.DOTALL).group(1)
  assert html.unescape(shown) == page.read_text()
  [axes] = ppo.plot(['objective/scores']).axes
  np.testing.assert_array_equal(axes.lines[0].get_ydata(), ppo.metrics['objective/scores'])
  assert ppo.plot()._repr_png_().startswith(b'\x89PNG')


def test_the_command_line_repeats_the_run_to_the_last_bit(ppo, tmp_path):
  """From the folder of the reward function's module, with the run's config.json."""
  command = [sys.executable, '-m', 'rlhf_jax.main', f'--config={ppo.workdir}/config.json']
  environment = os.environ | {'PYTHONPATH': str(TESTS.parent)}
  subprocess.run(
    [*command, f'--workdir={tmp_path}/again'],
    check=True,
    cwd=TESTS,
    env=environment,
    capture_output=True,
  )
  again = rl.Run(tmp_path / 'again')
  pandas.testing.assert_frame_equal(numbers(again), numbers(ppo), check_exact=True)
  assert same_parameters(again.workdir / 'model', ppo.workdir / 'model')


def test_ctrl_c_returns_the_run_so_far_and_the_same_call_resumes(ppo, world, tmp_path, capsys):
  """With a closure of prompts and responses, which only this process has."""
  calls = []

  def reward_fn(prompts, responses):
    calls.append(len(prompts))
    if len(calls) == 2:
      os.kill(os.getpid(), signal.SIGINT)
    metadata = [{'number': 0}] * len(prompts)
    return tiny.good_words(prompts, responses, response_tokens=None, metadata=metadata)

  def train():
    prompts = records(world / 'prompts.jsonl')
    return rl.train(
      rl.load(world / 'model'),
      prompts=prompts,
      reward_fn=reward_fn,
      steps=3,
      workdir=tmp_path / 'run',
      overrides=PPO,
    )

  run = train()
  with pytest.raises(errors.UserError, match='Move it to a module'):
    functions.load(run.config['reward']['function'])
  assert run.stopped and list(run.metrics.index) == [0, 1] and len(calls) == 2
  assert 'stopped' in capsys.readouterr().out
  assert len(run.policy.sample(['w1'], max_new_tokens=2).responses) == 1
  run = train()
  assert not run.stopped and len(calls) == 3
  pandas.testing.assert_frame_equal(numbers(run), numbers(ppo), check_exact=True)
  assert same_parameters(run.workdir / 'model', ppo.workdir / 'model')


def test_the_name_of_a_reward_function_is_the_function(ppo, world):
  """Otherwise the config would differ, and the run would not resume in the same folder."""
  run = rl.train(
    world / 'model',
    prompts=records(world / 'prompts.jsonl'),
    reward_fn='tiny:good_words',
    steps=3,
    workdir=ppo.workdir,
    overrides=PPO,
  )
  assert run.config == ppo.config and run.config['reward']['function'] == 'tiny:good_words'


def test_ctrl_c_before_the_first_step_leaves_no_run(world, tmp_path, monkeypatch):
  code = 'import os\nimport signal\nos.kill(os.getpid(), signal.SIGINT)\n'
  (tmp_path / 'stops_while_loading.py').write_text(code)
  monkeypatch.chdir(tmp_path)
  monkeypatch.syspath_prepend(tmp_path)
  with pytest.raises(KeyboardInterrupt, match='before the first step: .*/run holds no run'):
    rl.train(
      world / 'model',
      prompts=['w1'],
      reward_fn='stops_while_loading:reward_fn',
      workdir=tmp_path / 'run',
    )
  assert not (tmp_path / 'run' / 'config.json').exists()


@pytest.fixture(scope='module')
def sft_of_a_path(world, tmp_path_factory):
  return rl.train(
    world / 'model',
    samples=world / 'completions.jsonl',
    steps=2,
    workdir=tmp_path_factory.mktemp('sft') / 'run',
    overrides=OFFLINE,
  )


@pytest.mark.parametrize('kind', [list, pandas.DataFrame, datasets.Dataset.from_list])
def test_data_in_memory_is_as_good_as_a_file(
  kind, sft_of_a_path, world, tmp_path, monkeypatch, capsys
):
  """Values may be missing (NaN in pandas, None in datasets). Prints the temporary folder."""
  monkeypatch.setattr(tempfile, 'tempdir', str(tmp_path))
  rows = records(world / 'completions.jsonl')
  rows[0]['note'] = 'short'
  run = rl.train(world / 'model', samples=kind(rows), steps=2, overrides=OFFLINE)
  assert run.workdir.parent == tmp_path
  assert f'writing the run to {run.workdir};' in capsys.readouterr().out
  assert records(pathlib.Path(run.config['data']['path'])) == rows
  pandas.testing.assert_frame_equal(numbers(run), numbers(sft_of_a_path), check_exact=True)


def test_a_dict_of_data_is_a_mixture(sft_of_a_path, world, tmp_path):
  rows = records(world / 'completions.jsonl')
  data = {'file': (world / 'completions.jsonl', 3), 'list': (rows[:5], 1)}
  workdir = tmp_path / 'run'
  run = rl.train(world / 'model', samples=data, steps=2, workdir=workdir, overrides=OFFLINE)
  mixture = run.config['data']['mixture']
  assert {name: source['weight'] for name, source in mixture.items()} == {'file': 3.0, 'list': 1.0}
  assert mixture['file']['path'] == str(world / 'completions.jsonl')
  assert records(pathlib.Path(mixture['list']['path'])) == rows[:5]
  assert run.metrics['loss'].tolist() != sft_of_a_path.metrics['loss'].tolist()


@pytest.fixture(scope='module')
def reward(world, tmp_path_factory):
  """Returns a reward model that has learnt which words are good."""
  return rl.train(
    world / 'model',
    comparisons=records(world / 'comparisons.jsonl'),
    steps=40,
    workdir=tmp_path_factory.mktemp('reward') / 'run',
    overrides=OFFLINE | {'optim.learning_rate': 1e-2, 'log_every': 40},
  )


def test_a_reward_model_learns_the_preferences(reward, world):
  pairs = records(world / 'comparisons.jsonl')
  prompts = [pair['prompt'] for pair in pairs]
  chosen = reward.score(prompts, [pair['chosen'] for pair in pairs])
  rejected = reward.score(prompts, [pair['rejected'] for pair in pairs])
  assert np.mean(chosen > rejected) > 0.9
  loaded = rl.load(reward.workdir)
  np.testing.assert_array_equal(loaded(prompts, [pair['chosen'] for pair in pairs]), chosen)
  with pytest.raises(errors.UserError, match='trains a reward model'):
    reward.policy.sample(['w1'])


@pytest.mark.parametrize(
  'kind',
  [
    'run',
    pytest.param('model', marks=pytest.mark.slow),
    pytest.param('folder', marks=pytest.mark.slow),
  ],
)
def test_a_reward_model_is_a_reward(kind, reward, world, tmp_path):
  """Its scores with an EOS are those of the run, for responses that ended before the limit."""
  reward_fn = {'run': reward, 'model': reward.model, 'folder': reward.workdir}[kind]
  run = rl.train(
    rl.load(world / 'model'),
    prompts=[f'w{i}' for i in range(16)],
    reward_fn=reward_fn,
    algorithm='grpo',
    steps=1,
    workdir=tmp_path / 'run',
    overrides=ON_POLICY | {'sampling.samples': 2, 'rl.minibatches': 1},
  )
  assert run.config['algorithm'] == 'grpo'
  expected = reward.score(list(run.samples.prompt), list(run.samples.response))
  same = np.isclose(expected, run.samples.score, atol=1e-4)
  model = reward.model.policy.tokenizer
  short = [len(model(text).input_ids) - 1 < 6 for text in run.samples.response]
  assert same.any() and not np.any(same & ~np.array(short))


def test_pretraining_of_a_new_model_on_texts(tmp_path):
  texts = [f'the number {i} is followed by {i + 1}' for i in range(64)]
  init = {name: value for name, value in tiny.LLAMA.items() if name != 'vocab_size'}
  run = rl.train(
    texts=texts,
    steps=2,
    workdir=tmp_path / 'run',
    overrides=OFFLINE | {'model.init': init, 'batch_size': 8},
  )
  tokenizer = run.policy.tokenizer
  assert tokenizer.decode(tokenizer(texts[5]).input_ids, skip_special_tokens=True) == texts[5]
  assert isinstance(run.policy.sample(['the number'], max_new_tokens=4).responses[0], str)


def test_texts_may_be_prompts_with_completions(tmp_path):
  rows = [{'prompt': f'{i} and', 'completion': f' {i + 1}'} for i in range(16)]
  init = {name: value for name, value in tiny.LLAMA.items() if name != 'vocab_size'}
  overrides = OFFLINE | {'model.init': init, 'batch_size': 8}
  run = rl.train(texts=rows, steps=1, workdir=tmp_path / 'run', overrides=overrides)
  tokenizer = run.policy.tokenizer
  assert tokenizer.decode(tokenizer('3 and 4').input_ids, skip_special_tokens=True) == '3 and 4'


def test_logprobs_are_those_of_the_tokens(world):
  """w1 | w5 w6, by hand: log p(w5 | bos w1) + log p(w6 | bos w1 w5)."""
  policy = rl.load(world / 'model')
  ids = np.array([[tiny.BOS, 4 + 1, 4 + 5, 4 + 6]], np.int32)
  states, _ = policy.model.forward(
    policy.params, ids, np.arange(4, dtype=np.int32)[None], np.ones((1, 4), bool)
  )
  logits = np.asarray(policy.model.unembed(policy.params, states), np.float64)[0]
  log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
  by_hand = log_p[1, 4 + 5] + log_p[2, 4 + 6]
  one = policy.logprobs(['w1', 'w1 w2 w3'], ['w5 w6', 'w7'])
  assert one[0] == pytest.approx(by_hand, abs=1e-4)


def test_chat_answers_by_the_template(world):
  policy = rl.load(world / 'model')
  policy.tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }} {% endfor %}w9"
  expected = policy.sample(['w1 w9'], temperature=0.0, max_new_tokens=4).responses[0]
  assert policy.chat('w1', temperature=0.0, max_new_tokens=4) == expected
  turns = [{'role': 'user', 'content': 'w1'}]
  assert policy.chat(turns, temperature=0.0, max_new_tokens=4) == expected


def test_a_saved_policy_is_the_same(world, tmp_path):
  policy = rl.load(world / 'model')
  policy.save(tmp_path / 'copy')
  assert policy.path == tmp_path / 'copy'
  assert same_parameters(tmp_path / 'copy', world / 'model')
  jax.tree.map(np.testing.assert_array_equal, rl.load(tmp_path / 'copy').params, policy.params)


def test_policies_are_compared_by_a_function(ppo, world):
  result = rl.compare(
    {'start': world / 'model', 'ppo': ppo},
    prompts=[f'w{i}' for i in range(20)],
    judge=lambda prompts, responses: [float(len(text)) for text in responses],
    max_new_tokens=5,
  )
  frame = result.responses
  assert list(result.table.index) == ['start', 'ppo'] and len(frame) == 20
  lengths = {name: frame[name].str.len() for name in ('start', 'ppo')}
  difference = lengths['ppo'] - lengths['start']
  wins = np.mean((difference > 0) + 0.5 * (difference == 0))
  assert result.table.loc['ppo', 'win_rate'] == pytest.approx(wins)
  assert result.table.loc['start', 'elo'] == 1000.0
  for name in lengths:
    assert result.table.loc[name, 'gold'] == pytest.approx(lengths[name].mean())
  assert result.plot()._repr_png_().startswith(b'\x89PNG')
  assert 'ppo' in result._repr_html_()
  for shown in (result, result.scored['ppo'].samples):  # a table without the arrays
    assert 'Rollout' not in repr(shown) and len(repr(shown).splitlines()) < 30


def test_policies_are_compared_by_a_reward_model(reward, world):
  policies = {'a': rl.load(world / 'model'), 'b': str(world / 'model')}
  result = rl.compare(policies, prompts=['w1', 'w2'], judge=reward, max_new_tokens=3)
  same = rl.compare(
    policies, prompts=['w1', 'w2'], judge=reward.workdir / 'model', max_new_tokens=3
  )
  assert np.isfinite(result.table.gold).all()
  pandas.testing.assert_frame_equal(result.table, same.table)


@pytest.mark.parametrize(
  'arguments, message',
  [
    ({}, r'set exactly one of prompts, samples, comparisons, texts \(now none\)'),
    ({'prompts': ['a'], 'texts': ['a']}, r'now prompts, texts'),
    ({'prompts': ['a'], 'algorithm': 'sft'}, "algorithm='sft' takes samples or texts, not prompts"),
    ({'samples': [], 'reward_fn': len}, "algorithm='sft' takes no reward_fn"),
    ({'prompts': [3]}, 'prompts: record 1 is of type int: it must be a dict or a string'),
    ({'samples': ['a']}, 'samples: record 1 is of type str: it must be a dict$'),
    ({'prompts': 1}, 'prompts is of type int: it must be a list'),
    ({'prompts': [{'x': object()}]}, 'prompts: record 1 cannot be written as JSON'),
    ({'prompts': ['w1'], 'policy': 3}, 'policy is of type int'),
    ({'prompts': ['w1'], 'reward_fn': 3}, 'reward_fn is of type int'),
    ({'prompts': ['w1'], 'reward_fn': 'tiny:nobody'}, "config.reward.function='tiny:nobody'"),
    ({'prompts': ['w1'], 'policy': None}, 'policy=None needs texts'),
    ({'prompts': ['w1']}, "algorithm='ppo' needs a reward_fn"),
    ({'prompts': ['w1'], 'overrides': {'rl.kl_coeff': 1.0}}, "no key 'kl_coeff'.*'kl_coef'"),
    ({'prompts': ['w1'], 'overrides': {'batch_size': 'x'}}, 'config.batch_size'),
    ({'prompts': ['w1'], 'algorithm': 'pppo'}, "algorithm='pppo'"),
    ({'prompts': ['w1'], 'preset': 'trll'}, 'trll'),
    ({'prompts': {'a': ['w1']}}, 'prompts is a dict: it must have the form {name: .data, weight.}'),
    ({'prompts': {'a.b': (['w1'], 1)}}, "prompts: the name 'a.b' of a source may have letters, "),
    ({'prompts': {'a/b': (['w1'], 1)}}, "prompts: the name 'a/b' of a source may have letters, "),
    ({'prompts': {'a': (['w1'], 'x')}}, "prompts: the weight 'x' of source 'a' must be a number"),
  ],
)
def test_mistakes_are_named(arguments, message, world, tmp_path):
  arguments = {'policy': world / 'model', 'workdir': tmp_path / 'run'} | arguments
  with pytest.raises(errors.UserError, match=message):
    rl.train(**arguments)


def test_mistakes_of_the_others_are_named(world, tmp_path):
  judge = lambda prompts, responses: [0.0] * len(prompts)
  with pytest.raises(errors.UserError, match='nowhere'):
    rl.load(tmp_path / 'nowhere')
  with pytest.raises(errors.UserError, match='policies is empty'):
    rl.compare({}, prompts=['w1'], judge=judge)
  with pytest.raises(errors.UserError, match="policies\\['r'\\] is a reward model"):
    rl.compare({'r': world / 'reward'}, prompts=['w1'], judge=judge)
  with pytest.raises(errors.UserError, match='prompts is a string'):
    rl.load(world / 'model').sample('w1')
  with pytest.raises(errors.UserError, match='is not the folder of a run'):
    rl.Run(tmp_path)
