"""Rotary positions (Su et al. 2021, https://arxiv.org/abs/2104.09864) and the ways to stretch them over longer texts.

Letters: B batch, T tokens of this call, S slots that its positions can reach (of the cache, or T),
H head width, R coordinates of a head that turn, the first of its H.

With 'dynamic' and 'longrope' all tokens turn slower in a long text. transformers goes by the
largest position of each call: what it makes of a text depends on the texts beside it, and a cache
keeps the keys it turned before the text became long. Here S decides. It is the same for a rollout
into a cache of S slots and for a later pass over all S of them, so the ratio of their
probabilities is 1. Where the longest text of the call fills S, the two are the same; a row of
short texts packed to more than the original length turns as one long text.
"""

import dataclasses
import math

import jax.numpy as jnp
import numpy as np

from rlhf_jax.errors import UserError
from rlhf_jax.models import hf_config

MOST_WIDTH = 2**16  # of a head; that of a damaged config.json may ask for any memory


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rope:
  """Pair i of the R / 2 turns by theta^(-2 i / R) radians per position.

  Attributes:
    head_width: H.
    theta: base of the frequencies.
    part: R / H.
    limit: positions the model was made for.
  """

  head_width: int
  theta: float = 10000.0
  part: float = 1.0
  limit: int = 0
  kind = 'default'

  def __post_init__(self):
    if self.head_width > MOST_WIDTH:
      raise hf_config.refusal(
        'head_dim', self.head_width, f'must be at most {MOST_WIDTH} for rotary positions'
      )
    if 2 * len(self.exponents()) > self.head_width:
      raise hf_config.refusal('head_dim', self.head_width, 'must be even for rotary positions')

  @property
  def scale(self):
    """What cosines and sines are multiplied by."""
    return 1.0

  @property
  def rotary_width(self):
    """R."""
    return int(self.head_width * self.part)

  def exponents(self):
    """2 i / R of each pair, float64."""
    return np.arange(0, self.rotary_width, 2) / self.rotary_width

  def frequencies(self, length):
    """Radians per position of each pair.

    Args:
      length: S.

    Returns:
      [R / 2] float64 numpy array.
    """
    del length
    return self.theta ** -self.exponents()

  def table(self, positions, length):
    """Cosines and sines of all positions, computed once for all layers.

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
    """The older spelling, `rope_theta` and `rope_scaling`, which old and new readers understand."""
    part = {} if self.part == 1 else {'partial_rotary_factor': self.part}
    return {'rope_theta': self.theta, **part, 'rope_scaling': self.scaling()}

  def scaling(self):
    """The dict for `rope_scaling`, None where there is nothing to say."""
    if self.kind == 'default':
      return None
    own = {name: getattr(self, name) for name in _own_fields(type(self))}
    return {
      'rope_type': self.kind,
      **{
        name: list(value) if isinstance(value, tuple) else value
        for name, value in own.items()
        if value is not None
      },
    }


@dataclasses.dataclass(frozen=True, kw_only=True)
class Linear(Rope):
  """Positions are divided by a factor (Chen et al. 2023, https://arxiv.org/abs/2306.15595)."""

  factor: float
  kind = 'linear'

  def frequencies(self, length):
    return super().frequencies(length) / self.factor


@dataclasses.dataclass(frozen=True, kw_only=True)
class Proportional(Rope):
  """All pairs of the head are counted, but only the first share of them turns; positions are divided by a factor."""

  factor: float = 1.0
  kind = 'proportional'

  @property
  def rotary_width(self):
    return self.head_width

  def frequencies(self, length):
    frequencies = super().frequencies(length) / self.factor
    frequencies[int(self.part * self.head_width // 2) :] = 0
    return frequencies

  def to_hf(self):
    return {'rope_theta': self.theta, 'rope_scaling': self.scaling()}

  def scaling(self):
    # This type has no other spelling of it.
    return super().scaling() | {'partial_rotary_factor': self.part}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Dynamic(Rope):
  """The base grows with the length, so that the slowest pair is as if its positions were divided by a factor.

  For n = max(S, limit): base = theta (factor n / limit - (factor - 1))^(R / (R - 2)).
  """

  factor: float
  kind = 'dynamic'

  def __post_init__(self):
    super().__post_init__()
    if self.rotary_width < 3:
      raise hf_config.refusal(
        'head_dim', self.head_width, "must be at least 4 for rotary positions of type 'dynamic'"
      )

  def frequencies(self, length):
    growth = self.factor * max(length, self.limit) / self.limit - (self.factor - 1)
    base = self.theta * growth ** (self.rotary_width / (self.rotary_width - 2))
    return base ** -self.exponents()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Llama3(Rope):
  """Slow pairs are divided by a factor, fast ones kept, those between blended (Llama 3.1's rule).

  Slow pairs make fewer than `low_freq_factor` turns in `original_max_position_embeddings`
  positions, fast ones more than `high_freq_factor`.
  """

  factor: float
  low_freq_factor: float
  high_freq_factor: float
  original_max_position_embeddings: int
  kind = 'llama3'

  def frequencies(self, length):
    frequencies = super().frequencies(length)
    turns = self.original_max_position_embeddings * frequencies / (2 * np.pi)
    kept = np.clip(
      (turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor), 0, 1
    )
    return frequencies * (kept + (1 - kept) / self.factor)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Yarn(Rope):
  """YaRN (Peng et al. 2023, https://arxiv.org/abs/2309.00071, §3.2 to 3.4): as Llama 3, blended linearly over i.

  Attributes:
    beta_fast, beta_slow: turns in the original length from which a pair is kept, and up to which
      it is divided by the factor.
    truncate: whether the pairs where these are met are rounded outwards to whole ones.
    attention_factor: the scale; without it 0.1 m ln(factor) + 1, of m = 1 or as the quotient of
      `mscale` and `mscale_all_dim`.
  """

  factor: float
  original_max_position_embeddings: int
  beta_fast: float = 32.0
  beta_slow: float = 1.0
  truncate: bool = True
  attention_factor: float | None = None
  mscale: float | None = None
  mscale_all_dim: float | None = None
  kind = 'yarn'

  def frequencies(self, length):
    frequencies = super().frequencies(length)
    low, high = self._pair(self.beta_fast), self._pair(self.beta_slow)
    if self.truncate:
      low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, self.rotary_width - 1)
    divided = np.clip((np.arange(len(frequencies)) - low) / ((high - low) or 0.001), 0, 1)
    return frequencies * (1 - divided + divided / self.factor)

  def _pair(self, turns):
    """The i, a real number, that makes so many turns in the original length."""
    length = self.original_max_position_embeddings / (2 * math.pi * turns)
    return self.rotary_width * math.log(length) / (2 * math.log(self.theta))

  @property
  def scale(self):
    def grown(mscale):
      return 0.1 * mscale * math.log(self.factor) + 1 if self.factor > 1 else 1.0

    if self.attention_factor is not None:
      return self.attention_factor
    if self.mscale and self.mscale_all_dim:
      return grown(self.mscale) / grown(self.mscale_all_dim)
    return grown(1.0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LongRope(Rope):
  """LongRoPE (Ding et al. 2024, https://arxiv.org/abs/2402.13753): a searched divisor for each pair.

  Attributes:
    short_factor, long_factor: R / 2 divisors each, used up to `original_max_position_embeddings`
      slots and beyond.
    attention_factor: the scale; without it sqrt(1 + ln f / ln original), where f is `factor` or
      else limit / original.
  """

  short_factor: tuple[float, ...]
  long_factor: tuple[float, ...]
  original_max_position_embeddings: int
  factor: float | None = None
  attention_factor: float | None = None
  kind = 'longrope'

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
    factor = self.factor or self.limit / self.original_max_position_embeddings
    return (
      math.sqrt(1 + math.log(factor) / math.log(self.original_max_position_embeddings))
      if factor > 1
      else 1.0
    )


KINDS = {cls.kind: cls for cls in (Rope, Linear, Proportional, Dynamic, Llama3, Yarn, LongRope)}
ORIGINAL = 'original_max_position_embeddings'


def from_hf(fields, *, head_width, limit, original=None, partial=False, kinds=None):
  """Takes `rope_parameters`, or the older `rope_scaling` and `rope_theta`, from `hf_config.Fields`.

  Args:
    fields: of a config.json.
    head_width: H.
    limit: positions the model was made for.
    original: of the family's files where they do not say `original_max_position_embeddings`.
    partial: whether the family can turn a part of each head.
    kinds: {type: class}; None: KINDS.

  Returns:
    A Rope.

  Raises:
    UserError: for a type that is not among the kinds, or parameters it does not have.
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
    limit=limit,
    partial=partial,
    kinds=kinds,
    theta=fields.number('rope_theta', 10000.0),
    part=fields.number('partial_rotary_factor', 1.0),
    original=fields.integer(ORIGINAL, original),
  )


def read(
  name, given, *, head_width, limit, theta, part=1.0, original=None, partial=False, kinds=None
):
  """Reads one dict of rotary parameters.

  Args:
    name: of the field that holds the dict.
    given: the dict.
    head_width, limit, partial, kinds: see `from_hf`.
    theta, part: where the dict has none.
    original: None, or the original length that stands beside the dict and goes before the one in it.

  Returns, Raises: see `from_hf`.
  """
  if not hasattr(given, 'keys'):
    raise hf_config.refusal(name, given, 'must be a dict')
  given, kinds = dict(given), kinds or KINDS
  older = given.pop('type', None)
  kind = given.pop('rope_type', None) or older or 'default'
  if not isinstance(kind, str) or kind not in kinds:
    raise hf_config.refusal(f'{name}.rope_type', kind, f'must be one of {sorted(kinds)}')
  own = _own_fields(kinds[kind])
  if ORIGINAL in own:
    given[ORIGINAL] = original or given.get(ORIGINAL) or limit
  inner = hf_config.Fields(given)
  try:
    theta, part = inner.number('rope_theta', theta), inner.number('partial_rotary_factor', part)
    if part > 1 or part < 1 and not (partial or kind == 'proportional'):
      raise hf_config.refusal(
        'partial_rotary_factor', part, 'must be at most 1' if partial else 'only 1 is supported'
      )
    taken = {name: _take(inner, field) for name, field in own.items()}
    inner.refuse_unread()
  except UserError as error:
    raise UserError(f'{error} (inside {name} of type {kind!r})') from None
  return kinds[kind](head_width=head_width, theta=theta, part=part, limit=limit, **taken)


def _own_fields(cls):
  """The fields {name: dataclass field} that a class has beyond those of every Rope."""
  common = {field.name for field in dataclasses.fields(Rope)}
  return {field.name: field for field in dataclasses.fields(cls) if field.name not in common}


def _take(fields, field):
  """Takes the value of a dataclass field from `hf_config.Fields`, or its default."""
  if field.name not in fields and field.default is not dataclasses.MISSING:
    return field.default
  return fields.typed(field)


def rotate(x, table):
  """Turns the pairs (i, i + R / 2) of coordinates by the angles of their positions.

  Args:
    x: [B, T, heads, H].
    table: cosines and sines from `Rope.table`.

  Returns:
    Same shape and dtype as x; the arithmetic is float32.
  """
  cos, sin = table
  rotary_width = 2 * cos.shape[-1]
  first, second = jnp.split(x[..., :rotary_width].astype(jnp.float32), 2, axis=-1)
  turned = jnp.concatenate(
    [first * cos - second * sin, second * cos + first * sin], axis=-1
  ).astype(x.dtype)
  return (
    turned
    if rotary_width == x.shape[-1]
    else jnp.concatenate([turned, x[..., rotary_width:]], axis=-1)
  )
