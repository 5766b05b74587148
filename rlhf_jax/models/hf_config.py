"""Reading the fields of a Hugging Face config.json: every one is used, known not to matter, or refused.

A field that changes what a model computes and is silently ignored gives a model that is almost
right, which is worse than an error.
"""

import dataclasses
import json
import math
import operator

from rlhf_jax import errors
from rlhf_jax.errors import UserError
from rlhf_jax.models import layers

# Fields that change nothing in the functions computed here: dropout is always 0 in RLHF, the
# labels' names and the pooling of unused heads are not ours, the rest is about the library
# that wrote the file.
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
  """Takes the fields of a config one by one; `refuse_unread` refuses what nobody took.

  Args:
    fields: the dict of a config.json, or the same names written in a config of ours.
  """

  def __init__(self, fields):
    self._fields = dict(fields)

  def __contains__(self, name):
    return self._fields.get(name) is not None

  def raw(self, name, default=REQUIRED):
    """The field as it is; null counts as absent."""
    value = self._fields.pop(name, None)
    if value is not None:
      return value
    if default is REQUIRED:
      raise UserError(f'model config: field {name!r} is missing; add it')
    return default

  def integer(self, name, default=REQUIRED, *, least=1):
    """A whole number, a positive one unless `least` says otherwise."""
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
    """{name: positive whole number} of several fields."""
    return {name: self.integer(name) for name in names}

  def number(self, name, default=REQUIRED):
    """A positive number."""
    value = self.raw(name, default)
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if value is not default and not (number and 0 < value < math.inf):  # NaN is not, either.
      raise refusal(name, value, 'must be a positive number')
    return value if value is None else float(value)

  def flag(self, name, default=REQUIRED):
    """True or False."""
    value = self.raw(name, default)
    if not isinstance(value, bool):
      raise refusal(name, value, 'must be true or false')
    return value

  def choice(self, name, options, default=REQUIRED):
    """One of a few strings."""
    value = self.raw(name, default)
    if not isinstance(value, str) or value not in options:
      raise refusal(name, value, f'must be one of {sorted(options)}')
    return value

  def only(self, name, supported):
    """Checks a field of which one value (or its absence) is supported."""
    value = self.raw(name, supported)
    if value != supported:
      raise refusal(name, value, f'only {supported!r} is supported')

  def token_id(self, name):
    """A token id, None, or a tuple of ids where the file has a list of them."""
    value = self.raw(name, None)
    ids = value if isinstance(value, (list, tuple)) else [0 if value is None else value]
    if not all(isinstance(id_, int) and not isinstance(id_, bool) for id_ in ids):
      raise refusal(name, value, 'must be a token id or a list of them')
    return tuple(value) if isinstance(value, (list, tuple)) else value

  def typed(self, field):
    """The value of a dataclass field, read as its type says; a str is an activation."""
    return _READERS[field.type](self, field.name)

  def refuse_unread(self):
    """Refuses fields that were not taken and are not known to be irrelevant.

    Raises:
      UserError: naming the fields and their values.
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
  """The error for a field whose value is not supported."""
  return UserError(f'model config: {name}={errors.brief(json.dumps(value, default=str))}: {why}')


def check_divides(values, part, whole, hint=''):
  """Refuses values[part] where it does not divide values[whole]."""
  if values[whole] % values[part]:
    raise refusal(part, values[part], f'must divide {whole}={values[whole]}{hint}')


def _numbers(fields, name):
  """Takes a list of positive numbers, as a tuple."""
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
  tuple: _numbers,
  TokenId: Fields.token_id,
}


def alias(name):
  """A property: the attribute of another name."""
  return property(operator.attrgetter(name))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
  """What a family's Config is made from: a dataclass of the fields of a config.json.

  A family adds its fields, each with transformers' default if it has one. What the models read are
  the attributes below; a family that names or computes one of them otherwise overrides it.

  Attributes:
    MODEL_TYPE: the family's name in a config.json.
    ONLY: {field: the one supported value}.
    head: name of the score's tensors in a reward model's files.
    kept_token_ids: names of token ids that the tokenizer saved beside a model does not replace.
    tie_word_embeddings: whether the embedding is the unembedding; true where there is none.
    width: D of the hidden states that logits and heads read.
    block_width: D inside the blocks.
    depth: L; of the encoder where there is a decoder too.
    heads, kv_heads, head_width: N, K and H.
    inner: F.
    max_length: tokens of a row that the model was made for.
    first_position: row of the table of positions that the first token reads.
    attention_bias, out_bias, mlp_bias: whether the linear maps have biases: query, key and value,
      the output of attention, the MLP.
    activation: of the MLP, a name in layers.ACTIVATIONS.
    gated: whether the MLP has a gate.
    norm_first: whether norms stand before attention and MLP, or after the sums.
    norm_affine: whether LayerNorms have parameters.
    norm_epsilon: added to the variance.
    query_scale: what queries are multiplied by.
    windows: for every layer how many slots back a token sees, itself included; 0: all of them.
      Empty where every layer sees all.
    score_cap: c of c tanh(scores / c) on attention scores; 0 for none.
    logit_cap: the same on the logits.
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
    """Reads a config.json dict.

    Raises:
      UserError: naming a field that is missing, unknown or not supported.
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
    """Takes the value of every field, for a family to override.

    Args:
      fields: `Fields`, filled with the defaults: what is None is null in the file.
      **taken: values that the family has taken its own way.

    Returns:
      {name: value}.
    """
    return taken | {
      field.name: fields.typed(field)
      for field in dataclasses.fields(cls)
      if field.name not in taken
    }

  def check(self):
    """Raises UserError where fields do not go together."""
    check_divides(vars(self), 'num_attention_heads', 'hidden_size')

  def to_hf(self):
    """The dict of a config.json, without `architectures` and dtype."""
    return {'model_type': self.MODEL_TYPE, **dataclasses.asdict(self)}

  def for_tensors(self, names):
    """This config as tensors of these names want it, where config.json leaves something open."""
    del names
    return self

  def std(self, path):
    """Standard deviation of a parameter at initialization; norms and biases are 1 and 0."""
    del path
    return self.initializer_range
