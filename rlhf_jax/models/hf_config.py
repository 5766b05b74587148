"""Reads the fields of a Hugging Face config.json.

Every field is used, known to be irrelevant, or refused. Silently ignoring a field that changes what
the model computes would give a model that is almost right, which is worse than an error.
"""

import dataclasses
import json
import math
import operator

from rlhf_jax import errors
from rlhf_jax.errors import UserError
from rlhf_jax.models import layers

# Fields without effect here: dropout, which is always 0 in RLHF; names of labels; pooling of heads
# that we do not use; and settings of the library that wrote the file.
IRRELEVANT = frozenset(
  {
    'model_type',
    'family',
    'architectures',
    '_name_or_path',
    'transformers_version',
    'dtype',
    'torch_dtype',
    'use_cache',
    'return_dict',
    'output_attentions',
    'output_hidden_states',
    'attn_pdrop',
    'embd_pdrop',
    'resid_pdrop',
    'attention_dropout',
    'dropout',
    'activation_dropout',
    'layerdrop',
    'hidden_dropout',
    'hidden_dropout_prob',
    'attention_probs_dropout_prob',
    'classifier_dropout',
    'prefix',
    'summary_activation',
    'summary_first_dropout',
    'summary_proj_to_labels',
    'summary_type',
    'summary_use_proj',
    'task_specific_params',
    'problem_type',
    'id2label',
    'label2id',
    'num_labels',
    '_num_labels',
    'chunk_size_feed_forward',
    'pretraining_tp',
    'gradient_checkpointing',
    'output_past',
    'is_llama_config',
    'transformers.js_config',
    'dropout_rate',
    'directionality',
    'pooler_fc_size',
    'pooler_num_attention_heads',
    'pooler_num_fc_layers',
    'pooler_size_per_head',
    'pooler_type',
    'cache_implementation',
    'auto_map',
    'tokenizer_class',
    '_attn_implementation_autoset',
  }
)

REQUIRED = object()
TokenId = int | tuple | None
SCORE = 'score'


class Fields:
  """Reads the fields of a config one by one; `refuse_unread` then refuses those that were not read.

  Args:
    fields: Dict of a config.json, or of `config.model.init`, which has the same names.
  """

  def __init__(self, fields):
    self._fields = dict(fields)

  def __contains__(self, name):
    return self._fields.get(name) is not None

  def raw(self, name, default=REQUIRED):
    """Returns the field without a check; null counts as absent."""
    value = self._fields.pop(name, None)
    if value is not None:
      return value
    if default is REQUIRED:
      raise UserError(f'model config: field {name!r} is missing; add it')
    return default

  def integer(self, name, default=REQUIRED, *, least=1):
    """Returns an integer field, which must be at least `least`."""
    value = self.raw(name, default)
    if value is not default and (
      isinstance(value, bool) or not isinstance(value, int) or value < least
    ):
      raise refusal(
        name,
        value,
        'must be a positive whole number'
        if least == 1
        else f'must be a whole number of at least {least}',
      )
    return value

  def integers(self, *names):
    """Returns {name: value} of several fields that must be positive integers."""
    return {name: self.integer(name) for name in names}

  def number(self, name, default=REQUIRED):
    """Returns a field that must be a positive number, as a float."""
    value = self.raw(name, default)
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if value is not default and not (number and 0 < value < math.inf):  # also refuses NaN
      raise refusal(name, value, 'must be a positive number')
    return value if value is None else float(value)

  def flag(self, name, default=REQUIRED):
    """Returns a boolean field."""
    value = self.raw(name, default)
    if not isinstance(value, bool):
      raise refusal(name, value, 'must be true or false')
    return value

  def choice(self, name, options, default=REQUIRED):
    """Returns a field that must be one of the strings `options`."""
    value = self.raw(name, default)
    if not isinstance(value, str) or value not in options:
      raise refusal(name, value, f'must be one of {sorted(options)}')
    return value

  def only(self, name, supported):
    """Checks that a field is absent or has the one supported value."""
    value = self.raw(name, supported)
    if value != supported:
      raise refusal(name, value, f'only {supported!r} is supported')

  def token_id(self, name):
    """Returns a token id, None, or a tuple of ids if the file has a list of them."""
    value = self.raw(name, None)
    ids = value if isinstance(value, (list, tuple)) else [0 if value is None else value]
    if not all(isinstance(id_, int) and not isinstance(id_, bool) for id_ in ids):
      raise refusal(name, value, 'must be a token id or a list of them')
    return tuple(value) if isinstance(value, (list, tuple)) else value

  def typed(self, field):
    """Returns the value of a dataclass field, checked against its type.

    A field of type str is the name of an activation.
    """
    return _READERS[field.type](self, field.name)

  def refuse_unread(self):
    """Refuses fields that nothing has read and that are not known to be irrelevant.

    Raises:
      UserError: There are such fields.
    """
    left = {
      name: value
      for name, value in self._fields.items()
      if name not in IRRELEVANT and value is not None
    }
    if left:
      listed = ', '.join(
        f'{name}={errors.brief(json.dumps(value, default=str))}'
        for name, value in sorted(left.items())[:8]
      )
      raise UserError(
        f'model config: fields that this model family does not know: {listed}. '
        'Ignoring them could change what the model computes; remove them if they are not needed'
      )


def refusal(name, value, why):
  """Returns the error for a field with an unsupported value."""
  return UserError(f'model config: {name}={errors.brief(json.dumps(value, default=str))}: {why}')


def check_divides(values, part, whole, hint=''):
  """Raises UserError unless values[part] divides values[whole]."""
  if values[whole] % values[part]:
    raise refusal(part, values[part], f'must divide {whole}={values[whole]}{hint}')


def _numbers(fields, name):
  """Returns a field that must be a list of positive numbers, as a tuple of floats."""
  value = fields.raw(name)
  if not isinstance(value, (list, tuple)) or not all(
    isinstance(entry, (int, float)) and entry > 0 for entry in value
  ):
    raise refusal(name, value, 'must be a list of positive numbers')
  return tuple(map(float, value))


_READERS = {
  int: Fields.integer,
  int | None: lambda fields, name: fields.integer(name, None),
  float: Fields.number,
  float | None: lambda fields, name: fields.number(name, None),
  bool: Fields.flag,
  str: lambda fields, name: fields.choice(name, layers.ACTIVATIONS),
  tuple[float, ...]: _numbers,
  TokenId: Fields.token_id,
}


def alias(name):
  """Returns a property that reads the attribute `name`."""
  return property(operator.attrgetter(name))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
  """Base class of the families' configs: a dataclass of the fields of a config.json.

  A family adds its fields, each with the default of transformers if there is one. Models read the
  attributes below; a family that stores or computes one of them differently overrides it.

  Letters: D width, L layers, N heads, K key/value heads, H head width, F width of the MLP.

  Attributes:
    MODEL_TYPE: Name of the family in config.json.
    ONLY: {field: the one supported value}.
    head: Name of the head's tensors in a reward model's files.
    kept_token_ids: Names of token ids that a tokenizer saved with the model does not replace.
    tie_word_embeddings: Whether the embedding is also the unembedding; true if the model has no
      unembedding.
    width: D of the hidden states that logits and heads read.
    block_width: D inside the blocks.
    depth: L; of the encoder if there is a decoder too.
    heads, kv_heads, head_width: N, K and H.
    inner: F.
    max_length: Longest sequence that the model supports, in tokens.
    first_position: Row of the position table that the first token reads.
    attention_bias: Whether the query, key and value projections have biases.
    out_bias: Whether the output projection of attention has a bias.
    mlp_bias: Whether the MLP has biases.
    activation: Activation of the MLP, a name in layers.ACTIVATIONS.
    gated: Whether the MLP has a gate.
    norm_first: Whether norms come before attention and MLP (pre-norm), or after the residual sums.
    norm_affine: Whether LayerNorms have parameters.
    norm_epsilon: Added to the variance.
    query_scale: Factor on the queries.
    windows: Sliding window of each layer, in slots, including the token itself; 0 sees all slots.
      Empty if every layer sees all slots.
    score_cap: c of c tanh(scores / c) on attention scores; 0 for none.
    logit_cap: The same for logits.
  """

  vocab_size: int
  bos_token_id: TokenId = None
  eos_token_id: TokenId = None
  pad_token_id: TokenId = None

  MODEL_TYPE = ''
  ONLY = {'is_encoder_decoder': False}
  head = SCORE
  kept_token_ids = ()
  first_position = 0
  attention_bias = mlp_bias = True
  gated = False
  norm_first = norm_affine = True
  windows = ()
  score_cap = logit_cap = 0.0

  width = alias('hidden_size')
  block_width = alias('width')
  depth = alias('num_hidden_layers')
  heads = alias('num_attention_heads')
  kv_heads = alias('heads')
  inner = alias('intermediate_size')
  max_length = alias('max_position_embeddings')
  activation = alias('hidden_act')
  norm_epsilon = alias('layer_norm_eps')
  out_bias = alias('attention_bias')

  @property
  def head_width(self):
    return self.block_width // self.heads

  @property
  def query_scale(self):
    return self.head_width**-0.5

  @classmethod
  def from_hf(cls, fields):
    """Returns the Config of a config.json dict.

    Raises:
      UserError: A field is missing, unknown or not supported.
    """
    defaults = {
      field.name: field.default
      for field in dataclasses.fields(cls)
      if field.default is not dataclasses.MISSING
    }
    fields = Fields({**defaults, **fields})
    config = cls(**cls.take(fields))
    for name, supported in cls.ONLY.items():
      fields.only(name, supported)
    fields.refuse_unread()
    config.check()
    return config

  @classmethod
  def take(cls, fields, **taken):
    """Reads the value of every field; a family may override it.

    Args:
      fields: `Fields`, with the defaults filled in; None stands for null in the file.
      **taken: Values that the family has already read in its own way.

    Returns:
      {name: value}.
    """
    return taken | {
      field.name: fields.typed(field)
      for field in dataclasses.fields(cls)
      if field.name not in taken
    }

  def check(self):
    """Raises UserError if fields contradict each other."""
    check_divides(vars(self), 'num_attention_heads', 'hidden_size')

  def to_hf(self):
    """Returns the dict of a config.json, without `architectures` and dtype."""
    return {'model_type': self.MODEL_TYPE, **dataclasses.asdict(self)}

  def for_tensors(self, names):
    """Returns this config, completed from the names of the tensors if config.json is ambiguous."""
    del names
    return self

  def std(self, path):
    """Returns the initial standard deviation of a parameter that is not a norm or a bias."""
    del path
    return self.initializer_range
