"""Families in which each layer sees either the whole text or a window of it."""

from rlhf_jax.models import hf_config

FULL, SLIDING = 'full_attention', 'sliding_attention'


def take(fields, *, depth, slides):
  """Takes the window and the kind of every layer from `hf_config.Fields`.

  Args:
    fields: of a config.json.
    depth: L.
    slides: layer -> whether it sees a window, by the rule for files that have no `layer_types`.

  Returns:
    {'sliding_window': int or None, 'layer_types': L of FULL and SLIDING}.

  Raises:
    UserError: `layer_types` is not that, or there are windows of no length.
  """
  window, types = fields.integer('sliding_window', None), fields.raw('layer_types', None)
  if types is None:
    types = [SLIDING if slides(layer) else FULL for layer in range(depth)]
  if not isinstance(types, (list, tuple)) or len(types) != depth or not all(kind in (FULL, SLIDING) for kind in types):
    raise hf_config.refusal('layer_types', types, f'must be {depth} of {FULL!r} and {SLIDING!r}')
  if SLIDING in types and window is None:
    raise hf_config.refusal('layer_types', types, f'{SLIDING!r} needs a sliding_window that is in use')
  return {'sliding_window': window, 'layer_types': tuple(types)}


def windows(config):
  """See layers.DecoderConfig."""
  return tuple(config.sliding_window if kind == SLIDING else 0 for kind in config.layer_types)
