"""Encoder-decoders in the algorithms: rollouts, a PPO update against torch, and a task to learn.

The reference of the update runs transformers' T5 in double precision on one episode at a time,
without padding. references.py computes PPO's quantities, torch the gradients.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import references
from rlhf_jax import forward
from rlhf_jax import models
from rlhf_jax import policy as policy_lib
from rlhf_jax import types
from rlhf_jax.algorithms import ppo
from rlhf_jax.algorithms import reward_model
from rlhf_jax.algorithms import setup
from rlhf_jax.algorithms import sft
from rlhf_jax.models import hf
from rlhf_jax.rollout import decode
from rlhf_jax.rollout import sampling as sampling_lib
import tiny

START, EOS, VOCAB = 0, 1, 13
P, R = 5, 4
PROMPTS = (1, 5, 2, 3, 4, 1)  # lengths; B = 6
RESPONSES = (4, 1, 3, 2, 4, 4)
ENDED = (True, True, True, True, False, True)
RATE = 0.02
FIELDS = {
  'family': 't5',
  'vocab_size': VOCAB,
  'd_model': 10,
  'd_kv': 3,
  'd_ff': 12,
  'num_layers': 2,
  'num_decoder_layers': 1,
  'num_heads': 2,
  'relative_attention_num_buckets': 6,
  'relative_attention_max_distance': 5,
  'pad_token_id': START,
  'eos_token_id': EOS,
}
FIRST = models.create(FIELDS)
FLAN = models.create(FIELDS | {'feed_forward_proj': 'gated-gelu', 'tie_word_embeddings': False})


class Reference:
  """PPO on T5 models of transformers in double precision, written out.

  Args:
    folder: Temporary folder.
    model: Seq2Seq of policy, reference and critic.
    params: {'policy', 'critic': {'head', 'backbone' if there is one}}.
    frozen: Parameters of the reference policy.
    config: ConfigDict.
  """

  def __init__(self, folder, model, params, frozen, config):
    torch = pytest.importorskip('torch')
    transformers = pytest.importorskip('transformers')

    def make(name, params):
      hf.save(folder / name, model, params)
      made = transformers.AutoModelForSeq2SeqLM.from_pretrained(
        folder / name, attn_implementation='eager'
      )
      return made.double().eval()

    self.torch, self.config = torch, config
    self.policy, self.frozen = make('policy', params['policy']), make('frozen', frozen)
    self.critic = (
      make('critic', params['critic']['backbone']) if 'backbone' in params['critic'] else None
    )
    self.head = {
      name: torch.tensor(np.asarray(leaf, np.float64), requires_grad=True)
      for name, leaf in params['critic']['head'].items()
    }
    self.adam = references.Adam(b1=0.9, b2=0.999, eps=config.optim.eps, tensorflow=False)

  def states(self, t5, episode):
    """Returns the decoder's states [length, D] that predict each token of the response."""
    one = lambda ids: self.torch.tensor([ids])
    encoded = t5.encoder(input_ids=one(episode['prompt'])).last_hidden_state
    shifted = one([START] + episode['response'][:-1])
    return t5.decoder(input_ids=shifted, encoder_hidden_states=encoded).last_hidden_state[0]

  def logprobs(self, t5, episode):
    """Returns log-probabilities [length] and entropies."""
    states = self.states(t5, episode)
    if t5.config.scale_decoder_outputs:
      states = states * t5.config.d_model**-0.5
    every = self.torch.log_softmax(t5.lm_head(states), dim=-1)
    return every[range(len(states)), episode['response']], -(every.exp() * every).sum(dim=-1)

  def values(self, episode):
    return (
      self.states(self.critic or self.policy, episode) @ self.head['kernel'] + self.head['bias']
    )

  def parameters(self):
    """Returns all trained parameters by name."""
    owners = {'policy': self.policy} | ({'critic': self.critic} if self.critic else {})
    found = {
      f'{owner}/{name}': parameter
      for owner, t5 in owners.items()
      for name, parameter in t5.named_parameters()
    }
    return found | {f'head/{name}': leaf for name, leaf in self.head.items()}

  def experience(self, episodes):
    """Returns tables [B, R], which are 0 outside the responses."""
    c = self.config.rl
    lengths = [len(e['response']) for e in episodes]
    table = lambda function: np.array(
      [np.pad(function(e).detach().numpy(), (0, R - len(e['response']))) for e in episodes]
    )
    x = {
      'logp': table(lambda e: self.logprobs(self.policy, e)[0]),
      'values': table(self.values),
      'ref': table(lambda e: self.logprobs(self.frozen, e)[0]),
    }
    kl = references.kl_estimate(x['logp'], x['ref'], 'k1')
    rewards = references.token_rewards(
      [e['score'] for e in episodes], kl, c.kl_coef, lengths, position='eos'
    )
    x['advantages'], x['returns'] = references.gae(
      rewards, x['values'], lengths, gamma=c.gamma, lam=c.lam
    )
    mask = [[t < n for t in range(R)] for n in lengths]
    x['advantages'] = references.whiten(x['advantages'], mask, shift_mean=True, bessel=False)
    return x | {'kl': kl}

  def minibatch(self, episodes, x, rows):
    """Takes one Adam step; returns statistics."""
    c, count = self.config.rl, sum(len(episodes[i]['response']) for i in rows)
    parameters = self.parameters()
    stats = dict.fromkeys(
      (
        'policy/loss',
        'policy/ratio',
        'policy/clipfrac',
        'value/loss',
        'value/clipfrac',
        'policy/entropy_per_token',
      ),
      0.0,
    )
    total = 0.0  # a sum whose gradient is that of the loss
    for i in rows:
      (logprobs, entropies), values = (
        self.logprobs(self.policy, episodes[i]),
        self.values(episodes[i]),
      )
      for t in range(len(logprobs)):
        loss, clipped, ratio, by_logp = references.policy_loss(
          logprobs[t].item(),
          x['logp'][i, t],
          x['advantages'][i, t],
          clip_low=c.clip_low,
          clip_high=c.clip_high,
        )
        value_loss, value_clipped, by_value = references.value_loss(
          values[t].item(), x['values'][i, t], x['returns'][i, t], bound=c.value_clip
        )
        total = (
          total
          + (
            by_logp * logprobs[t] + c.vf_coef * by_value * values[t] - c.entropy_coef * entropies[t]
          )
          / count
        )
        for name, number in (
          ('policy/loss', loss),
          ('policy/ratio', ratio),
          ('policy/clipfrac', clipped),
          ('value/loss', value_loss),
          ('value/clipfrac', value_clipped),
          ('policy/entropy_per_token', entropies[t].item()),
        ):
          stats[name] += number / count
    gradients = self.torch.autograd.grad(total, list(parameters.values()), allow_unused=True)
    arrays = {name: parameter.detach().numpy().copy() for name, parameter in parameters.items()}
    gradients = {
      name: np.zeros_like(arrays[name]) if g is None else g.numpy()
      for name, g in zip(parameters, gradients)
    }
    with self.torch.no_grad():
      for name, array in self.adam.step(arrays, gradients, RATE).items():
        parameters[name].copy_(self.torch.tensor(array))
    return stats

  def iteration(self, episodes, orders):
    """Runs one PPO iteration; returns statistics."""
    x, minibatches, collected = self.experience(episodes), self.config.rl.minibatches, []
    for order in orders:
      for rows in np.split(np.asarray(order), minibatches):
        collected.append(self.minibatch(episodes, x, list(rows)))
    stats = {name: references.mean([c[name] for c in collected]) for name in collected[0]}
    return stats | {'objective/kl': x['kl'].sum() / len(episodes)}


def make_episodes(rng):
  others = np.arange(2, VOCAB)
  episodes = []
  for n, m, ended in zip(PROMPTS, RESPONSES, ENDED):
    response = rng.choice(others, m).tolist()
    response[-1] = EOS if ended else response[-1]
    episodes.append(
      {
        'prompt': rng.choice(others, n).tolist(),
        'response': response,
        'score': float(np.float32(rng.normal())),
      }
    )
  return episodes


def make_rollout(rng, episodes):
  """Returns the episodes as a Rollout with random padding, and scores."""
  tokens = rng.integers(0, VOCAB, (len(episodes), P + R)).astype(np.int32)
  mask = np.zeros(tokens.shape, bool)
  for i, e in enumerate(episodes):
    here = slice(P - len(e['prompt']), P + len(e['response']))
    tokens[i, here], mask[i, here] = e['prompt'] + e['response'], True
  rollout = types.Rollout(
    tokens=tokens,
    mask=mask,
    response_mask=mask[:, P:],
    logprobs=np.zeros((len(episodes), R), np.float32),
  )
  return jax.tree.map(jnp.asarray, rollout), jnp.array([e['score'] for e in episodes], jnp.float32)


def make_params(rng, model, critic):
  """Returns policy and critic, and a reference near the policy."""
  draw = lambda scale, tree: jax.tree.map(
    lambda leaf: leaf + (scale * rng.normal(size=leaf.shape)).astype(np.float32), tree
  )
  head = {'kernel': rng.normal(0, 0.3, model.width).astype(np.float32), 'bias': np.float32(0.1)}
  policy, other = draw(0.1, model.init(jax.random.key(0))), draw(0.3, zeros(model))
  backbone = {'backbone': other} if critic == 'separate' else {}
  return {'policy': policy, 'critic': backbone | {'head': head}}, draw(0.05, policy)


def zeros(model):
  return jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), model.shapes())


@pytest.mark.parametrize(
  'model,critic', [(FIRST, 'separate'), (FLAN, 'trunk')], ids=['first', 'flan']
)
def test_ppo_update_agrees_with_torch(model, critic, tmp_path):
  """Two epochs of two minibatches."""
  config = ppo.config()
  config.optim.update({'learning_rate': RATE, 'eps': 1e-3})
  config.rl.update({'epochs': 2, 'minibatches': 2, 'kl_coef': 0.3, 'entropy_coef': 0.05})
  rng = np.random.default_rng(1)
  episodes = make_episodes(rng)
  params, frozen = make_params(rng, model, critic)
  reference = Reference(tmp_path, model, params, frozen, config)

  optimizers = dict.fromkeys(params, setup.make_optimizer(config.optim, 4))
  state = types.TrainState(
    step=jnp.int32(0),
    key=jax.random.key(3),
    params=params,
    opt_state={name: optimizers[name].init(params[name]) for name in params},
    extra={'kl_coef': jnp.float32(config.rl.kl_coef), 'reward_moments': jnp.zeros(3)},
  )
  keys = jax.random.split(types.step_keys(state)[1], config.rl.epochs)
  expected = reference.iteration(
    episodes, [jax.random.permutation(key, len(episodes)) for key in keys]
  )
  step = jax.jit(
    functools.partial(
      ppo.train_step,
      models=forward.Models(model, model if critic == 'separate' else None),
      optimizers=optimizers,
      settings=ppo.Settings.of(config, (EOS,)),
    )
  )
  state, metrics = step(
    state, {'policy': {}, 'reference': frozen}, *make_rollout(rng, episodes), None
  )

  assert metrics['policy/first_ratio'] == pytest.approx(1.0, abs=1e-5)
  for name, value in expected.items():
    np.testing.assert_allclose(metrics[name], value, rtol=1e-4, atol=1e-5, err_msg=name)
  assert expected['policy/clipfrac'] > 0 and expected['value/clipfrac'] > 0, (
    'the clips have to bite'
  )
  after = Reference(tmp_path / 'after', model, state.params, frozen, config).parameters()
  before = Reference(tmp_path / 'before', model, params, frozen, config).parameters()
  trained = reference.parameters()
  assert sorted(after) == sorted(trained)
  for name, parameter in trained.items():
    np.testing.assert_allclose(
      after[name].detach(), parameter.detach(), rtol=0, atol=2e-4, err_msg=name
    )
  moved = [
    (trained[name] - before[name]).detach().abs().max().item()
    for name in trained
    if 'policy/' in name
  ]
  assert np.mean(np.array(moved) > RATE / 4) > 0.8


def test_rollout_has_the_logprobs_of_its_policy():
  """Token-by-token sampling and one forward pass agree, so PPO's first ratio is 1."""
  params = FLAN.init(jax.random.key(5))
  rng = np.random.default_rng(0)
  mask = np.arange(P)[None] >= P - np.array(PROMPTS)[:, None]
  prompts = types.Prompts(jnp.asarray(rng.integers(2, VOCAB, mask.shape)), jnp.asarray(mask))
  sampling = sampling_lib.Sampling(max_new_tokens=R, eos_id=EOS, pad_id=START)
  generate = jax.jit(functools.partial(decode.generate, model=FLAN, sampling=sampling))
  rollout = generate(params, prompts, jax.random.key(1))
  lengths = rollout.response_mask.sum(axis=1)
  assert 1 <= lengths.min() < lengths.max() == R, 'rows have to end at different times'

  @jax.jit
  def logprobs(params, rollout):
    states = FLAN.response_states(params, rollout.tokens, rollout.mask, R)
    every = jax.nn.log_softmax(FLAN.unembed(params, states))
    return jnp.take_along_axis(every, rollout.tokens[:, P:, None], axis=-1)[..., 0]

  found = np.where(rollout.response_mask, logprobs(params, rollout), 0.0)
  np.testing.assert_allclose(found, rollout.logprobs, rtol=0, atol=1e-5)


# RL4LMs' toy task (Ramamurthy et al. 2022, https://arxiv.org/abs/2210.01241): continue a number
# with increasing numbers.
NUMBERS, SLOTS = 20, 5
SMALL_FLAN = {
  'family': 't5',
  'd_model': 32,
  'd_kv': 8,
  'd_ff': 64,
  'num_layers': 1,
  'num_decoder_layers': 1,
  'num_heads': 4,
  'relative_attention_num_buckets': 8,
  'relative_attention_max_distance': 16,
  'feed_forward_proj': 'gated-gelu',
  'tie_word_embeddings': False,
  'pad_token_id': tiny.PAD,
}


def increasing_numbers(prompts, responses, *, response_tokens, metadata):
  """Returns the length of the increasing prefix of a response divided by its maximum length."""
  del response_tokens, metadata
  rewards = []
  for prompt, response in zip(prompts, responses):
    numbers = [int(word[1:]) for word in f'{prompt} {response}'.split()]
    larger = [after > before for before, after in zip(numbers, numbers[1:])] + [False]
    rewards.append(larger.index(False) / SLOTS)
  return rewards


@pytest.fixture(scope='module')
def task(tmp_path_factory):
  """Returns a folder with a tokenizer of the numbers, prompts and correct responses."""
  folder = tmp_path_factory.mktemp('numbers')
  tiny.write_tokenizer(folder / 'tokenizer', words=NUMBERS)
  starts = range(NUMBERS - SLOTS)
  tiny.write_jsonl(folder / 'prompts.jsonl', [{'prompt': f'w{i}'} for i in starts])
  tiny.write_jsonl(
    folder / 'answers.jsonl',
    [
      {'prompt': f'w{i}', 'completion': ' '.join(f'w{i + 1 + t}' for t in range(SLOTS))}
      for i in starts
    ],
  )
  return folder


def from_nothing(config, task, file):
  config.model.init = SMALL_FLAN
  config.tokenizer, config.data.path = str(task / 'tokenizer'), str(task / file)
  config.optim.learning_rate = 3e-3
  return config


def sft_config(task, steps):
  config = from_nothing(sft.config(), task, 'answers.jsonl')
  config.data.kind, config.data.max_length = 'completion', 16
  config.batch_size, config.steps = 32, steps
  return config


def ppo_config(task, steps):
  config = from_nothing(ppo.config(), task, 'prompts.jsonl')
  config.data.max_prompt_length, config.sampling.max_new_tokens = 3, SLOTS
  config.reward.function = f'{__name__}:increasing_numbers'
  config.rl.kl_coef, config.batch_size, config.steps = 0.001, 64, steps
  return config


def test_sft_and_ppo_take_steps_from_a_config(task):
  _, _, history, _ = tiny.train(sft, sft_config(task, 3), 3)
  assert np.isfinite([metrics['loss'] for metrics in history]).all()
  learner, _, history, _ = tiny.train(ppo, ppo_config(task, 2), 2)
  assert all(np.isfinite(metrics['policy/loss']) for metrics in history)
  assert history[0]['policy/first_ratio'] == pytest.approx(1.0, abs=1e-4)
  assert history[0]['objective/scores'] < 0.5, 'the task begins unsolved'


@pytest.mark.slow
def test_sft_learns_increasing_numbers(task):
  """The responses are deterministic, so the loss falls to 0."""
  _, _, history, _ = tiny.train(sft, sft_config(task, 100), 100)
  assert history[0]['loss'] > 2.0
  assert history[-1]['loss'] < 0.1


@pytest.mark.slow
def test_ppo_learns_increasing_numbers(task):
  """Trains from random weights on the reward alone."""
  _, _, history, _ = tiny.train(ppo, ppo_config(task, 60), 60)
  scores = [metrics['objective/scores'] for metrics in history]
  assert scores[0] < 0.35
  assert np.mean(scores[-10:]) > 0.9


@pytest.mark.slow
def test_reward_model_learns_the_order_and_trains_ppo(task, tmp_path):
  """PPO reads the exported folder as its reward model and as the initial critic."""
  rng = np.random.default_rng(0)
  rows = [rng.choice(NUMBERS, 4, replace=False) for _ in range(300)]
  text = lambda row: ' '.join(f'w{number}' for number in row)
  tiny.write_jsonl(
    task / 'comparisons.jsonl',
    [
      {'prompt': 'w0', 'chosen': text(sorted(row)), 'rejected': text(sorted(row)[::-1])}
      for row in rows
    ],
  )
  config = from_nothing(reward_model.config(), task, 'comparisons.jsonl')
  config.data.held_out, config.steps = 0.2, 60
  learner, state, _, held_out = tiny.train(reward_model, config, 60)
  assert held_out['held_out/accuracy'] > 0.95
  learner.export(state, tmp_path / 'reward')
  config = ppo_config(task, 2)
  config.reward.update({'function': '', 'model': str(tmp_path / 'reward')})
  learner, state, history, _ = tiny.train(ppo, config, 2)
  assert 'backbone' in state.params['critic']
  assert np.isfinite([metrics['objective/scores'] for metrics in history]).all()
  learner.export(state, tmp_path / 'policy')
  policy = policy_lib.TextPolicy.load(tmp_path / 'policy')
  assert len(policy.sample(['w1', 'w2'], jax.random.key(0), max_new_tokens=SLOTS).responses) == 2
