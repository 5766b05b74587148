"""Maps our parameters to the tensors of Hugging Face files.

The columns of a parameter, [inputs, outputs] or [outputs], are its last axis; the columns of a
tensor are the axis that corresponds to it.
"""

import dataclasses
import itertools


@dataclasses.dataclass(frozen=True)
class Columns:
  """The columns of a fused tensor that belong to one parameter.

  Column j of the parameter is column offset + (j // block) * stride + j % block of the tensor.

  Attributes:
    offset: First column.
    block: Number of adjacent columns; None if all columns are adjacent.
    stride: Distance from the start of one block to the start of the next.
  """

  offset: int = 0
  block: int | None = None
  stride: int = 0

  def runs(self, start, stop):
    """Returns slices of the tensor's columns, in order, for columns start:stop of the parameter."""
    if self.block is None:
      return [slice(self.offset + start, self.offset + stop)]
    slices = []
    while start < stop:
      number, within = divmod(start, self.block)
      count = min(self.block - within, stop - start)
      first = self.offset + number * self.stride + within
      slices.append(slice(first, first + count))
      start += count
    return slices


ALL_COLUMNS = Columns()


def concatenated(*widths):
  """Returns the Columns of parameters that one tensor concatenates, given their widths."""
  return [Columns(offset) for offset in itertools.accumulate(widths[:-1], initial=0)]


def interleaved(count, block):
  """Returns the Columns of `count` parameters in a tensor flattened from [heads, count, block]."""
  return [Columns(part * block, block, count * block) for part in range(count)]


@dataclasses.dataclass(frozen=True)
class Source:
  """The place of one parameter in the files.

  Attributes:
    name: Name of the tensor without the family's prefix. If it contains '{layer}', the parameter
      stacks one tensor per layer along a leading axis.
    transpose: Whether the file stores a parameter [in, out] as [out, in].
    columns: This parameter's columns of the tensor. Several parameters may share a tensor.
  """

  name: str
  transpose: bool = False
  columns: Columns = ALL_COLUMNS

  @property
  def stacked(self):
    """Whether the parameter has a leading axis of layers."""
    return '{layer}' in self.name


def torch_linear(path, name, *, bias, columns=ALL_COLUMNS):
  """Returns the Sources of a linear layer at `path` whose kernel is stored as [out, in]."""
  sources = {f'{path}/kernel': Source(f'{name}.weight', transpose=True, columns=columns)}
  if bias:
    sources[f'{path}/bias'] = Source(f'{name}.bias', columns=columns)
  return sources


def conv1d(path, name, *, columns=ALL_COLUMNS):
  """Returns the Sources of a linear layer at `path` whose kernel is stored as [in, out]."""
  return {
    f'{path}/kernel': Source(f'{name}.weight', columns=columns),
    f'{path}/bias': Source(f'{name}.bias', columns=columns),
  }


def linears(names, *, bias):
  """Returns the Sources of several `torch_linear` layers, given as {path: name}."""
  sources = {}
  for path, name in names.items():
    sources |= torch_linear(path, name, bias=bias)
  return sources


def embeddings(names):
  """Returns the Sources of embeddings, given as {path: name}."""
  return {f'{path}/embedding': Source(f'{name}.weight') for path, name in names.items()}


def scales(names):
  """Returns the Sources of the scales of norms, given as {path: name}."""
  return {f'{path}/scale': Source(f'{name}.weight') for path, name in names.items()}


def norms(names):
  """Returns the Sources of the scales and biases of norms, given as {path: name}."""
  return scales(names) | {f'{path}/bias': Source(f'{name}.bias') for path, name in names.items()}
