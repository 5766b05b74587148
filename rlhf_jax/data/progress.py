"""A progress bar for slow work before the first step: reading and tokenizing."""

from collections.abc import Iterable
from typing import Any

import tqdm

from rlhf_jax import progress

DELAY_SECONDS = 3.0


def bar(
  items: Iterable[Any] | None, what: str, unit: str, *, total: int | None = None
) -> tqdm.tqdm:
  """Returns a progress bar that appears after some seconds and disappears at the end.

  Args:
    items: The items to iterate over; None to call `update` by hand.
    what: Description of the work.
    unit: Name of the items, in the plural.
    total: Number of items, if `items` has no length.
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
