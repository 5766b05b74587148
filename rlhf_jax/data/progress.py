"""A progress bar for what takes long before the first step: reading and tokenizing."""

from collections.abc import Iterable
from typing import Any

import tqdm

from rlhf_jax import progress

DELAY_SECONDS = 3.0


def bar(
  items: Iterable[Any] | None, what: str, unit: str, *, total: int | None = None
) -> tqdm.tqdm:
  """A progress bar that appears after some seconds; a terminal shows it only until the end.

  Args:
    items: to go through; None to call `update` by hand.
    what: is done to them.
    unit: what they are, in the plural.
    total: number of items, where it is known and `items` does not tell.
  """
  return tqdm.tqdm(
    items,
    desc=what,
    unit=f' {unit}',
    total=total,
    delay=DELAY_SECONDS,
    leave=False,
    **progress.display(),
  )
