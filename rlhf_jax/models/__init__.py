"""Language models as functions of their parameters; Hugging Face weights in and out.

`create` builds a model from the fields of a config.json; `hf.load` and `hf.save` read and write
its folders. What algorithms ask of a model stands in base.py: `init` and `summary` of any;
`unembed`, `response_states`, `prefill` and `step` of those that write; of decoders also `forward`.
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
  """Builds a model from field names of Hugging Face's config.json.

  Args:
    fields: mapping with 'family' (or 'model_type') and the family's fields.
    dtype, remat, unroll: see transformer.Model.

  Returns:
    Model, Seq2Seq or Encoder.

  Raises:
    UserError: an unknown family, or a field that is missing, unknown or not supported.
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
