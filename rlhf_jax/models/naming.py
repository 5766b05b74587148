"""How one array of ours is found among the tensors of a Hugging Face file."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Source:
  """Where one parameter lies in the files.

  Attributes:
    name: the tensor's name without the family's prefix; '{layer}' in it makes the parameter a
      stack of one tensor per layer on a leading axis.
    transpose: the file holds [out, in] where the parameter is [in, out].
    part, parts: the parameter is part number `part` of `parts` equal parts of the tensor's
      last axis (GPT-2 keeps query, key and value in one tensor).
  """
  name: str
  transpose: bool = False
  part: int = 0
  parts: int = 1

  @property
  def stacked(self):
    """Whether the parameter has a leading axis of layers."""
    return '{layer}' in self.name


def torch_linear(path, name, *, bias):
  """The parameters of a layer at `path` whose kernel the file keeps as [out, in]."""
  sources = {f'{path}/kernel': Source(f'{name}.weight', transpose=True)}
  if bias:
    sources[f'{path}/bias'] = Source(f'{name}.bias')
  return sources


def conv1d(path, name, *, part=0, parts=1):
  """The parameters of a layer at `path` whose kernel the file keeps as [in, out]."""
  return {f'{path}/kernel': Source(f'{name}.weight', part=part, parts=parts),
          f'{path}/bias': Source(f'{name}.bias', part=part, parts=parts)}
