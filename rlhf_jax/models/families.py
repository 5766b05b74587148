"""The model families by the `model_type` of their config.json, and the interface of their files.

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
  """The interface of every family's file.

  Attributes:
    ARCHITECTURE: The transformers class of its language models, or of its reward models if it has
      no language models.
    CLASSIFIER: The transformers class of its reward models.
    PREFIX: Prefix of tensor names in files of full models; files of bare backbones lack it.
    UNEMBED: Name of an untied unembedding's tensor; None if the family never has one.
    IGNORED_TENSORS: Regex of tensors that are not parameters and may be in the files.
    RULES: Sharding of the parameters, ((regex on the path, PartitionSpec), ...); the first match
      applies.
    Config: The fields of its config.json, and the attributes that the models read.
    Embedder: Module of the parameters outside of the blocks.
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
    """Returns the source of each parameter but UNEMBED in the files, {path: naming.Source}."""


class OneStack(Family, Protocol):
  """A family of decoders (transformer.Model) or of encoders (encoder.Encoder).

  Attributes:
    Block: Module of one layer.
    Embedder: Module of the parameters outside of the blocks. An encoder's has a method `pool`,
      which maps the first token's state [B, D] to the state that a head reads.
  """

  Block: type[blocks.Block]
  Embedder: type[blocks.Embedder]


class EncoderDecoderConfig(Protocol):
  """The attributes that the Config of an encoder-decoder has in addition to hf_config.Config.

  Attributes:
    num_layers, num_decoder_layers: Numbers of blocks in the encoder and the decoder.
    scale_decoder_outputs: Whether states are multiplied by D^-0.5 before the unembedding.
    decoder_start_token_id: First input of the decoder.
    pooled: Whether states go through `Embedder.pooler` before the head of a reward model.
  """

  num_layers: int
  num_decoder_layers: int
  scale_decoder_outputs: bool
  decoder_start_token_id: int
  pooled: bool


class DecoderBlock(Protocol):
  """A layer that also attends to the encoder's states, with the layers.Attention `cross`."""

  def __init__(self, config, *, dtype, rngs):
    """See blocks.Block."""

  def __call__(self, x, layer, attend, cross_attend):
    """Applies the layer.

    Args:
      x, layer, attend: See blocks.Block.
      cross_attend: Function from queries [B, T, N, H] to [B, T, N * H] that attends to the
        encoder's states.

    Returns:
      x for the next layer, and the `kv_cache` from `attend`.
    """


class Side(Protocol):
  """The parameters of the encoder or the decoder outside of its blocks.

  It has a final norm, the module `norm`, and biases of the attention scores.
  """

  def __init__(self, config, *, dtype, rngs):
    """See blocks.Block."""

  def bidirectional_bias(self, length):
    """Returns the bias [1, N, 1, T, T] float32 of bidirectional attention among T tokens."""

  def causal_bias(self, index, query_length, key_length):
    """Returns the bias [1, N, 1, T, S] float32 of causal attention.

    Args:
      index: Slot of the first query among the keys.
      query_length, key_length: T and S.
    """


class EncoderDecoder(Family, Protocol):
  """A family of encoder-decoders (seq2seq.Seq2Seq).

  Attributes:
    Config: Also an EncoderDecoderConfig.
    Embedder: Module with the shared embedding `embed`, and `pooler` if the config is `pooled`.
    EncoderBlock, DecoderBlock: Modules of one layer of the encoder and of the decoder.
    Side: Module of the other parameters of the encoder, and of the decoder.
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
