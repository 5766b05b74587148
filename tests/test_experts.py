"""Experts: merged weights by hand, their base model, and the choice by nearest prompts."""

import dataclasses
import gzip
import json
import random
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file
from sklearn.feature_extraction.text import TfidfVectorizer

from rlhf_jax import experts
from rlhf_jax import generate
from rlhf_jax import merge
from rlhf_jax.algorithms import setup
from rlhf_jax.errors import UserError
from rlhf_jax.models import hf
from rlhf_jax.models import lora as lora_lib
from rlhf_jax.models import peft
from rlhf_jax.models import trainable
from rlhf_jax.policy import TextPolicy
import tiny

# Targets and scale of two experts: they share the queries.
TARGETS = {
  'law': ((('query$', 2, 4.0), ('mlp/up$', 3, 1.5)), False),
  'math': ((('(query|value)$', 4, 2.0),), True),
}


@pytest.fixture(scope='module')
def base(world):
  return TextPolicy.load(world / 'model')


def write_adapter(folder, name, base, unfrozen_layers=None):
  """Writes what a run of an adapter of random weights exports; returns the folder of the run."""
  targets, rslora = TARGETS[name]
  model = dataclasses.replace(base.model, lora=lora_lib.Lora(targets, rslora=rslora))
  params = jax.tree.map(jnp.copy, base.params)
  adapters, frozen = trainable.split_trainable(model, params, unfrozen_layers=unfrozen_layers)
  rng = np.random.default_rng(len(name))
  adapters = jax.tree.map(lambda x: jnp.asarray(0.3 * rng.normal(size=x.shape)), adapters)
  setup.save(folder / name / 'model', model, adapters, frozen, tokenizer=base.tokenizer)
  return folder / name


@pytest.fixture(scope='module')
def runs(base, tmp_path_factory):
  folder = tmp_path_factory.mktemp('experts')
  return {name: write_adapter(folder, name, base) for name in TARGETS}


def by_hand(world, weighted):
  """Returns the tensors W + sum of w_i s_i B_i A_i, read from the adapters' files."""
  tensors = load_file(world / 'model' / 'model.safetensors')
  for run, weight in weighted:
    config = json.loads((run / 'adapter' / 'adapter_config.json').read_text())
    factors = load_file(run / 'adapter' / 'adapter_model.safetensors')
    for name in [name for name in factors if name.endswith('.lora_A.weight')]:
      a, b = factors[name], factors[name.replace('lora_A', 'lora_B')]
      module = name.removeprefix('base_model.model.').removesuffix('.lora_A.weight')
      alpha = next(
        alpha for key, alpha in config['alpha_pattern'].items() if peft.re.match(f'{key}$', module)
      )
      scale = alpha / (len(a) ** 0.5 if config['use_rslora'] else len(a))
      tensors[f'{module}.weight'] = tensors[f'{module}.weight'] + weight * scale * (b @ a)
  return tensors


def test_the_command_merges_by_weight(world, base, runs, tmp_path, monkeypatch, capsys):
  output = tmp_path / 'merged'
  arguments = [f'--adapter={runs["law"]}:0.75', f'--adapter={runs["math"] / "adapter"}:-0.5']
  command = ['rlhf merge', f'--model={world / "model"}', *arguments, f'--output={output}']
  monkeypatch.setattr(sys, 'argv', command)
  merge.start()
  assert f'model: {output}/model; adapter: {output}/adapter' in capsys.readouterr().out
  expected = by_hand(world, [(runs['law'], 0.75), (runs['math'], -0.5)])
  found = load_file(output / 'model' / 'model.safetensors')
  assert found.keys() == expected.keys()
  for name, value in expected.items():
    np.testing.assert_allclose(found[name], value, rtol=0, atol=1e-5, err_msg=name)
  changed = load_file(world / 'model' / 'model.safetensors')
  assert sum(np.abs(found[name] - changed[name]).max() > 0.01 for name in found) == 6

  # The one adapter does the same to the base model as the merged weights, as does `merge`.
  prompts, responses = ['w1 w2', 'w3'], ['w4 w5', 'w6 w7 w8']
  whole = TextPolicy.load(output).logprobs(prompts, responses)
  for adapters in ([(output, 1.0)], [(runs['law'], 0.75), (runs['math'], -0.5)]):
    found = experts.merge(base, adapters).logprobs(prompts, responses)
    np.testing.assert_allclose(found, whole, rtol=0, atol=1e-5)
  assert np.abs(whole - base.logprobs(prompts, responses)).max() > 0.01
  with pytest.raises(UserError, match=f'{output} exists: name a new folder'):
    experts.save(output, base, [(output, 1.0)])


def test_ranks_are_added_where_targets_meet(base, runs):
  model, adapters = experts.combine(base, [(run, 0.5) for run in runs.values()])
  leaves = {name: x.shape for name, x in experts.lora_lib.sharding.paths(adapters).items()}
  ranks = {name: shape[-1] for name, shape in leaves.items() if name.endswith('/a')}
  attention = 'blocks/attention/{}/lora/a'.format
  assert ranks == {attention('query'): 6, attention('value'): 4, 'blocks/mlp/up/lora/a': 3}
  assert all(
    model.lora.find(name.removesuffix('/lora/a')) == (rank, 1.0) for name, rank in ranks.items()
  )


@pytest.mark.parametrize('unfrozen_layers', [None, 1])
def test_the_base_is_known_by_its_weights(world, base, unfrozen_layers, tmp_path):
  run = write_adapter(tmp_path, 'law', base, unfrozen_layers)
  for dtype in ('float32', 'bfloat16'):  # whichever dtype it is loaded with
    _, params = hf.load(world / 'model', param_dtype=dtype)
    assert peft.check_base(run / 'adapter', peft.base_checksum(params))
  other = dataclasses.replace(base, params=jax.tree.map(lambda x: x * 1.01, base.params))
  with pytest.raises(UserError, match='law/adapter: this adapter was trained on a base model with'):
    experts.merge(other, [(run, 1.0)])


def test_adapters_of_others_are_merged_with_a_warning(base, runs, tmp_path, caplog):
  model, adapters = experts.combine(base, [(runs['law'], 1.0)])
  peft.save(tmp_path / 'theirs', model, adapters)
  experts.merge(base, [(tmp_path / 'theirs', 1.0)])
  assert 'theirs does not tell its base model; only the shapes were checked' in caplog.text


def test_mistakes_are_named(world, base, tmp_path):
  with pytest.raises(UserError, match=r'model: holds no adapter \(adapter_config\.json\)'):
    experts.merge(base, [(world / 'model', 1.0)])
  for text in ('runs/law', 'runs/law:', ':1', 'runs/law:x', 'a:nan'):
    with pytest.raises(UserError, match='must have the form FOLDER:WEIGHT, such as runs/law:0.5'):
      merge.parse_adapter(text)
  assert merge.parse_adapter('C:/runs/law:-.5') == ('C:/runs/law', -0.5)
  with pytest.raises(UserError, match='--expert=runs/law must have the form ADAPTER:DATA'):
    generate.by_experts(base, ['w1'], ['runs/law'], None)


# The choice.


def test_the_expert_with_the_nearest_prompts_answers():
  law = [f'The court of {city} has to decide the case.' for city in ('Bern', 'Oslo', 'Rome')]
  maths = [f'Tom buys {n} apples. How many apples has he?' for n in range(150)]
  prompts = ['Which court decides?', 'How many apples did Ann buy?', 'a case in Oslo']
  assert experts.choose(prompts, [law, maths], neighbours=3).tolist() == [0, 1, 0]
  assert experts.choose(prompts, [maths, law], neighbours=3).tolist() == [1, 0, 1]


def test_prompts_of_another_kind_do_not_vote_against_an_expert():
  """All training prompts vote. That of the first expert which is the prompt has 20 unlike it."""
  examples = [['red', *['six seven'] * 20], ['red six']]
  assert experts.choose(['red'], examples, neighbours=22).tolist() == [0]


def test_votes_are_centered_cosines_by_a_loop():
  draw = random.Random(0)
  sentence = lambda words: ' '.join(draw.choices(words.split(), k=draw.randint(1, 6)))
  examples = [
    [sentence(words) for _ in range(count)]
    for words, count in (('red green blue', 9), ('green blue five six', 5), ('six seven', 7))
  ]
  prompts = [sentence('red green five six seven nothing') for _ in range(12)]
  flat = [text for texts in examples for text in texts]
  settings = dict(sublinear_tf=True, analyzer='char_wb', ngram_range=(2, 4))
  vectorizer = TfidfVectorizer(**settings).fit(flat)
  known, asked = (vectorizer.transform(texts).toarray() for texts in (flat, prompts))
  mean = (known[:9].mean(0) + known[9:14].mean(0) + known[14:].mean(0)) / 3
  expected = []
  for vector in asked:
    scored = []
    for owner, other in zip([0] * 9 + [1] * 5 + [2] * 7, known):
      x, y = vector - mean, other - mean
      scored.append((x @ y / np.linalg.norm(x) / np.linalg.norm(y), owner))
    votes = [0.0, 0.0, 0.0]
    for cosine, owner in sorted(scored, reverse=True)[:4]:
      votes[owner] += max(cosine, 0)
    expected.append(int(np.argmax(votes)))
  assert experts.choose(prompts, examples, neighbours=4).tolist() == expected
  assert len(set(expected)) == 3


def test_real_prompts_find_their_data_set(shared):
  """Reviews, dialogues, mathematics and instructions: 100 known of each, 60 others."""
  data = shared / 'data'
  dialogues = gzip.open(data / 'hh-rlhf/harmless-base/test.jsonl.gz', 'rt', encoding='utf-8')
  alpaca = json.loads((data / 'instructions/alpaca_en_demo.json').read_text())
  sets = [
    (data / 'rt-polarity/rt-polarity.pos').read_bytes().decode('latin-1').splitlines(),
    [json.loads(line)['chosen'].rpartition('\n\nAssistant:')[0] for line in dialogues],
    [json.loads(line)['question'] for line in (data / 'gsm8k/train.jsonl').open()],
    [f'{record["instruction"]}\n\n{record["input"]}' for record in alpaca],
  ]
  for texts in sets:
    random.Random(0).shuffle(texts)  # a sample of each data set
  prompts = [text for texts in sets for text in texts[100:160]]
  found = experts.choose(prompts, [texts[:100] for texts in sets])
  assert np.mean(found == np.repeat(np.arange(4), 60)) > 0.93


def test_generate_samples_from_the_chosen_expert(world, base, runs, tmp_path, capsys):
  sample = lambda policy, prompts: (
    policy.sample(prompts, temperature=0, max_new_tokens=4, samples=2).responses
  )
  data = {'law': ['w1 w2', 'w3 w4'], 'math': ['w51 w52', 'w55 w56']}
  values = []
  for name, prompts in data.items():
    path = tiny.write_jsonl(tmp_path / f'{name}.jsonl', [{'prompt': text} for text in prompts])
    values.append(f'{runs[name]}:{path}')
  prompts = ['w51', 'w1', 'w56']
  found = generate.by_experts(base, prompts, values, sample)
  expected = [
    response
    for prompt, name in zip(prompts, ('math', 'law', 'math'))
    for response in sample(experts.merge(base, [(runs[name], 1.0)]), [prompt])
  ]
  assert found == expected and len(found) == 6
  lines = capsys.readouterr().err.splitlines()
  assert lines == [
    f"'{prompt}': expert {runs[name]}" for prompt, name in zip(prompts, ('math', 'law', 'math'))
  ]
