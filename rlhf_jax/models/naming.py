"""How one array of ours is found among the tensors of a Hugging Face file.

Columns are the last axis of a parameter, [inputs, outputs] or [outputs]; of a tensor, the axis
that corresponds to it.
"""

import dataclasses
import itertools


@dataclasses.dataclass(frozen=True)
class Columns:
  """Which columns of a fused tensor are one parameter's.

  Column j of the parameter is column offset + (j // block) * stride + j % block of the tensor.

  Attributes:
    offset: where the first of them is.
    block: how many lie together; None: all of them.
    stride: from the beginning of one block to the next.
  """

  offset: int = 0
  block: int | None = None
  stride: int = 0

  def runs(self, start, stop):
    """Slices of the tensor's columns that make up columns start to stop of the parameter, in order."""
    if self.block is None:
      return [slice(self.offset + start, self.offset + stop)]
    found = []
    while start < stop:
      number, within = divmod(start, self.block)
      count = min(self.block - within, stop - start)
      first = self.offset + number * self.stride + within
      found.append(slice(first, first + count))
      start += count
    return found


WHOLE = Columns()


def concatenated(*widths):
  """Columns of parameters that lie in one tensor one after another, for each of their widths."""
  return [Columns(offset) for offset in itertools.accumulate(widths[:-1], initial=0)]


def interleaved(count, block):
  """Columns of `count` parameters of which each in turn has `block`: [heads, count, block] flattened."""
  return [Columns(part * block, block, count * block) for part in range(count)]


@dataclasses.dataclass(frozen=True)
class Source:
  """Where one parameter lies in the files.

  Attributes:
    name: the tensor's name without the family's prefix; '{layer}' in it makes the parameter a
      stack of one tensor per layer on a leading axis.
    transpose: the file holds [out, in] where the parameter is [in, out].
    columns: which of the tensor's are this parameter's; parameters of one name share them all.
  """

  name: str
  transpose: bool = False
  columns: Columns = WHOLE

  @property
  def stacked(self):
    """Whether the parameter has a leading axis of layers."""
    return '{layer}' in self.name


def torch_linear(path, name, *, bias, columns=WHOLE):
  """The parameters of a layer at `path` whose kernel the file keeps as [out, in]."""
  sources = {f'{path}/kernel': Source(f'{name}.weight', transpose=True, columns=columns)}
  if bias:
    sources[f'{path}/bias'] = Source(f'{name}.bias', columns=columns)
  return sources


def conv1d(path, name, *, columns=WHOLE):
  """The parameters of a layer at `path` whose kernel the file keeps as [in, out]."""
  return {
    f'{path}/kernel': Source(f'{name}.weight', columns=columns),
    f'{path}/bias': Source(f'{name}.bias', columns=columns),
  }


def linears(names, *, bias):
  """`torch_linear` of {path: name}."""
  found = {}
  for path, name in names.items():
    found |= torch_linear(path, name, bias=bias)
  return found


def embeddings(names):
  """The parameters of embeddings, of {path: name}."""
  return {f'{path}/embedding': Source(f'{name}.weight') for path, name in names.items()}


def scales(names):
  """The scales of norms, of {path: name}."""
  return {f'{path}/scale': Source(f'{name}.weight') for path, name in names.items()}


def norms(names):
  """The scales and biases of norms, of {path: name}."""
  return scales(names) | {f'{path}/bias': Source(f'{name}.bias') for path, name in names.items()}
