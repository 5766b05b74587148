"""T5 against transformers: logits, gradients, decoding and files; and its invariances.

Three random configurations run here, the other 21 with the mark 'slow'.
"""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax import models
from rlhf_jax import sharding
from rlhf_jax.errors import UserError
from rlhf_jax.models import heads
from rlhf_jax.models import hf
from rlhf_jax.models import lora as lora_lib
from rlhf_jax.models import t5
from rlhf_jax.models import trainable

torch = pytest.importorskip('torch')
transformers = pytest.importorskip('transformers')

import families  # Needs transformers.

PROMPT, RESPONSE = 9, 6
SEEDS, QUICK_SEEDS = 24, 3
START, EOS = 0, 1
KINDS = [
  'relu',
  'gated-gelu',
  'gelu',
  'gated-silu',
  'gelu_new',
  'silu',
  'gated-relu',
  'gated-gelu_new',
]
FLAN = {
  'family': 't5',
  'vocab_size': 31,
  'd_model': 12,
  'd_kv': 5,
  'd_ff': 20,
  'num_layers': 2,
  'num_decoder_layers': 3,
  'num_heads': 4,
  'relative_attention_num_buckets': 8,
  'relative_attention_max_distance': 12,
  'feed_forward_proj': 'gated-gelu',
  'tie_word_embeddings': False,
  'pad_token_id': 0,
  'eos_token_id': 1,
}
FIRST = FLAN | {'feed_forward_proj': 'relu', 'tie_word_embeddings': True}


def draw_config(seed, **more):
  """Returns a random transformers config; the seed selects kinds of layers and unembeddings."""
  draw = np.random.default_rng(seed)
  buckets = int(draw.integers(4, 17))
  return transformers.T5Config(
    vocab_size=int(draw.integers(17, 60)),
    d_model=int(draw.integers(6, 21)),
    d_kv=int(draw.integers(2, 8)),
    d_ff=int(draw.integers(7, 40)),
    num_layers=int(draw.integers(1, 4)),
    num_decoder_layers=int(draw.integers(1, 4)),
    num_heads=int(draw.integers(1, 4)),
    relative_attention_num_buckets=buckets,
    relative_attention_max_distance=buckets // 2 + int(draw.integers(1, 9)),
    layer_norm_epsilon=families.pick(draw, [1e-6, 1e-3]),
    feed_forward_proj=KINDS[seed % len(KINDS)],
    initializer_factor=0.5,
    tie_word_embeddings=seed % 3 == 0,
    decoder_start_token_id=START,
    eos_token_id=EOS,
    pad_token_id=0,
    **more,
  )


def t5_reference(seed):
  """Returns a random T5: tied with scaled outputs, untied, or tied without a scale."""
  reference = transformers.T5ForConditionalGeneration(draw_config(seed))
  if seed % 3 == 1:
    reference.lm_head.weight = torch.nn.Parameter(torch.zeros_like(reference.lm_head.weight))
  return families.randomize(reference, seed)


def draw_batch(vocab_size, seed):
  """Returns tokens [4, P + R] and mask: prompts padded on either side, and ragged responses."""
  tokens = (
    np.random.default_rng(seed).integers(2, vocab_size, (4, PROMPT + RESPONSE)).astype(np.int32)
  )
  mask = np.ones(tokens.shape, bool)
  mask[1, : PROMPT - 5], mask[2, : PROMPT - 1], mask[3, 6:PROMPT] = False, False, False
  for row, length in enumerate((6, 4, 6, 1)):
    mask[row, PROMPT + length :] = False
  return tokens, mask


def their_logits(reference, tokens, mask):
  """Returns logits [B, R, V], a torch tensor."""
  tokens, mask = torch.tensor(tokens).long(), torch.tensor(mask).long()
  shifted = torch.cat([torch.full((len(tokens), 1), START), tokens[:, PROMPT:-1]], dim=1)
  return reference(
    tokens[:, :PROMPT], attention_mask=mask[:, :PROMPT], decoder_input_ids=shifted
  ).logits


@functools.partial(jax.jit, static_argnames='model')
def respond(model, params, tokens, mask):
  """Returns hidden states and logits of the responses."""
  hidden = model.response_states(params, tokens, mask, RESPONSE)
  return hidden, model.unembed(params, hidden)


@functools.partial(jax.jit, static_argnames='model')
def evaluate(model, params, tokens, mask):
  """Returns these, and the gradient of the responses' mean loss."""

  def loss(params):
    hidden, logits = respond(model, params, tokens, mask)
    logprobs = jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[:, PROMPT:, None], axis=-1)[
      ..., 0
    ]
    return -jnp.mean(logprobs, where=mask[:, PROMPT:]), (hidden, logits)

  gradient, (hidden, logits) = jax.grad(loss, has_aux=True)(params)
  return hidden, logits, gradient


@functools.partial(jax.jit, static_argnames='model')
def decode(model, params, tokens, mask):
  """Returns states [B, R, D], read token by token."""
  state, cache = model.prefill(params, tokens[:, :PROMPT], mask[:, :PROMPT], RESPONSE)

  def step(cache, token_and_alive):
    hidden, cache = model.step(params, *token_and_alive, cache)
    return cache, hidden

  _, states = jax.lax.scan(step, cache, (tokens[:, PROMPT:-1].T, mask[:, PROMPT:-1].T))
  return jnp.concatenate([state[:, None], states.swapaxes(0, 1)], axis=1)


@functools.partial(jax.jit, static_argnames='model')
def summarize(model, params, tokens, mask):
  return model.summary(params, tokens, mask)


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
    self.wanted = self.mask[:, PROMPT:]

  @functools.cached_property
  def theirs(self):
    """The reference's logits in all slots; also computes the gradients of its parameters."""
    logits = their_logits(self.reference, self.tokens, self.mask)
    targets = torch.tensor(self.tokens[:, PROMPT:]).long()
    torch.nn.functional.cross_entropy(logits[self.wanted], targets[self.wanted]).backward()
    return logits.detach().numpy()

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
    pytest.param(seed, marks=() if seed < QUICK_SEEDS else pytest.mark.slow)
    for seed in range(SEEDS)
  ],
)
def case(request, tmp_path_factory):
  return Case(t5_reference(request.param), tmp_path_factory.mktemp('t5'), request.param)


def test_logits_agree(case):
  theirs = case.theirs[case.wanted]
  assert np.abs(theirs).max() > 0.1, 'a model without signal tests nothing'
  assert_near(np.asarray(case.ours[1])[case.wanted], theirs, 2e-4)


def test_unembedding_and_its_scale_are_those_of_the_file(case):
  config = case.model.config
  assert config.tie_word_embeddings == (case.seed % 3 != 1)
  assert config.scale_decoder_outputs == (case.seed % 3 == 0)


def test_gradients_agree(case):
  """The gradients of all parameters, saved as weights to get transformers' names."""
  case.theirs  # noqa: B018  computes the gradients
  hf.save(case.folder / 'gradient', case.model, case.ours[2])
  ours = dict(
    transformers.AutoModelForSeq2SeqLM.from_pretrained(case.folder / 'gradient').named_parameters()
  )
  theirs = {name: parameter.grad.numpy() for name, parameter in case.reference.named_parameters()}
  assert sorted(ours) == sorted(theirs)
  floor = 1e-6 * max(np.abs(gradient).max() for gradient in theirs.values())
  for name, gradient in theirs.items():
    assert_near(ours[name].detach().numpy(), gradient, 1e-3, floor=floor)


def test_cached_decode_equals_full_forward(case):
  decoded = decode(case.model, case.params, case.tokens, jnp.asarray(case.mask))
  assert_near(np.asarray(decoded)[case.wanted], np.asarray(case.ours[0])[case.wanted], 1e-5)


def test_saved_folder_loads_in_transformers_and_in_ours(case):
  hf.save(case.folder / 'ours', case.model, case.params, max_shard_bytes=3000)
  assert len(list((case.folder / 'ours').glob('*.safetensors'))) > 1
  reloaded = transformers.AutoModelForSeq2SeqLM.from_pretrained(
    case.folder / 'ours', attn_implementation='eager'
  )
  assert type(reloaded) is type(case.reference)
  with torch.no_grad():
    logits = their_logits(reloaded.eval(), case.tokens, case.mask).numpy()
  assert_near(logits[case.wanted], case.theirs[case.wanted], 1e-5)
  again, params_again = hf.load(case.folder / 'ours')
  assert again == case.model
  jax.tree.map(np.testing.assert_array_equal, params_again, case.params)


def draw_texts(vocab_size):
  """Returns texts of different lengths that end with the EOS, right-padded, and their mask."""
  tokens = np.random.default_rng(5).integers(2, vocab_size, (3, 11)).astype(np.int32)
  mask = np.arange(11)[None] < np.array([11, 7, 2])[:, None]
  tokens[np.arange(3), mask.sum(axis=1) - 1] = EOS
  return np.where(mask, tokens, 0), mask


def test_reward_model_of_transformers(case):
  """Scores of T5ForSequenceClassification, whose head has a dense layer; we read and write it."""
  config = draw_config(case.seed, num_labels=1)
  reference = families.randomize(transformers.T5ForSequenceClassification(config), case.seed)
  reference.save_pretrained(case.folder / 'their_reward')
  model, params = hf.load_reward(case.folder / 'their_reward')
  tokens, mask = draw_texts(model.vocab_size)

  def their_scores(reference):
    with torch.no_grad():
      return reference(
        torch.tensor(tokens).long(), attention_mask=torch.tensor(mask).long()
      ).logits.numpy()[:, 0]

  score = heads.apply_scalar(
    params['head'], summarize(model, params['backbone'], tokens, jnp.asarray(mask))
  )
  assert_near(np.asarray(score), their_scores(reference), 2e-4)
  hf.save(case.folder / 'our_reward', model, params['backbone'], head=params['head'])
  reloaded = transformers.AutoModelForSequenceClassification.from_pretrained(
    case.folder / 'our_reward'
  ).eval()
  assert reloaded.config.num_labels == 1
  assert_near(their_scores(reloaded), their_scores(reference), 1e-5)


@pytest.fixture(scope='module', params=[FIRST, FLAN], ids=['first', 'flan'])
def built(request):
  model = models.create(request.param)
  return model, model.init(jax.random.key(0))


def test_reward_model_of_ours_is_read_again(built, tmp_path):
  """With a linear head on the decoder's state, which transformers does not have."""
  model, params = built
  head = heads.init_scalar(jax.random.key(1), model.width, scale='normal') | {
    'bias': jnp.float32(0.5)
  }
  hf.save(tmp_path / 'reward', model, params, head=head)
  again, both = hf.load_reward(tmp_path / 'reward')
  assert json.loads((tmp_path / 'reward' / 'config.json').read_text())['architectures'] == [
    t5.CLASSIFIER
  ]
  jax.tree.map(np.testing.assert_array_equal, both['head'], head)
  tokens, mask = draw_texts(model.vocab_size)
  np.testing.assert_array_equal(
    *(
      summarize(m, p, tokens, jnp.asarray(mask))
      for m, p in ((model, params), (again, both['backbone']))
    )
  )
  with pytest.raises(UserError, match='it is a reward model'):
    hf.load(tmp_path / 'reward')


def test_prompt_padded_on_either_side_or_not_at_all(built):
  """No response state changes."""
  model, params = built
  draw = np.random.default_rng(1)
  prompt, response = draw.integers(2, 31, 4), draw.integers(2, 31, RESPONSE)
  alone = respond(
    model, params, np.concatenate([prompt, response])[None], np.ones((1, 4 + RESPONSE), bool)
  )[0]
  tokens = draw.integers(0, 31, (3, PROMPT + RESPONSE))
  mask = np.zeros(tokens.shape, bool)
  mask[:, PROMPT:], tokens[:, PROMPT:] = True, response
  for row, before in enumerate((0, 2, PROMPT - 4)):
    mask[row, before : before + 4], tokens[row, before : before + 4] = True, prompt
  padded = np.asarray(respond(model, params, tokens, mask)[0])
  np.testing.assert_allclose(padded, np.broadcast_to(alone, padded.shape), rtol=0, atol=1e-5)


def test_garbage_in_padded_slots_changes_nothing(built):
  """Padding with any ids changes no bit; a sequence without a prompt has no NaN."""
  model, params = built
  tokens, mask = draw_batch(31, seed=2)
  mask[0, :PROMPT] = False
  clean, wanted = evaluate(model, params, tokens, jnp.asarray(mask)), mask[:, PROMPT:]
  for garbage in (0, -100, 10**6):
    dirty = evaluate(model, params, np.where(mask, tokens, garbage), jnp.asarray(mask))
    np.testing.assert_array_equal(np.asarray(dirty[1])[wanted], np.asarray(clean[1])[wanted])
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(dirty))


def test_summary_does_not_depend_on_the_position_of_the_text(built):
  """The text is padded left or right, or has masked tokens inside."""
  model, params = built
  text = np.random.default_rng(3).integers(2, 31, 5).astype(np.int32)
  alone = summarize(model, params, text[None], np.ones((1, 5), bool))
  places = np.array([[0, 1, 2, 3, 4], [6, 7, 8, 9, 10], [0, 2, 3, 7, 10]])
  tokens, mask = np.full((4, 11), 30, np.int32), np.zeros((4, 11), bool)
  for row, place in enumerate(places):
    tokens[row, place], mask[row, place] = text, True
  summaries = np.asarray(summarize(model, params, tokens, mask))
  np.testing.assert_allclose(
    summaries[:3], np.broadcast_to(alone, (3, model.width)), rtol=0, atol=1e-5
  )
  assert np.isfinite(summaries).all()


def test_cache_holds_the_tokens_read(built):
  model, params = built
  tokens, mask = draw_batch(31, seed=4)
  alive = np.array([True, False, True, True])

  @jax.jit
  def read(params):
    _, cache = model.prefill(params, tokens[:, :PROMPT], mask[:, :PROMPT], RESPONSE)
    return cache, model.step(params, tokens[:, PROMPT], alive, cache)[1]

  before, after = read(params)
  config = model.config
  shape = config.num_decoder_layers, 4, config.num_heads
  assert after['k'].shape == after['v'].shape == (*shape, RESPONSE, config.d_kv)
  assert after['cross_k'].shape == after['cross_v'].shape == (*shape, PROMPT, config.d_kv)
  np.testing.assert_array_equal(before['cross_k'], after['cross_k'])
  assert (int(before['index']), int(after['index'])) == (1, 2)
  np.testing.assert_array_equal(
    after['segments'][:, :3], [[1, 1, 0], [1, 0, 0], [1, 1, 0], [1, 1, 0]]
  )


def test_frozen_states_are_refused(built):
  model, params = built
  with pytest.raises(ValueError, match='no frozen states'):
    model.response_states(
      params, *map(jnp.asarray, draw_batch(31, 0)), RESPONSE, frozen_states=jnp.zeros(())
    )


@functools.cache
def states_and_gradient(**settings):
  model = models.create(FLAN, **settings)
  tokens, mask = draw_batch(31, 6)
  hidden, _, gradient = evaluate(model, model.init(jax.random.key(1)), tokens, jnp.asarray(mask))
  return hidden, gradient


@pytest.mark.parametrize(
  'settings', [{'remat': 'block'}, {'remat': 'dots', 'unroll': 8}, {'unroll': 2}]
)
def test_remat_and_unroll_change_no_value(settings):
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5),
    states_and_gradient(**settings),
    states_and_gradient(),
  )


def test_bfloat16_computes_in_bfloat16_and_gives_float32_logits():
  wide, narrow = models.create(FLAN), models.create(FLAN, dtype='bfloat16')
  params = wide.init(jax.random.key(0))
  tokens, mask = draw_batch(31, 7)
  expected, found = (respond(model, params, tokens, mask) for model in (wide, narrow))
  assert found[0].dtype == jnp.bfloat16 and found[1].dtype == jnp.float32
  assert np.abs(found[1] - expected[1]).mean() < 0.05 * np.abs(expected[1]).mean()
  decoded = decode(narrow, params, tokens, jnp.asarray(mask))
  assert decoded.dtype == jnp.bfloat16


def test_initialization_has_the_configured_scale():
  model = models.create(
    FLAN | {'d_model': 64, 'd_kv': 16, 'd_ff': 256, 'vocab_size': 500, 'initializer_factor': 0.5}
  )
  params = sharding.paths(model.init(jax.random.key(0)))
  for name, deviation in {
    'embed/embedding': 1,
    'unembed/kernel': 64**-0.5,
    'encoder/distances/embedding': 64**-0.5,
    'encoder/blocks/attention/query/kernel': (64 * 16) ** -0.5,
    'decoder/blocks/cross/key/kernel': 64**-0.5,
    'decoder/blocks/cross/out/kernel': (4 * 16) ** -0.5,
    'decoder/blocks/mlp/gate/kernel': 64**-0.5,
    'encoder/blocks/mlp/down/kernel': 256**-0.5,
  }.items():
    np.testing.assert_allclose(
      params[name].std(), 0.5 * deviation, rtol=0.25 if 'distances' in name else 0.03
    )
  assert not np.array_equal(*params['encoder/blocks/mlp/up/kernel'])


def test_eight_devices_compute_what_one_does():
  """Parameters and adapters are split over 2 x 2 x 2 devices by the sharding rules."""
  lora = lora_lib.Lora(targets=(('query|down|unembed', 2, 4.0),))
  model = dataclasses.replace(
    models.create(FLAN | {'vocab_size': 32, 'd_kv': 6, 'pooled': True}), lora=lora
  )
  params = model.init(jax.random.key(0))
  both = trainable.merge(params, lora_lib.init(jax.random.key(1), params, lora))
  tokens, mask = draw_batch(32, 9)
  alone = respond(model, both, tokens, mask)
  mesh = sharding.make_mesh({'data': 2, 'fsdp': 2, 'tensor': 2})
  split = jax.device_put(both, sharding.shardings(both, model.rules, mesh))
  with jax.set_mesh(mesh):
    together = respond(model, split, *sharding.put_rows((tokens, mask), mesh))
  assert_near(np.asarray(together[1]), np.asarray(alone[1]), 1e-5)


def test_adapters_are_read_on_both_sides():
  """The model with adapters equals the one into which they are merged, also in decoding."""
  lora = lora_lib.Lora(
    targets=(
      ('encoder/blocks/attention/(query|value)', 2, 4.0),
      ('decoder/blocks/cross', 3, 3.0),
      ('decoder/blocks/mlp/gate', 1, 1.0),
      ('unembed', 2, 2.0),
    )
  )
  plain = models.create(FLAN)
  adapted = dataclasses.replace(plain, lora=lora)
  params = plain.init(jax.random.key(0))
  adapters = lora_lib.init(jax.random.key(1), params, lora)
  draw = np.random.default_rng(0)
  adapters = jax.tree.map(lambda leaf: draw.normal(0, 0.3, leaf.shape).astype(np.float32), adapters)
  both = trainable.merge(params, adapters)
  tokens, mask = draw_batch(31, 8)
  expected = respond(plain, lora_lib.merge(params, adapters, lora), tokens, mask)
  found = evaluate(adapted, both, tokens, jnp.asarray(mask))
  assert_near(np.asarray(found[1]), np.asarray(expected[1]), 1e-5)
  assert np.abs(expected[1] - respond(plain, params, tokens, mask)[1]).max() > 0.1
  wanted = mask[:, PROMPT:]
  assert_near(
    np.asarray(decode(adapted, both, tokens, jnp.asarray(mask)))[wanted],
    np.asarray(found[0])[wanted],
    1e-5,
  )
  reached = {
    name
    for name, leaf in sharding.paths(found[2]).items()
    if 'lora' in name and np.abs(leaf).max() > 0
  }
  assert reached == set(sharding.paths(adapters))


@pytest.mark.parametrize(
  'count,max_distance', [(32, 128), (16, 128), (8, 20), (4, 3), (5, 7), (17, 40), (32, 17)]
)
def test_buckets_are_those_of_transformers(count, max_distance):
  """Distances up to 700, in one direction and in both."""
  theirs = transformers.models.t5.modeling_t5.T5Attention._relative_position_bucket
  offset = torch.arange(-700, 701)
  one_way = theirs(
    offset[:701], bidirectional=False, num_buckets=count, max_distance=max_distance
  ).numpy()[::-1]
  np.testing.assert_array_equal(t5.causal_buckets(count, max_distance, 701), one_way)
  both_ways = theirs(
    offset, bidirectional=True, num_buckets=count, max_distance=max_distance
  ).numpy()
  table, half = t5.causal_buckets(count // 2, max_distance, 701), count // 2
  distances = offset.numpy()
  np.testing.assert_array_equal(table[np.abs(distances)] + half * (distances > 0), both_ways)


@pytest.mark.parametrize(
  'changed,words',
  [
    ({'feed_forward_proj': 'gated-tanh'}, 'feed_forward_proj="gated-tanh"'),
    ({'dense_act_fn': 'relu'}, 'dense_act_fn="relu".*gelu_new'),
    ({'is_gated_act': False}, 'is_gated_act=false'),
    ({'is_encoder_decoder': False}, 'is_encoder_decoder=false'),
    ({'scale_decoder_outputs': True}, 'scale_decoder_outputs=true'),
    ({'relative_attention_num_buckets': 3}, 'relative_attention_num_buckets=3'),
    ({'relative_attention_max_distance': 4}, 'relative_attention_max_distance=4'),
    ({'pad_token_id': None}, 'decoder_start_token_id=null'),
    ({'decoder_start_token_id': 31}, 'decoder_start_token_id=31'),
    ({'sparsity': 2}, 'sparsity=2'),
  ],
)
def test_config_fields_are_refused_by_name(changed, words):
  with pytest.raises(UserError, match=words):
    models.create(FLAN | changed)


def test_config_of_a_released_checkpoint():
  """The config.json of google/flan-t5-small."""
  model = models.create(
    {
      'architectures': ['T5ForConditionalGeneration'],
      'd_ff': 1024,
      'd_kv': 64,
      'd_model': 512,
      'decoder_start_token_id': 0,
      'dropout_rate': 0.1,
      'eos_token_id': 1,
      'feed_forward_proj': 'gated-gelu',
      'initializer_factor': 1.0,
      'is_encoder_decoder': True,
      'is_gated_act': True,
      'layer_norm_epsilon': 1e-06,
      'model_type': 't5',
      'n_positions': 512,
      'num_decoder_layers': 8,
      'num_heads': 6,
      'num_layers': 8,
      'output_past': True,
      'pad_token_id': 0,
      'relative_attention_max_distance': 128,
      'relative_attention_num_buckets': 32,
      'task_specific_params': {'summarization': {'max_length': 200}},
      'tie_word_embeddings': False,
      'transformers_version': '4.23.1',
      'use_cache': True,
      'vocab_size': 32128,
    }
  )
  assert hash(model) == hash(models.create(model.config.to_hf())) and model == models.create(
    model.config.to_hf()
  )
  assert sum(np.prod(leaf.shape) for leaf in jax.tree.leaves(model.shapes())) == 76_961_152
  assert (model.width, model.vocab_size, model.max_length) == (512, 32128, 512)


def test_decoding_of_a_deep_model_is_no_longer_program():
  tokens = jax.ShapeDtypeStruct((2, PROMPT + RESPONSE), jnp.int32)
  mask = jax.ShapeDtypeStruct(tokens.shape, bool)

  def lines(depth):
    model = models.create(FLAN | {'num_layers': depth, 'num_decoder_layers': depth})
    return decode.lower(model, model.shapes(), tokens, mask).as_text().count('\n')

  shallow, deep = lines(4), lines(32)
  assert shallow > 100, 'this is no model'
  assert abs(deep - shallow) <= 0.05 * shallow
