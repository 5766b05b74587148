"""A progress bar for what takes long before the first step: reading and tokenizing."""

from collections.abc import Iterable
from typing import Any

import tqdm

from rlhf_jax import processes

DELAY_SECONDS = 3.0


def bar(
  items: Iterable[Any] | None, what: str, unit: str, *, total: int | None = None
) -> tqdm.tqdm:
  """tqdm's bar, which the first process shows after some seconds and removes at the end.

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
    dynamic_ncols=True,
    disable=not processes.is_main_process(),
  )
