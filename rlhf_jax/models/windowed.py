"""Families in which each layer sees either the whole text or a window of it."""

import dataclasses

from rlhf_jax.models import hf_config
from rlhf_jax.models import llama

FULL, SLIDING = 'full_attention', 'sliding_attention'


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(llama.BaseConfig):
  """The fields of Llama's relatives, the window, and for every layer FULL or SLIDING."""

  sliding_window: int | None = 4096
  layer_types: tuple

  @classmethod
  def take(cls, fields, *, slides, **taken):
    """See hf_config.Config.

    Args:
      fields: of a config.json.
      slides: layer -> whether it sees a window, by the rule for files that have no `layer_types`.
      **taken: fields that the family has taken.

    Raises:
      UserError: `layer_types` is not that, or there are windows of no length.
    """
    depth, window = fields.integer('num_hidden_layers'), fields.integer('sliding_window', None)
    types = fields.raw('layer_types', None)
    if types is None:
      types = [SLIDING if slides(layer) else FULL for layer in range(depth)]
    if (
      not isinstance(types, (list, tuple))
      or len(types) != depth
      or not all(kind in (FULL, SLIDING) for kind in types)
    ):
      raise hf_config.refusal('layer_types', types, f'must be {depth} of {FULL!r} and {SLIDING!r}')
    if SLIDING in types and window is None:
      raise hf_config.refusal(
        'layer_types', types, f'{SLIDING!r} needs a sliding_window that is in use'
      )
    return super().take(
      fields, num_hidden_layers=depth, sliding_window=window, layer_types=tuple(types), **taken
    )

  @property
  def windows(self):
    return tuple(self.sliding_window if kind == SLIDING else 0 for kind in self.layer_types)
