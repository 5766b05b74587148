"""Distillation: divergences, what student and teacher read, and what the student learns."""

import functools
import json
import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import references
from rlhf_jax import advantages as adv
from rlhf_jax import errors
from rlhf_jax import logprobs
from rlhf_jax import losses
from rlhf_jax import sharding
from rlhf_jax import types
from rlhf_jax.algorithms import build
from rlhf_jax.algorithms import distillation
from rlhf_jax.algorithms import distillation_data
from rlhf_jax.data import tokenizers
from rlhf_jax.models import hf
import tiny

GOLDEN = np.load(pathlib.Path(__file__).parents[1] / 'golden' / 'trl_gkd.npz')
CASES = json.loads(str(GOLDEN['settings']))
close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)


def divergence_by_loops(logits, teacher_logits, kind, beta):
  """Returns a divergence of two distributions, given as sequences of logits."""
  if kind == 'reverse_kl':
    return references.full_kl(logits, teacher_logits)
  if kind == 'forward_kl':
    return references.full_kl(teacher_logits, logits)
  total = 0.0
  student, teacher = references.log_softmax(logits), references.log_softmax(teacher_logits)
  for p, q in zip(map(math.exp, student), map(math.exp, teacher)):
    middle = beta * q + (1 - beta) * p
    total += beta * q * math.log(q / middle) + (1 - beta) * p * math.log(p / middle)
  return total


@pytest.mark.parametrize('chunk', [70, 28])
@pytest.mark.parametrize('kind', losses.DIVERGENCES)
def test_divergences_in_chunks_agree_with_loops(kind, chunk):
  """The student has width 3, the teacher width 4."""
  fn = jax.jit(
    lambda kernel, teacher_kernel, hidden, teacher_hidden: logprobs.compare(
      functools.partial(losses.divergence, kind=kind, beta=0.3),
      lambda h: h @ kernel,
      hidden,
      lambda h: h @ teacher_kernel,
      teacher_hidden,
      temperature=0.7,
      chunk=chunk,
    )
  )
  rng = np.random.default_rng(1)
  h, g, w, u = (
    rng.normal(size=shape).astype(np.float32) for shape in [(2, 5, 3), (2, 5, 4), (3, 7), (4, 7)]
  )
  p, q = (x.astype(np.float64) @ k.astype(np.float64) / 0.7 for x, k in [(h, w), (g, u)])
  expected = [
    divergence_by_loops(*rows, kind, 0.3) for rows in zip(p.reshape(10, 7), q.reshape(10, 7))
  ]
  close(fn(w, u, h, g).ravel(), expected)


def test_divergences_by_hand():
  """p = (1/2, 1/2) and q = (1/4, 3/4); with beta 1/2 the mixture is (3/8, 5/8)."""
  p, q = jnp.log(jnp.array([0.5, 0.5])), jnp.log(jnp.array([0.25, 0.75]))
  close(losses.divergence(p, q, kind='reverse_kl'), 0.5 * math.log(2) + 0.5 * math.log(2 / 3))
  close(losses.divergence(p, q, kind='forward_kl'), -0.25 * math.log(2) + 0.75 * math.log(1.5))
  teacher = 0.25 * math.log(2 / 3) + 0.75 * math.log(6 / 5)  # KL(q || m)
  student = 0.5 * math.log(4 / 3) + 0.5 * math.log(4 / 5)  # KL(p || m)
  close(losses.divergence(p, q, kind='jsd'), 0.5 * teacher + 0.5 * student)
  with pytest.raises(ValueError, match='tv'):
    losses.divergence(p, q, kind='tv')


@pytest.mark.parametrize('case', CASES)
def test_divergences_and_gradients_agree_with_trl(case):
  beta, temperature = CASES[case]['beta'], CASES[case]['temperature']
  kind = {0.0: 'forward_kl', 1.0: 'reverse_kl'}.get(beta, 'jsd')

  def loss(logits):
    scaled = logits / temperature, GOLDEN['teacher_logits'] / temperature
    return adv.masked_mean(losses.divergence(*scaled, kind=kind, beta=beta), GOLDEN['mask'])

  found, gradients = jax.jit(jax.value_and_grad(loss))(GOLDEN['logits'])
  close(found, GOLDEN[f'{case}/loss'])
  close(gradients, GOLDEN[f'{case}/gradients'])


def punch(batch):
  """Returns a batch whose second response tokens are read but are no targets."""
  return batch.replace(response_mask=batch.response_mask.at[:, 1].set(False))


def unpadded(batch):
  """Yields the ids of the prompt and of the response of each sequence, and which are targets."""
  response = batch.response_mask.shape[1]
  for ids, mask, targets in zip(*map(np.asarray, (batch.tokens, batch.mask, batch.response_mask))):
    keep = mask[-response:]
    yield ids[:-response][mask[:-response]], ids[-response:][keep], targets[keep]


@functools.partial(jax.jit, static_argnums=0)
def padded_logits(model, params, tokens, mask):
  """Returns the logits [R, V] that predict R = 12 response tokens of one sequence."""
  return model.unembed(params, model.response_states(params, tokens, mask, 12)[0])


def logits_of(model, params, prompt, response):
  """Returns the logits that predict the tokens of one response, float64."""
  tokens, mask = np.zeros((1, 24), np.int32), np.zeros((1, 24), bool)
  place = slice(12 - len(prompt), 12 + len(response))
  tokens[0, place], mask[0, place] = np.concatenate([prompt, response]), True
  logits = padded_logits(model, params, tokens, mask)[: len(response)]
  return np.asarray(logits, np.float64)


def expected_means(config, student, batches):
  """Returns the mean divergences of whole batches, computed one sequence and token at a time."""
  block, temperature = config.distillation, config.sampling.temperature
  tokenizer = tokenizers.load(config.model.path)
  teacher = hf.load(block.teacher)
  if student[0].encoder_decoder:
    tokenizers.set_encoder_decoder(tokenizer)
  sums, count = dict.fromkeys(('reverse_kl', 'forward_kl', 'jsd'), 0.0), 0
  for batch, _ in batches:
    for prompt, response, targets in unpadded(batch):
      text = tokenizer.decode(prompt, skip_special_tokens=True)
      (after_context,) = tokenizers.encode(tokenizer, [block.context + text])
      logits = logits_of(*student, prompt, response)[targets]
      teacher_logits = logits_of(*teacher, after_context, response)[targets, : logits.shape[1]]
      for rows in zip(logits / temperature, teacher_logits / temperature):
        count += 1
        for kind in sums:
          sums[kind] += divergence_by_loops(*rows, kind, block.beta)
  return {kind: total / count for kind, total in sums.items()}


T5 = {
  'family': 't5',
  'vocab_size': tiny.VOCAB,
  'd_model': 12,
  'd_kv': 4,
  'd_ff': 12,
  'num_layers': 1,
  'num_heads': 2,
  'pad_token_id': tiny.PAD,
  'eos_token_id': tiny.EOS,
}


@pytest.mark.parametrize('family', ['llama', 't5'])
def test_a_train_step_agrees_with_loops_over_single_sequences(family, world, tmp_path):
  """Half of the batch are samples, half completions; one token of each is no target."""
  config = tiny.distillation(world, 'gkd')
  config.distillation.beta = 0.3
  config.batch_size, config.microbatch_size = 4, 2
  if family == 't5':
    tiny.write_model(tmp_path / 'student', T5)
    tiny.write_model(tmp_path / 'teacher', T5 | {'d_model': 16, 'num_layers': 2})
    config.model.path = str(tmp_path / 'student')
    config.distillation.teacher = str(tmp_path / 'teacher')
  mesh = sharding.make_mesh({}, devices=jax.devices()[:1])
  with jax.set_mesh(mesh):
    learner, state = distillation.create(config, mesh)
    (frozen, batches), _ = learner.next_batch(state, timed=False)
    batches = tuple((punch(batch), prompts) for batch, prompts in batches)
    assert [type(batch) for batch, _ in batches] == [types.Rollout, types.Pairs]
    expected = expected_means(config, hf.load(config.model.path), batches)
    _, metrics = learner.train_step(state, frozen, batches)
  close(metrics['distillation/reverse_kl'], expected['reverse_kl'])
  close(metrics['distillation/forward_kl'], expected['forward_kl'])
  close(metrics['distillation/loss'], expected['jsd'])
  close(metrics['response/length'], np.sum(batches[0][0].response_mask) / 2)
  assert expected['jsd'] > 0.01


def reverse_kls(config, steps):
  """Returns the reverse KL before each of some steps."""
  _, _, history, _ = tiny.train(distillation, config, steps)
  return [float(metrics['distillation/reverse_kl']) for metrics in history]


@pytest.mark.parametrize('preset, ratio', [('', 0.8), ('offline', 0.5)])
def test_a_student_becomes_like_its_teacher(preset, ratio, world):
  """The teacher is random, so a smaller student does not reach it."""
  config = tiny.distillation(world, preset)
  config.optim.learning_rate = 1e-2
  kls = reverse_kls(config, 40)
  assert np.mean(kls[-5:]) < ratio * kls[0]


@pytest.mark.parametrize(
  'targets, learning_rate', [((), 1e-2), ((('attention|mlp', 4, 8.0),), 2e-2)], ids=['full', 'lora']
)
def test_a_student_learns_a_context(targets, learning_rate, world):
  """The teacher is the initial model, so without a context it would be the student."""
  config = tiny.distillation(world)
  config.model.path, config.distillation.teacher = config.distillation.teacher, None
  config.model.lora.targets = targets
  config.optim.learning_rate = learning_rate
  kls = reverse_kls(config, 40)
  assert 0.01 < np.mean(kls[-5:]) < 0.8 * kls[0]


def make(config):
  """Creates the learner on one device, and traces a train step."""
  mesh = sharding.make_mesh({}, devices=jax.devices()[:1])
  with jax.set_mesh(mesh):
    learner, state = distillation.create(config, mesh)
    batch, _ = learner.next_batch(state, timed=False)
    jax.eval_shape(learner.train_step, state, *batch)


def test_a_teacher_with_other_tokens_is_refused(world, tmp_path):
  config = tiny.distillation(world)
  config.distillation.teacher = str(tmp_path)
  tiny.write_model(tmp_path, tiny.LLAMA)
  tiny.write_tokenizer(tmp_path, words=tiny.WORDS - 1)
  with pytest.raises(errors.UserError, match="1 tokens differ, such as 'w59', whose ids are None"):
    make(config)
  tiny.write_model(tmp_path, T5)
  with pytest.raises(errors.UserError, match='a t5 model, and the student a llama model'):
    make(config)


def test_a_context_is_a_text_or_a_file(world, tmp_path):
  config = tiny.distillation(world)
  path = tmp_path / 'context.txt'
  config.distillation.context = str(path)
  with pytest.raises(errors.UserError, match='context.txt.: no such file'):
    make(config)
  path.write_text('w1 w2\n')
  assert distillation_data.read_context(config) == 'w1 w2\n'
  for text in ('w1 w2', 'see a.txt\n', 'and /or'):
    config.distillation.context = text
    assert distillation_data.read_context(config) == text


@pytest.mark.parametrize('path', ['/my context', './my context', '~/my context', 'my context.txt'])
def test_a_missing_file_is_no_context(path, world):
  config = tiny.distillation(world)
  config.distillation.context = path
  with pytest.raises(errors.UserError, match=f"config.distillation.context='{path}': no such file"):
    distillation_data.read_context(config)


@pytest.mark.parametrize(
  'content, message', [(b'', 'the file is empty'), (b' \n', 'empty'), (b'w1 \xe9', 'not UTF-8')]
)
def test_a_file_without_a_context_is_refused(content, message, world, tmp_path):
  config = tiny.distillation(world)
  config.distillation.context = str(tmp_path / 'my context')
  (tmp_path / 'my context').write_bytes(content)
  with pytest.raises(errors.UserError, match=f"my context': .*{message}"):
    distillation_data.read_context(config)


@pytest.mark.parametrize('fraction, steps', [(0.0, 4), (0.25, 5), (0.5, 8), (0.75, 16), (1.0, 4)])
def test_an_epoch_reads_each_completion_once(fraction, steps, world, tmp_path):
  """64 examples, 16 a batch; 12, 8 or 4 completions of them if the student samples the rest."""
  config = tiny.distillation(world)
  records = [{'prompt': 'w1', 'completion': f'w{i % 60}'} for i in range(64)]
  config.data.path = str(tiny.write_jsonl(tmp_path / 'a.jsonl', records))
  config.distillation.student_fraction = fraction
  config.steps, config.data.epochs = None, 1
  mesh = sharding.make_mesh({}, devices=jax.devices()[:1])
  with jax.set_mesh(mesh):
    learner, _ = distillation.create(config, mesh)
  assert learner.steps == steps


def test_a_context_that_is_too_long_is_refused(world):
  config = tiny.distillation(world)
  config.distillation.context = 'w1 ' * 40
  with pytest.raises(
    errors.UserError, match='reads up to 4. tokens of config.distillation.context'
  ):
    make(config)


@pytest.mark.parametrize(
  'values, message',
  [
    ({'teacher': None, 'context': None}, 'teacher and config.distillation.context are both empty'),
    ({'loss': 'kl'}, "config.distillation.loss='kl' must be one of reverse_kl, forward_kl, jsd"),
    ({'beta': 1.0}, r'config.distillation.beta=1.0 must be in \(0, 1\)'),
    ({'student_fraction': 0.3}, 'student_fraction=0.3 must be from 0 to 1 and give a whole number'),
    ({'student_fraction': 0.25}, 'student_fraction . config.batch_size=4 does not divide over'),
  ],
)
def test_bad_values_are_named(values, message, world):
  config = tiny.distillation(world)
  config.distillation.update(values)
  with pytest.raises(errors.UserError, match=message):
    build.validate(config, 8)


def test_offline_distillation_samples_nothing(world):
  config = tiny.distillation(world, 'offline')
  config.sampling.max_concurrent = 8  # without effect
  build.validate(config, 8)
  config.sampling.temperature = 0.0
  with pytest.raises(errors.UserError, match='must be positive: it divides the logits of both'):
    build.validate(config, 8)


def test_a_context_needs_all_prompts(world):
  config = tiny.distillation(world)
  config.data.on_long = 'drop'
  with pytest.raises(errors.UserError, match="config.data.on_long='drop' would drop different"):
    build.validate(config, 8)
