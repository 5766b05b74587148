"""The reliability of each annotator, learned together with a reward model.

Bradley and Terry's model with a temperature for each annotator: annotator k prefers completion a to
b with probability sigmoid(beta_k (r_a - r_b)); see losses.reliabilities. Every beta starts at 1,
the value of annotators who are all alike, and has a normal prior of mean 1 and standard deviation
1, so that an annotator of few comparisons stays near 1. A record without an annotator has beta 1.

Annotators are the texts of the records' field `annotator`, in sorted order. They are fixed when a
run starts and are written to annotators.json in its folder; see evaluation/annotators.py.

Letters: A annotators, B prompts.
"""

import collections
from collections.abc import Mapping
from collections.abc import Sequence
import dataclasses
import pathlib

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, PyTree
import numpy as np

from rlhf_jax import errors
from rlhf_jax import losses
from rlhf_jax import processes
from rlhf_jax import sharding
from rlhf_jax import types
from rlhf_jax.data import formats
from rlhf_jax.data import progress
from rlhf_jax.evaluation import annotators

RULES = ((r'(^|/)offsets$', PartitionSpec()),)  # replicates `initial` and its optimizer moments

Params = Mapping[str, PyTree]  # {'reward', 'annotators'}; without the latter nothing is learned


@dataclasses.dataclass(frozen=True)
class Panel:
  """The annotators of a run's data.

  Attributes:
    names: A texts, sorted.
    counts: A numbers of comparisons.
  """

  names: tuple[str, ...]
  counts: tuple[int, ...]

  def check(self, workdir: pathlib.Path) -> None:
    """Raises UserError if the run in a folder began with other annotators."""
    before = [row['annotator'] for row in annotators.read(workdir)]
    errors.need(
      not before or before == list(self.names),
      f'{workdir / annotators.FILE}: the run began with annotators {", ".join(before)}, but the '
      f'data now have {", ".join(self.names)}: restore the data, or start a new run',
    )

  def write(self, workdir: pathlib.Path, values: Float[np.ndarray, ' A'] | None = None) -> None:
    """Writes annotators.json: names, numbers of comparisons, and reliabilities once learned."""
    if not processes.is_main_process():
      return
    learned = [None] * len(self.names) if values is None else [float(value) for value in values]
    annotators.write(
      workdir,
      [
        {'annotator': name, 'comparisons': count, 'reliability': value}
        for name, count, value in zip(self.names, self.counts, learned, strict=True)
      ],
    )


def find(examples: Sequence[formats.Comparison]) -> Panel:
  """Returns the annotators of training data.

  Raises:
    UserError: No record names its annotator.
  """
  counts = collections.Counter(
    example.annotator for example in progress.bar(examples, 'reading annotators', 'prompts')
  )
  del counts[None]
  errors.need(
    counts,
    'config.preference.reliability tells annotators apart, but no record of the training data has '
    "a field 'annotator': add it, name its column with config.data.columns='annotator=COLUMN', or "
    'set config.preference.reliability to False',
  )
  names = tuple(sorted(counts))
  return Panel(names, tuple(counts[name] for name in names))


def check_fork(panel: Panel | None, source: pathlib.Path) -> None:
  """Raises UserError if a fork of the run in a folder has other annotators than that run.

  Args:
    panel: The annotators of the fork, None if it learns no reliability.
    source: Folder of the run.
  """
  before, now = annotators.read(source), panel.names if panel else ()
  errors.need(
    [row['annotator'] for row in before] == list(now),
    f'{source} {_learns([row["annotator"] for row in before])}, but --fork {_learns(now)}: use the '
    'data and config.preference.reliability of that run, or start a new run without --fork',
  )


def _learns(names: Sequence[str]) -> str:
  if not names:
    return 'learns no reliability'
  return f'learns the reliability of annotators {", ".join(names)}'


def initial(panel: Panel, mesh: jax.sharding.Mesh) -> dict[str, Float[Array, ' A']]:
  """Returns the parameters of the reliabilities, all of which are 1."""
  offsets = jnp.zeros(len(panel.names), jnp.float32)
  return jax.device_put({'offsets': offsets}, sharding.replicated(mesh))


def of_batch(params: Params, batch: types.Comparisons) -> Float[Array, ' B'] | None:
  """Returns the reliability of the annotator of each prompt; None if none is learned."""
  if 'annotators' not in params:
    return None
  return losses.reliabilities(params['annotators']['offsets'], batch.annotator)


def of_all(params: Params) -> Float[Array, ' A']:
  """Returns the reliabilities of all annotators."""
  offsets = params['annotators']['offsets']
  return losses.reliabilities(offsets, jnp.arange(len(offsets)))


def penalty(params: Params) -> Float[Array, '']:
  """Returns the negative log of the prior, (1/2) sum_k (beta_k - 1)^2, in nats."""
  return 0.5 * jnp.sum(jnp.square(of_all(params) - 1.0))


def metrics(params: Params) -> dict[str, Float[Array, '']]:
  """Returns the metrics of a step; none if no reliability is learned."""
  if 'annotators' not in params:
    return {}
  values = of_all(params)
  return {'reliability/lowest': jnp.min(values), 'reliability/highest': jnp.max(values)}
