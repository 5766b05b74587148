"""Logits, gradients, cached decoding and files of random small models against transformers.

Three configurations of every family run here, the other 21 with the mark 'slow'. Texts do not
contain the padding token, because transformers does not train its embedding.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import quick

from rlhf_jax.models import heads
from rlhf_jax.models import hf
from rlhf_jax.types import positions_from_mask

torch = pytest.importorskip('torch')
transformers = pytest.importorskip('transformers')

import families  # Needs transformers.

LENGTH, PROMPT = families.LENGTH, 6
SEEDS, QUICK_SEEDS = 24, 3
FIRST_TOKEN = 3  # lower ids are special tokens in all references


def draw_batch(vocab_size, seed):
  """Returns tokens [5, T] and mask: padded left (two), right, not at all, and all but one token."""
  tokens = (
    np.random.default_rng(seed).integers(FIRST_TOKEN, vocab_size, (5, LENGTH)).astype(np.int32)
  )
  mask = np.ones((5, LENGTH), bool)
  mask[0, :3] = False
  mask[1, : PROMPT - 1] = False
  mask[2, 9:] = False
  mask[4, :-1] = False
  return tokens, mask


def next_tokens(mask):
  """Returns [B, T - 1]: whether a token and the next one are real."""
  return mask[:, :-1] & mask[:, 1:]


def their_logits(reference, tokens, mask):
  """Returns logits [B, T, V], a torch tensor."""
  positions = np.array(positions_from_mask(jnp.asarray(mask)))
  return reference(
    torch.tensor(tokens).long(),
    attention_mask=torch.tensor(mask).long(),
    position_ids=torch.tensor(positions).long(),
  ).logits


@functools.partial(jax.jit, static_argnames='model', compiler_options=quick.OPTIONS)
def evaluate(model, params, tokens, mask):
  """Returns hidden states, logits and the gradient of the mean LM loss."""

  def loss(params):
    hidden, _ = model.forward(params, tokens, positions_from_mask(mask), mask)
    logits = model.unembed(params, hidden)
    logprobs = jnp.take_along_axis(
      jax.nn.log_softmax(logits[:, :-1]), tokens[:, 1:, None], axis=-1
    )[..., 0]
    return -jnp.mean(logprobs, where=next_tokens(mask)), (hidden, logits)

  gradient, (hidden, logits) = jax.grad(loss, has_aux=True)(params)
  return hidden, logits, gradient


@functools.partial(jax.jit, static_argnames='model', compiler_options=quick.OPTIONS)
def decode(model, params, tokens, mask):
  """Returns states [B, T - P + 1, D] from the last prompt token on, read token by token."""
  state, cache = model.prefill(params, tokens[:, :PROMPT], mask[:, :PROMPT], LENGTH - PROMPT)

  def step(cache, token_and_alive):
    hidden, cache = model.step(params, *token_and_alive, cache)
    return cache, hidden

  _, states = jax.lax.scan(step, cache, (tokens[:, PROMPT:].T, mask[:, PROMPT:].T))
  return jnp.concatenate([state[:, None], states.swapaxes(0, 1)], axis=1)


@dataclasses.dataclass
class Case:
  """A reference, its folder, the model that we read from it, and the results of both on a batch."""

  reference: object
  folder: object
  seed: int

  def __post_init__(self):
    self.reference.set_attn_implementation('eager')
    self.reference.save_pretrained(self.folder / 'theirs')
    self.model, self.params = hf.load(self.folder / 'theirs')
    self.tokens, self.mask = draw_batch(self.model.vocab_size, self.seed)

  @functools.cached_property
  def theirs(self):
    """The reference's logits, and {name: gradient}."""
    logits = their_logits(self.reference, self.tokens, self.mask)
    wanted = torch.tensor(next_tokens(self.mask))
    targets = torch.tensor(self.tokens[:, 1:]).long()
    torch.nn.functional.cross_entropy(logits[:, :-1][wanted], targets[wanted]).backward()
    gradients = {
      name: parameter.grad.numpy() for name, parameter in self.reference.named_parameters()
    }
    return logits.detach().numpy(), gradients

  @functools.cached_property
  def ours(self):
    """Our hidden states, logits and gradient."""
    return evaluate(self.model, self.params, self.tokens, jnp.asarray(self.mask))


def assert_near(ours, theirs, relative, *, floor=0.0):
  """Asserts that the difference is at most a fraction of the largest number."""
  np.testing.assert_allclose(ours, theirs, rtol=0, atol=max(relative * np.abs(theirs).max(), floor))


@pytest.fixture(
  scope='module',
  params=[
    pytest.param(
      (family, seed), id=f'{family}-{seed}', marks=() if seed < QUICK_SEEDS else pytest.mark.slow
    )
    for family in families.FAMILIES
    for seed in range(SEEDS)
  ],
)
def case(request, tmp_path_factory):
  family, seed = request.param
  return Case(families.FAMILIES[family](seed), tmp_path_factory.mktemp(family), seed)


def test_logits_agree_at_real_positions(case):
  theirs = case.theirs[0][case.mask]
  assert np.abs(theirs).max() > 0.1, 'a model without signal tests nothing'
  assert_near(np.asarray(case.ours[1])[case.mask], theirs, 2e-4)


def test_gradients_agree(case):
  """The gradients of all parameters, saved as weights to get transformers' names."""
  hf.save(case.folder / 'gradient', case.model, case.ours[2])
  ours = dict(
    transformers.AutoModelForCausalLM.from_pretrained(case.folder / 'gradient').named_parameters()
  )
  theirs = case.theirs[1]
  assert sorted(ours) == sorted(theirs)
  # Some are zero up to rounding: biases of keys, without rotary positions.
  floor = 1e-6 * max(np.abs(gradient).max() for gradient in theirs.values())
  for name, gradient in theirs.items():
    assert_near(ours[name].detach().numpy(), gradient, 1e-3, floor=floor)


def test_cached_decode_equals_full_forward(case):
  decoded = decode(case.model, case.params, case.tokens, jnp.asarray(case.mask))
  full = np.asarray(case.ours[0])[:, PROMPT - 1 :]
  compared = (
    case.mask[:, PROMPT - 1 :] & case.mask[:, PROMPT - 1 : PROMPT]
  )  # sequences without a prompt are not decoded
  assert_near(np.asarray(decoded)[compared], full[compared], 1e-5)


def test_saved_folder_loads_in_transformers_and_in_ours(case):
  hf.save(case.folder / 'ours', case.model, case.params, max_shard_bytes=1000)
  assert len(list((case.folder / 'ours').glob('*.safetensors'))) > 1
  reloaded = transformers.AutoModelForCausalLM.from_pretrained(
    case.folder / 'ours', attn_implementation='eager'
  )
  assert type(reloaded) is type(case.reference)
  with torch.no_grad():
    logits = their_logits(reloaded.eval(), case.tokens, case.mask).numpy()
  assert_near(logits[case.mask], case.theirs[0][case.mask], 1e-5)
  again, params_again = hf.load(case.folder / 'ours')
  assert again == case.model
  jax.tree.map(np.testing.assert_array_equal, params_again, case.params)


@pytest.mark.parametrize('family', families.FAMILIES)
def test_reward_model_of_transformers(family, tmp_path):
  """Each computes scores from the other's file of a sequence classifier with one label."""
  config = families.FAMILIES[family](3).config
  config.num_labels = 1
  reference = families.randomize(
    transformers.AutoModelForSequenceClassification.from_config(config), 3
  )
  reference.save_pretrained(tmp_path / 'theirs')
  model, params = hf.load_reward(tmp_path / 'theirs')
  tokens, mask = draw_batch(model.vocab_size, 0)
  tokens, mask = (
    tokens[2:4],
    mask[2:4],
  )  # theirs also counts padding in positions
  tokens[~mask] = config.pad_token_id

  @jax.jit
  def score(params, tokens, mask):
    return heads.apply_scalar(params['head'], model.summary(params['backbone'], tokens, mask))

  def their_scores(reference):
    with torch.no_grad():
      return reference(
        torch.tensor(tokens).long(), attention_mask=torch.tensor(mask).long()
      ).logits.numpy()[:, 0]

  assert_near(np.asarray(score(params, tokens, jnp.asarray(mask))), their_scores(reference), 2e-4)
  hf.save(tmp_path / 'ours', model, params['backbone'], head=params['head'])
  reloaded = transformers.AutoModelForSequenceClassification.from_pretrained(
    tmp_path / 'ours'
  ).eval()
  assert reloaded.config.num_labels == 1
  assert_near(their_scores(reloaded), their_scores(reference), 1e-5)


def test_bfloat16_file_and_parameters(tmp_path):
  """Files in half precision are read; parameters have the requested dtype."""
  reference = families.llama(4).to(torch.bfloat16)
  reference.save_pretrained(tmp_path)
  _, wide = hf.load(tmp_path)
  _, narrow = hf.load(tmp_path, param_dtype='bfloat16')
  name = 'model.layers.0.mlp.up_proj.weight'
  theirs = reference.state_dict()[name].float().numpy().T
  np.testing.assert_array_equal(np.asarray(wide['blocks']['mlp']['up']['kernel'][0]), theirs)
  assert wide['blocks']['mlp']['up']['kernel'].dtype == jnp.float32
  assert narrow['blocks']['mlp']['up']['kernel'].dtype == jnp.bfloat16


def test_scores_divided_by_the_number_of_the_layer_unrolled(tmp_path):
  """In unrolled layers, the layer's index is an int, which has no dtype."""

  def build(**fields):
    return families.randomize(
      transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
          vocab_size=29, n_positions=LENGTH, n_embd=12, n_layer=3, n_head=3, **fields
        )
      ),
      0,
    )

  reference = build(scale_attn_by_inverse_layer_idx=True)
  reference.save_pretrained(tmp_path)
  model, params = hf.load(tmp_path, unroll=None)
  tokens, mask = draw_batch(29, 0)
  rows = mask[:, PROMPT - 1]  # sequences with a prompt
  tokens, mask = tokens[rows], mask[rows]
  states = decode(model, model.unstack(params), tokens, jnp.asarray(mask))
  ours, real = np.asarray(model.unembed(params, states)), mask[:, PROMPT - 1 :]
  theirs, other = (
    their_logits(reference, tokens, mask).detach().numpy()[:, PROMPT - 1 :][real]
    for reference in (reference, build())
  )
  assert_near(ours[real], theirs, 2e-4)
  assert np.abs(theirs - other).max() > 0.01  # the key has an effect
