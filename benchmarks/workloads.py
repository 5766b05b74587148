"""Workloads of the benchmarks: shapes, analytic FLOPs, and lower bounds of their time.

All workloads are GPT-2 with random weights on random prompts, without early stops, at temperature
1, with 4 epochs of one minibatch, and with a critic and a reward model of the policy's size. This
module imports only the standard library, because each peer has its own virtual environment.

Letters: B batch, P prompt length, R response length, T = P + R, V vocabulary, D width.
"""

import dataclasses
import json

EPOCHS = 4
KL_COEF = 0.05
LEARNING_RATE = 1e-5
GAMMA, LAM = 1.0, 0.95
CLIP, VALUE_CLIP, VALUE_COEF = 0.2, 0.2, 0.1

PARTS = ('rollout', 'scoring', 'update')


@dataclasses.dataclass(frozen=True)
class Workload:
  """Shapes of a PPO iteration.

  Attributes:
    name: Name of the workload.
    layers: Number of layers of GPT-2.
    width: D.
    heads: Number of attention heads.
    mlp: Width of the feed-forward layers.
    vocab: V.
    prompt: P, length of every prompt.
    response: R, length of every response.
    batch: B, sequences per iteration.
    rows: Microbatch size; 0 for the full batch.
  """

  name: str
  layers: int
  width: int
  heads: int
  mlp: int
  vocab: int
  prompt: int
  response: int
  batch: int
  rows: int = 0

  @property
  def length(self):
    """T, the length of a sequence."""
    return self.prompt + self.response

  @property
  def gpt2(self):
    """Fields of the model's config.json."""
    return {
      'vocab_size': self.vocab,
      'n_positions': self.length,
      'n_embd': self.width,
      'n_layer': self.layers,
      'n_head': self.heads,
      'n_inner': self.mlp,
      'resid_pdrop': 0.0,
      'embd_pdrop': 0.0,
      'attn_pdrop': 0.0,
    }

  def to_json(self):
    """Returns the workload as one line of JSON, for `read`."""
    return json.dumps(dataclasses.asdict(self))


WORKLOADS = {
  w.name: w
  for w in (
    Workload('xs', 4, 256, 4, 1024, 8192, 64, 64, 32),
    Workload('s', 6, 768, 12, 3072, 50257, 32, 32, 8),
    Workload('m', 24, 2048, 16, 8192, 50257, 256, 256, 128, rows=8),
  )
}


def read(text):
  """Returns the workload with this name or from the JSON of `Workload.to_json`."""
  return WORKLOADS[text] if text in WORKLOADS else Workload(**json.loads(text))


@dataclasses.dataclass(frozen=True)
class Variant:
  """A choice of trained parameters, and its cost in forward passes.

  Attributes:
    config: Changes from the default PPO config.
    bodies: Forward passes through all blocks in scoring, by policy, critic, reference and reward
      model.
    trained_bodies: Forward passes through all blocks in each epoch.
    body_passes: Cost of forward and backward pass through the blocks, in forward passes: 3 with
      gradients of inputs and weights, 2 with gradients of inputs only.
    unembed_passes: The same for the vocabulary projection.
    trained_blocks: Number of copies of all blocks that the optimizer updates.
    trained_embeddings: Number of embeddings that the optimizer updates.
  """

  config: dict
  bodies: float
  trained_bodies: float
  body_passes: int
  unembed_passes: int
  trained_blocks: float
  trained_embeddings: int


LORA = (('attention/(query|value)$', 16, 32.0),)
# 'separate' is the work that all peers do.
VARIANTS = {
  'separate': Variant({}, 4, 2, 3, 3, 2, 2),
  'trunk': Variant({'critic.kind': 'trunk'}, 3, 1, 3, 3, 1, 1),
  # The lower half of the blocks runs once for policy and reference, and not in the epochs.
  'hydra': Variant(
    {'critic.kind': 'trunk', 'model.unfrozen_layers': 'half'}, 2.5, 0.5, 3, 2, 0.5, 0
  ),
  'lora': Variant({'critic.kind': 'trunk', 'model.lora.targets': LORA}, 3, 1, 2, 2, 0, 0),
}


def body_flops(w, length):
  """Computes the FLOPs of the blocks on B sequences of `length` tokens, with causal attention."""
  linear = 2 * (4 * w.width**2 + 2 * w.width * w.mlp)
  attention = 4 * w.width * length / 2
  return w.batch * length * w.layers * (linear + attention)


def unembed_flops(w, tokens):
  """Computes the FLOPs of the vocabulary projection at `tokens` tokens of each of B sequences."""
  return 2 * w.batch * tokens * w.width * w.vocab


def flops(w, variant='separate', epochs=EPOCHS):
  """Computes the FLOPs of one iteration, {'rollout', 'scoring', 'update'}.

  Scoring is a forward pass of policy, critic, reference and reward model, with log-probabilities of
  the response for policy and reference. The update is a forward and a backward pass of policy and
  critic in each epoch. Norms, activations, softmax and sampling are not counted.
  """
  variant = VARIANTS[variant]
  body, unembed = body_flops(w, w.length), unembed_flops(w, w.response)
  return {
    'rollout': body + unembed,
    'scoring': variant.bodies * body + 2 * unembed,
    'update': epochs
    * (variant.trained_bodies * variant.body_passes * body + variant.unembed_passes * unembed),
  }


def body_weights(w):
  """Returns the number of weights of the blocks' linear layers."""
  return w.layers * (4 * w.width**2 + 2 * w.width * w.mlp)


def weights(w):
  """Returns the number of weights of one model, without biases and norms."""
  return body_weights(w) + w.vocab * w.width


def decode_bytes(w, item_size):
  """Computes the bytes that the decode steps read: weights, and used slots of the key/value cache.

  Args:
    w: Workload.
    item_size: Bytes of a weight.

  Returns:
    {'weights', 'cache'}.
  """
  steps = w.response - 1  # the first token comes from the prefill
  filled = steps * w.prompt + steps * (steps + 1) / 2
  return {
    'weights': steps * weights(w) * item_size,
    'cache': filled * w.batch * 2 * w.layers * w.width * item_size,
  }


def optimizer_bytes(w, variant='separate', epochs=EPOCHS):
  """Computes the bytes that Adam reads and writes in an iteration, in float32.

  It reads and writes weights and both moments, and reads gradients.
  """
  variant = VARIANTS[variant]
  trained = (
    variant.trained_blocks * body_weights(w) + variant.trained_embeddings * w.vocab * w.width
  )
  return epochs * 7 * 4 * trained


def bound(w, matmul, copy, *, variant='separate', epochs=EPOCHS, item_size=4):
  """Computes a lower bound of the seconds of an iteration from the machine's measured limits.

  FLOPs run at the rate of a large matmul. A decode step takes at least the time to read the
  weights. The update also has Adam's memory traffic.

  Args:
    w: Workload.
    matmul: FLOP/s of a large matmul.
    copy: Bytes/s of a large copy, read plus written.
    variant: See VARIANTS.
    epochs: Number of epochs of the update.
    item_size: Bytes of a weight in decode steps.

  Returns:
    Seconds by part: {'rollout', 'scoring', 'update'}.
  """
  work = flops(w, variant, epochs)
  prefill = body_flops(w, w.prompt) + unembed_flops(w, 1)
  decode = work['rollout'] - prefill
  return {
    'rollout': prefill / matmul
    + max(decode / matmul, decode_bytes(w, item_size)['weights'] / copy),
    'scoring': work['scoring'] / matmul,
    'update': work['update'] / matmul + optimizer_bytes(w, variant, epochs) / copy,
  }
