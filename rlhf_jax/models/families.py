"""The model families by the `model_type` of their config.json, and what a family's file must have.

Letters: B batch, T tokens of this call, S slots of the cache (T without one), D width, N heads, H
head width.
"""

from typing import Protocol

from flax import nnx

from rlhf_jax.models import bert
from rlhf_jax.models import blocks
from rlhf_jax.models import gemma
from rlhf_jax.models import gemma2
from rlhf_jax.models import gemma3
from rlhf_jax.models import gpt2
from rlhf_jax.models import hf_config
from rlhf_jax.models import llama
from rlhf_jax.models import mistral
from rlhf_jax.models import neox
from rlhf_jax.models import opt
from rlhf_jax.models import phi3
from rlhf_jax.models import qwen2
from rlhf_jax.models import qwen3
from rlhf_jax.models import roberta
from rlhf_jax.models import t5


class Family(Protocol):
  """What the file of every family has.

  Attributes:
    ARCHITECTURE: transformers' class of its language models, or of its reward models if it has no
      others.
    CLASSIFIER: transformers' class of its reward models.
    PREFIX: of the tensors' names in files of whole models; files of bare backbones lack it.
    UNEMBED: the tensor of an unembedding that is not the embedding; None if it never has one.
    IGNORED_TENSORS: regex of tensors that may lie beside the parameters.
    RULES: sharding of the parameters, ((regex on the path, PartitionSpec), ...); the first counts.
    Config: the fields of its config.json, and what the models read of them.
    Embedder: the module of the parameters outside of the blocks.
  """

  ARCHITECTURE: str
  CLASSIFIER: str
  PREFIX: str
  UNEMBED: str | None
  IGNORED_TENSORS: str
  RULES: tuple
  Config: type[hf_config.Config]
  Embedder: type[nnx.Module]

  def sources(self, config):
    """Where each parameter lies in the files, {path: naming.Source}; UNEMBED apart."""


class OneStack(Family, Protocol):
  """A family of decoders (transformer.Model) or of encoders (encoder.Encoder).

  Attributes:
    Block: a layer.
    Embedder: what stands before and after the layers. That of an encoder has a method `pool`, from
      the first token's state [B, D] to what a head reads.
  """

  Block: type[blocks.Block]
  Embedder: type[blocks.Embedder]


class EncoderDecoderConfig(Protocol):
  """What the Config of an encoder-decoder says beside hf_config.Config.

  Attributes:
    num_layers, num_decoder_layers: blocks of the encoder and of the decoder.
    scale_decoder_outputs: whether the unembedding reads states times D^-0.5.
    decoder_start_token_id: what every response starts from.
    pooled: whether the score's head reads states through `Embedder.pooler`.
  """

  num_layers: int
  num_decoder_layers: int
  scale_decoder_outputs: bool
  decoder_start_token_id: int
  pooled: bool


class DecoderBlock(Protocol):
  """A layer that also reads the encoder's states, through its layers.Attention `cross`."""

  def __init__(self, config, *, dtype, rngs):
    """See blocks.Block."""

  def __call__(self, x, layer, attend, cross_attend):
    """Applies the layer.

    Args:
      x, layer, attend: see blocks.Block.
      cross_attend: (queries [B, T, N, H]) -> [B, T, N * H], from the encoder's states.

    Returns:
      x of the next layer, and what `attend` returned beside the mixed values.
    """


class Side(Protocol):
  """What each side has beside its blocks: a module `norm` for the end, and biases of scores."""

  def __init__(self, config, *, dtype, rngs):
    """See blocks.Block."""

  def bidirectional_bias(self, length):
    """The bias [1, N, 1, T, T] float32 of the scores among T tokens that see each other."""

  def causal_bias(self, index, query_length, key_length):
    """The bias [1, N, 1, T, S] float32 of T queries that see S slots up to their own.

    Args:
      index: slot of the first query.
      query_length, key_length: T and S.
    """


class EncoderDecoder(Family, Protocol):
  """A family of encoder-decoders (seq2seq.Seq2Seq).

  Attributes:
    Config: an EncoderDecoderConfig too.
    Embedder: a module with `embed` of both sides, and `pooler` if the config is `pooled`.
    EncoderBlock, DecoderBlock: layers of the two sides.
    Side: the rest of each side.
  """

  EncoderBlock: type[blocks.Block]
  DecoderBlock: type[DecoderBlock]
  Side: type[Side]


DECODERS: dict[str, OneStack] = {
  'gemma': gemma,
  'gemma2': gemma2,
  'gemma3': gemma3,
  'gemma3_text': gemma3,
  'gpt2': gpt2,
  'gpt_neox': neox,
  'llama': llama,
  'mistral': mistral,
  'opt': opt,
  'phi3': phi3,
  'qwen2': qwen2,
  'qwen3': qwen3,
}
ENCODERS: dict[str, OneStack] = {'bert': bert, 'roberta': roberta}
ENCODER_DECODERS: dict[str, EncoderDecoder] = {'t5': t5}
FAMILIES: dict[str, Family] = DECODERS | ENCODERS | ENCODER_DECODERS
