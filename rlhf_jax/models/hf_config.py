"""Reading the fields of a Hugging Face config.json: every one is used, known not to matter, or refused.

A field that changes what a model computes and is silently ignored gives a model that is almost
right, which is worse than an error.
"""

import json
import math

from rlhf_jax.errors import UserError

# Fields that change nothing in the functions computed here: dropout is always 0 in RLHF, the
# labels' names and the pooling of unused heads are not ours, the rest is about the library
# that wrote the file.
IRRELEVANT = frozenset({
    'model_type', 'family', 'architectures', '_name_or_path', 'transformers_version',
    'dtype', 'torch_dtype', 'use_cache', 'return_dict', 'output_attentions', 'output_hidden_states',
    'attn_pdrop', 'embd_pdrop', 'resid_pdrop', 'attention_dropout', 'dropout', 'activation_dropout', 'layerdrop',
    'hidden_dropout', 'hidden_dropout_prob', 'attention_probs_dropout_prob', 'classifier_dropout', 'prefix',
    'summary_activation', 'summary_first_dropout', 'summary_proj_to_labels', 'summary_type', 'summary_use_proj',
    'task_specific_params', 'problem_type', 'id2label', 'label2id', 'num_labels', '_num_labels',
    'chunk_size_feed_forward', 'pretraining_tp', 'gradient_checkpointing', 'output_past',
    'is_llama_config', 'transformers.js_config', 'dropout_rate',
    'directionality', 'pooler_fc_size', 'pooler_num_attention_heads', 'pooler_num_fc_layers', 'pooler_size_per_head',
    'pooler_type', 'cache_implementation', 'auto_map', 'tokenizer_class', '_attn_implementation_autoset',
})

REQUIRED = object()


class UsualNames:
  """What a Config says of itself where its fields have the names that most families use."""

  @property
  def width(self):
    return self.hidden_size

  @property
  def depth(self):
    return self.num_hidden_layers

  @property
  def heads(self):
    return self.num_attention_heads

  @property
  def kv_heads(self):
    return self.num_attention_heads

  @property
  def head_width(self):
    return self.hidden_size // self.num_attention_heads

  @property
  def max_length(self):
    return self.max_position_embeddings


class Fields:
  """Takes the fields of a config one by one; `finish` refuses what nobody took.

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
    if value is not default and (isinstance(value, bool) or not isinstance(value, int) or value < least):
      raise refusal(name, value, 'must be a positive whole number' if least == 1 else
                    f'must be a whole number of at least {least}')
    return value

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

  def finish(self):
    """Refuses fields that were not taken and are not known to be irrelevant.

    Raises:
      UserError: naming the fields and their values.
    """
    left = {name: value for name, value in self._fields.items() if name not in IRRELEVANT and value is not None}
    if left:
      listed = ', '.join(f'{name}={json.dumps(value, default=str)}' for name, value in sorted(left.items()))
      raise UserError(f'model config: fields that this model family does not know: {listed}. '
                      'Ignoring them could change what the model computes; remove them if they are not needed')


def refusal(name, value, why):
  """The error for a field whose value is not supported."""
  return UserError(f'model config: {name}={json.dumps(value, default=str)}: {why}')
