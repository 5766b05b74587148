"""The recipes of CONTRIBUTING.md, run together: they train, and they measure correctly."""

import importlib
import json
import pathlib
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax import forward
from rlhf_jax import metrics
from rlhf_jax import models
from rlhf_jax import pipeline
from rlhf_jax import types
from rlhf_jax import update
from rlhf_jax.models import families
from rlhf_jax.models import hf
import tiny

ROOT = pathlib.Path(__file__).resolve().parents[1]
RECIPES = dict(
  re.findall(r'```python\n# (\w+\.py)\n(.*?)```', (ROOT / 'CONTRIBUTING.md').read_text(), re.DOTALL)
)
FIELDS = tiny.LLAMA | {'family': 'capped_llama'}


@pytest.fixture(scope='module')
def modules(tmp_path_factory):
  """Returns {name: module} of the recipes, in the working directory; registers their family."""
  folder = tmp_path_factory.mktemp('recipes')
  for name, code in RECIPES.items():
    (folder / name).write_text(code)
  names = [pathlib.Path(name).stem for name in RECIPES]
  with pytest.MonkeyPatch.context() as patch:
    patch.chdir(folder)
    patch.syspath_prepend(folder)
    loaded = {name: importlib.import_module(name) for name in names}
    patch.setitem(families.FAMILIES, 'capped_llama', loaded['capped_llama'])
    patch.setitem(models.CLASSES, 'capped_llama', models.Model)
    yield loaded
  for name in names:
    sys.modules.pop(name)


@pytest.fixture(scope='module')
def run(modules, tmp_path_factory):
  """Returns the folder of a run of all recipes."""
  folder = tmp_path_factory.mktemp('run')
  model, tokenizer = models.create(FIELDS), tiny.write_tokenizer(folder / 'base')
  hf.save(folder / 'base', model, model.init(jax.random.key(0)), tokenizer=tokenizer)
  config = modules['counting_config'].get_config(f'debug,model={folder / "base"}')
  config.rl.algorithm = 'policy_gradient'
  config.rl.data.max_prompt_length = 6
  config.rl.evals.weights = {'function': 'weight_norm:make', 'every': None}
  config.rl.reward.function = None
  config.rl.reward.parts = {
    'brevity': {'function': 'brevity:brevity'},
    'correct': {'function': 'counting:correct'},
  }
  config.rl.samples_every = 1
  pipeline.run(config, folder / 'run')
  return folder / 'run'


def test_recipes_are_formatted_and_clean(modules):
  folder = pathlib.Path(modules['brevity'].__file__).parent
  for command in (['format', '--check'], ['check']):
    done = subprocess.run(
      [sys.executable, '-m', 'ruff', *command, '--config', ROOT / 'pyproject.toml', folder],
      capture_output=True,
      text=True,
      check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_task_writes_its_files(run):
  records = [json.loads(line) for line in (run / 'data' / 'prompts.jsonl').read_text().splitlines()]
  assert len(records) == 512
  assert records[51] == {'prompt': 'w1 w2', 'answer': 'w3'}


def test_rewards_are_those_of_the_texts(run):
  samples = metrics.read_samples(run / 'rl')
  assert len(samples) == 64
  for sample in samples:
    words = sample['response'].split()
    answer = f'w{int(sample["prompt"].split()[1][1:]) + 1}'
    assert sample['score'] == pytest.approx(1 - len(words) / 8 + (answer in words))


def test_the_evaluator_measures_the_exported_policy(run):
  last = metrics.read(run / 'rl')[-1]
  _, params = hf.load(run / 'rl' / 'model')[:2]
  squares = sum(np.square(np.asarray(x, np.float64)).sum() for x in jax.tree.leaves(params))
  assert last['weights/norm'] == pytest.approx(np.sqrt(squares), rel=1e-5)


def test_the_loss_by_hand(modules):
  """-(2 log .5 - 1 log .25) over 2 sequences; the third token is masked."""
  outputs = forward.Outputs(logprobs=jnp.log(jnp.array([[0.5, 0.9], [0.25, 0.7]])), entropy=None)
  mask = jnp.array([[True, False], [True, False]])
  batch = types.Experience(
    tokens=None,
    mask=None,
    response_mask=mask,
    step_mask=mask,
    logprobs=None,
    advantages=jnp.array([[2.0, 5.0], [-1.0, 5.0]]),
  )
  counts = update.Counts(tokens=2, steps=2, sequences=2)
  loss, found = modules['policy_gradient'].loss(outputs, batch, counts)
  right = -(2 * np.log(0.5) - 1 * np.log(0.25)) / 2
  assert loss == pytest.approx(right) == found['policy/loss']


def test_the_family_caps_scores(modules):
  """30 tanh(s / 30) is about s for small scores; for large ones the models differ."""
  tokens = positions = np.arange(8)[None].astype(np.int32)
  mask = np.ones((1, 8), bool)

  def logits(family, scale):
    model = models.create(FIELDS | {'family': family})
    params = jax.tree.map(lambda x: scale * x, model.init(jax.random.key(0)))
    states, _ = model.forward(params, tokens, positions, mask)
    return model.unembed(params, states)

  assert jnp.allclose(logits('llama', 1.0), logits('capped_llama', 1.0), atol=1e-3)
  assert not jnp.allclose(logits('llama', 30.0), logits('capped_llama', 30.0), atol=1e-3)
