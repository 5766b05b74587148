"""Language models as functions of their parameters, and Hugging Face weights in and out.

`create` builds a model from the fields of a config.json; `hf.load` and `hf.save` read and write
model folders. base.py defines the methods that algorithms call: every model has `init` and
`summary`; models that generate text also have `unembed`, `response_states`, `prefill` and `step`;
decoders also have `forward`.
"""

from rlhf_jax.errors import brief
from rlhf_jax.errors import UserError
from rlhf_jax.models import families
from rlhf_jax.models import stack
from rlhf_jax.models.encoder import Encoder
from rlhf_jax.models.families import FAMILIES
from rlhf_jax.models.seq2seq import Seq2Seq
from rlhf_jax.models.transformer import Model

DTYPES = ('float32', 'bfloat16')
CLASSES = (
  dict.fromkeys(families.DECODERS, Model)
  | dict.fromkeys(families.ENCODERS, Encoder)
  | dict.fromkeys(families.ENCODER_DECODERS, Seq2Seq)
)


def create(fields, *, dtype='float32', remat='none', unroll=1):
  """Builds a model from the fields of a Hugging Face config.json.

  Args:
    fields: Mapping with 'family' (or 'model_type') and the family's fields.
    dtype, remat, unroll: See base.Base.

  Returns:
    Model, Seq2Seq or Encoder.

  Raises:
    UserError: If the family is unknown, or a field is missing, unknown or not supported.
  """
  fields = dict(fields)
  family = fields.get('family', fields.get('model_type'))
  for name, value, options in (
    ('family', family, FAMILIES),
    ('dtype', dtype, DTYPES),
    ('remat', remat, stack.REMAT),
  ):
    if value not in options:
      raise UserError(
        f'model: {name}={brief(repr(value))} is not supported; choose from {sorted(options)}'
      )
  if unroll is not None and unroll < 1:
    raise UserError(f'model: unroll={unroll} must be at least 1, or None')
  config = FAMILIES[family].Config.from_hf(fields)
  return CLASSES[family](family, config, dtype, remat, unroll)
