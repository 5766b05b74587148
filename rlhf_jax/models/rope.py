"""Rotary positions (Su et al. 2021, https://arxiv.org/abs/2104.09864) and their scalings.

Letters: B batch, T tokens of this call, S sequence length (slots of the cache, or T without one),
H head width, R rotated coordinates, the first of each head.

The frequencies of 'dynamic' and 'longrope' depend on the sequence length. transformers uses the
largest position of each call. So its result for a sequence depends on the other sequences of the
batch, and a cache keeps keys that were rotated before the sequence became long. Here the
frequencies depend on S, which is the same for a rollout into a cache of S slots and for a later
pass over all S of them, so their probability ratio is 1. If the longest sequence of the call fills
S, the result equals that of transformers. Short texts packed into a sequence longer than the
original length are rotated as one long text.
"""

import dataclasses
import math

import jax.numpy as jnp
import numpy as np

from rlhf_jax.errors import UserError
from rlhf_jax.models import hf_config

MAX_HEAD_WIDTH = 2**16  # a damaged config.json could otherwise ask for any amount of memory


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rope:
  """Plain rotary positions: pair i of R / 2 rotates by theta^(-2 i / R) radians per position.

  Attributes:
    head_width: H.
    theta: Base of the frequencies.
    rotary_fraction: R / H.
    max_positions: Number of positions that the model was made for.
    rope_type: Name of the scaling in a config.json.
  """

  head_width: int
  theta: float = 10000.0
  rotary_fraction: float = 1.0
  max_positions: int = 0
  rope_type = 'default'

  def __post_init__(self):
    if self.head_width > MAX_HEAD_WIDTH:
      raise hf_config.refusal(
        'head_dim', self.head_width, f'must be at most {MAX_HEAD_WIDTH} for rotary positions'
      )
    if 2 * len(self.exponents()) > self.head_width:
      raise hf_config.refusal('head_dim', self.head_width, 'must be even for rotary positions')

  @property
  def scale(self):
    """Factor of the cosines and sines."""
    return 1.0

  @property
  def rotary_width(self):
    """Number of rotated coordinates, R."""
    return int(self.head_width * self.rotary_fraction)

  def exponents(self):
    """Returns 2 i / R of each pair, [R / 2] float64."""
    return np.arange(0, self.rotary_width, 2) / self.rotary_width

  def frequencies(self, length):
    """Computes the radians per position of each pair.

    Args:
      length: S.

    Returns:
      [R / 2] float64 numpy array.
    """
    del length
    return self.theta ** -self.exponents()

  def table(self, positions, length):
    """Computes the cosines and sines of all positions, once for all layers.

    Args:
      positions: [B, T] int32.
      length: S.

    Returns:
      Two [B, T, 1, R / 2] float32, to broadcast over heads.
    """
    frequencies = self.frequencies(length).astype(np.float32)
    angles = positions[:, :, None, None] * frequencies[None, None, None, :]
    return jnp.cos(angles) * self.scale, jnp.sin(angles) * self.scale

  def to_hf(self):
    """Returns the fields of a config.json, in the older form that every reader understands."""
    fraction = self.rotary_fraction
    partial = {} if fraction == 1 else {'partial_rotary_factor': fraction}
    return {'rope_theta': self.theta, **partial, 'rope_scaling': self.scaling()}

  def scaling(self):
    """Returns the dict for `rope_scaling`, or None without scaling."""
    if self.rope_type == 'default':
      return None
    parameters = {name: getattr(self, name) for name in _type_fields(type(self))}
    return {
      'rope_type': self.rope_type,
      **{
        name: list(value) if isinstance(value, tuple) else value
        for name, value in parameters.items()
        if value is not None
      },
    }


@dataclasses.dataclass(frozen=True, kw_only=True)
class Linear(Rope):
  """Divides positions by a factor (Chen et al. 2023, https://arxiv.org/abs/2306.15595)."""

  factor: float
  rope_type = 'linear'

  def frequencies(self, length):
    return super().frequencies(length) / self.factor


@dataclasses.dataclass(frozen=True, kw_only=True)
class Proportional(Rope):
  """Rotates a fraction of the head, with frequencies as if all of it rotated.

  Here R = H, and the frequencies of all but the first `rotary_fraction` of the pairs are 0.
  Positions are divided by a factor.
  """

  factor: float = 1.0
  rope_type = 'proportional'

  @property
  def rotary_width(self):
    return self.head_width

  def frequencies(self, length):
    frequencies = super().frequencies(length) / self.factor
    frequencies[int(self.rotary_fraction * self.head_width // 2) :] = 0
    return frequencies

  def to_hf(self):
    return {'rope_theta': self.theta, 'rope_scaling': self.scaling()}

  def scaling(self):
    # This type reads the fraction only from this dict.
    return super().scaling() | {'partial_rotary_factor': self.rotary_fraction}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Dynamic(Rope):
  """Increases the base of the frequencies with the length.

  With n = max(S, max_positions) and growth = factor * n / max_positions - (factor - 1), the base is
  theta * growth^(R / (R - 2)), which divides the lowest frequency by growth.
  """

  factor: float
  rope_type = 'dynamic'

  def __post_init__(self):
    super().__post_init__()
    if self.rotary_width < 3:
      raise hf_config.refusal(
        'head_dim', self.head_width, "must be at least 4 for rotary positions of type 'dynamic'"
      )

  def frequencies(self, length):
    stretch = max(length, self.max_positions) / self.max_positions
    growth = self.factor * stretch - (self.factor - 1)
    base = self.theta * growth ** (self.rotary_width / (self.rotary_width - 2))
    return base ** -self.exponents()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Llama3(Rope):
  """Divides low frequencies by a factor, keeps high ones and blends those between (Llama 3.1).

  Over `original_max_position_embeddings` positions, pairs of low frequency make fewer than
  `low_freq_factor` turns, pairs of high frequency more than `high_freq_factor`.
  """

  factor: float
  low_freq_factor: float
  high_freq_factor: float
  original_max_position_embeddings: int
  rope_type = 'llama3'

  def frequencies(self, length):
    frequencies = super().frequencies(length)
    turns = self.original_max_position_embeddings * frequencies / (2 * np.pi)
    weight = np.clip(
      (turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor), 0, 1
    )
    return frequencies * (weight + (1 - weight) / self.factor)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Yarn(Rope):
  """YaRN (Peng et al. 2023, https://arxiv.org/abs/2309.00071, §3.2 to 3.4).

  Like Llama3, it divides low frequencies by a factor and keeps high ones, but blends linearly in i.

  Attributes:
    factor: Divisor of low frequencies.
    original_max_position_embeddings: Original length, over which turns are counted.
    beta_fast: Number of turns from which a frequency is kept.
    beta_slow: Number of turns up to which a frequency is divided.
    truncate: Whether the blended range of i is rounded outwards to integers.
    attention_factor: The scale. If None, it is f(1) with f(m) = 0.1 m ln(factor) + 1; if mscale and
      mscale_all_dim are set, f(mscale) / f(mscale_all_dim).
  """

  factor: float
  original_max_position_embeddings: int
  beta_fast: float = 32.0
  beta_slow: float = 1.0
  truncate: bool = True
  attention_factor: float | None = None
  mscale: float | None = None
  mscale_all_dim: float | None = None
  rope_type = 'yarn'

  def frequencies(self, length):
    frequencies = super().frequencies(length)
    low, high = self._pair(self.beta_fast), self._pair(self.beta_slow)
    if self.truncate:
      low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, self.rotary_width - 1)
    divided = np.clip((np.arange(len(frequencies)) - low) / ((high - low) or 0.001), 0, 1)
    return frequencies * (1 - divided + divided / self.factor)

  def _pair(self, turns):
    """Returns the real i whose pair makes this many turns in the original length."""
    length = self.original_max_position_embeddings / (2 * math.pi * turns)
    return self.rotary_width * math.log(length) / (2 * math.log(self.theta))

  @property
  def scale(self):
    def scale(mscale):
      return 0.1 * mscale * math.log(self.factor) + 1 if self.factor > 1 else 1.0

    if self.attention_factor is not None:
      return self.attention_factor
    if self.mscale and self.mscale_all_dim:
      return scale(self.mscale) / scale(self.mscale_all_dim)
    return scale(1.0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LongRope(Rope):
  """LongRoPE (Ding et al. 2024, https://arxiv.org/abs/2402.13753): a searched divisor per pair.

  Attributes:
    short_factor: R / 2 divisors for S up to `original_max_position_embeddings`.
    long_factor: R / 2 divisors for longer S.
    original_max_position_embeddings: Original length.
    factor: Ratio of the maximum to the original length; None for
      max_positions / original_max_position_embeddings.
    attention_factor: The scale; None for sqrt(1 + ln(factor) / ln(original length)).
  """

  short_factor: tuple[float, ...]
  long_factor: tuple[float, ...]
  original_max_position_embeddings: int
  factor: float | None = None
  attention_factor: float | None = None
  rope_type = 'longrope'

  def __post_init__(self):
    super().__post_init__()
    for name in ('short_factor', 'long_factor'):
      if len(getattr(self, name)) != len(self.exponents()):
        raise hf_config.refusal(
          name, getattr(self, name), f'must have {len(self.exponents())} numbers'
        )

  def frequencies(self, length):
    divisors = (
      self.long_factor if length > self.original_max_position_embeddings else self.short_factor
    )
    return super().frequencies(length) / np.array(divisors)

  @property
  def scale(self):
    if self.attention_factor is not None:
      return self.attention_factor
    factor = self.factor or self.max_positions / self.original_max_position_embeddings
    return (
      math.sqrt(1 + math.log(factor) / math.log(self.original_max_position_embeddings))
      if factor > 1
      else 1.0
    )


ROPE_TYPES = {
  cls.rope_type: cls for cls in (Rope, Linear, Proportional, Dynamic, Llama3, Yarn, LongRope)
}
ORIGINAL = 'original_max_position_embeddings'


def from_hf(
  fields, *, head_width, max_positions, original_length=None, partial=False, rope_types=None
):
  """Reads `rope_parameters`, or the older `rope_scaling` and `rope_theta`, of a config.json.

  Args:
    fields: hf_config.Fields of the config.json.
    head_width: H.
    max_positions: Number of positions that the model was made for.
    original_length: The family's default of `original_max_position_embeddings`, or None.
    partial: Whether the family can rotate a fraction of each head.
    rope_types: {type: class}; None for ROPE_TYPES.

  Returns:
    A Rope.

  Raises:
    UserError: If the type is not in `rope_types`, or has no such parameters.
  """
  name = 'rope_parameters' if 'rope_parameters' in fields else 'rope_scaling'
  if name == 'rope_parameters' and 'rope_scaling' in fields:
    raise UserError(
      'model config: rope_parameters and rope_scaling are both present; keep one of them'
    )
  return read(
    name,
    fields.raw(name, {}),
    head_width=head_width,
    max_positions=max_positions,
    partial=partial,
    rope_types=rope_types,
    theta=fields.number('rope_theta', 10000.0),
    rotary_fraction=fields.number('partial_rotary_factor', 1.0),
    original_length=fields.integer(ORIGINAL, original_length),
  )


def read(
  name,
  parameters,
  *,
  head_width,
  max_positions,
  theta,
  rotary_fraction=1.0,
  original_length=None,
  partial=False,
  rope_types=None,
):
  """Reads one dict of rotary parameters.

  Args:
    name: Name of the field that holds the dict, for messages.
    parameters: The dict.
    head_width, max_positions, partial, rope_types: See `from_hf`.
    theta, rotary_fraction: Defaults if the dict has none.
    original_length: Original length from outside of the dict, which overrides the one in it; or
      None.

  Returns:
    A Rope.

  Raises:
    UserError: See `from_hf`.
  """
  if not hasattr(parameters, 'keys'):
    raise hf_config.refusal(name, parameters, 'must be a dict')
  parameters, rope_types = dict(parameters), rope_types or ROPE_TYPES
  older_name = parameters.pop('type', None)
  rope_type = parameters.pop('rope_type', None) or older_name or 'default'
  if not isinstance(rope_type, str) or rope_type not in rope_types:
    raise hf_config.refusal(f'{name}.rope_type', rope_type, f'must be one of {sorted(rope_types)}')
  cls = rope_types[rope_type]
  type_fields = _type_fields(cls)
  if ORIGINAL in type_fields:
    parameters[ORIGINAL] = original_length or parameters.get(ORIGINAL) or max_positions
  inner = hf_config.Fields(parameters)
  try:
    theta = inner.number('rope_theta', theta)
    fraction = inner.number('partial_rotary_factor', rotary_fraction)
    if fraction > 1 or fraction < 1 and not (partial or rope_type == 'proportional'):
      raise hf_config.refusal(
        'partial_rotary_factor', fraction, 'must be at most 1' if partial else 'only 1 is supported'
      )
    values = {name: _read_field(inner, field) for name, field in type_fields.items()}
    inner.refuse_unread()
  except UserError as error:
    raise UserError(f'{error} (inside {name} of type {rope_type!r})') from None
  return cls(
    head_width=head_width,
    theta=theta,
    rotary_fraction=fraction,
    max_positions=max_positions,
    **values,
  )


def _type_fields(cls):
  """Returns the fields {name: dataclass field} that a class has in addition to those of Rope."""
  common = {field.name for field in dataclasses.fields(Rope)}
  return {field.name: field for field in dataclasses.fields(cls) if field.name not in common}


def _read_field(fields, field):
  """Reads the value of a dataclass field from `hf_config.Fields`, or returns its default."""
  if field.name not in fields and field.default is not dataclasses.MISSING:
    return field.default
  return fields.typed(field)


def rotate(x, table):
  """Rotates the pairs (i, i + R / 2) of coordinates by the angles of their positions.

  Args:
    x: [B, T, heads, H].
    table: Cosines and sines from `Rope.table`.

  Returns:
    Array of the shape and dtype of x; the arithmetic is float32.
  """
  cos, sin = table
  rotary_width = 2 * cos.shape[-1]
  first, second = jnp.split(x[..., :rotary_width].astype(jnp.float32), 2, axis=-1)
  rotated = jnp.concatenate(
    [first * cos - second * sin, second * cos + first * sin], axis=-1
  ).astype(x.dtype)
  return (
    rotated
    if rotary_width == x.shape[-1]
    else jnp.concatenate([rotated, x[..., rotary_width:]], axis=-1)
  )
