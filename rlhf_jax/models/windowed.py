"""The base config of families whose layers have either full attention or a sliding window."""

import dataclasses

from rlhf_jax.models import hf_config
from rlhf_jax.models import llama

FULL, SLIDING = 'full_attention', 'sliding_attention'


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(llama.BaseConfig):
  """The fields of Llama's Config, the window, and FULL or SLIDING for each layer."""

  sliding_window: int | None = 4096
  layer_types: tuple

  @classmethod
  def take(cls, fields, *, is_sliding, **taken):
    """See hf_config.Config.

    Args:
      fields: hf_config.Fields of a config.json.
      is_sliding: Function from a layer to whether it has a window, for files without
        `layer_types`.
      **taken: Values that the family has already read.

    Raises:
      UserError: If `layer_types` is invalid or needs a `sliding_window` that is not set.
    """
    depth, window = fields.integer('num_hidden_layers'), fields.integer('sliding_window', None)
    types = fields.raw('layer_types', None)
    if types is None:
      types = [SLIDING if is_sliding(layer) else FULL for layer in range(depth)]
    if (
      not isinstance(types, (list, tuple))
      or len(types) != depth
      or not all(kind in (FULL, SLIDING) for kind in types)
    ):
      raise hf_config.refusal(
        'layer_types', types, f'must be a list of {depth} entries, each {FULL!r} or {SLIDING!r}'
      )
    if SLIDING in types and window is None:
      raise hf_config.refusal(
        'layer_types', types, f'{SLIDING!r} needs sliding_window to be set and not disabled'
      )
    return super().take(
      fields, num_hidden_layers=depth, sliding_window=window, layer_types=tuple(types), **taken
    )

  @property
  def windows(self):
    return tuple(self.sliding_window if kind == SLIDING else 0 for kind in self.layer_types)
