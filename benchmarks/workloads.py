"""The workloads of the benchmarks: shapes, FLOPs counted by hand, and lower bounds of their time.

All of them are GPT-2 with random weights on random prompts: no early stop, temperature 1, 4 epochs
of one minibatch, a critic and a reward model of the policy's size. Needs nothing but Python, as
every peer reads it in its own virtual environment.

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
    name: what it is called.
    layers, width, heads, mlp, vocab: of GPT-2; `mlp` is the width of its feed-forward layers.
    prompt: P, tokens of every prompt.
    response: R, tokens of every response.
    batch: B, episodes of an iteration.
    rows: of a forward and backward pass, of which an update adds up the gradients; 0: all at once.
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
    """T."""
    return self.prompt + self.response

  @property
  def gpt2(self):
    """Fields of config.json."""
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
    """One line of text that `read` understands."""
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
  """The workload of a name, or of `Workload.to_json`."""
  return WORKLOADS[text] if text in WORKLOADS else Workload(**json.loads(text))


@dataclasses.dataclass(frozen=True)
class Way:
  """What is trained, in forward passes and in multiples of them.

  Attributes:
    config: keys of `rlhf_jax.config.ppo()` that differ from the defaults.
    bodies: stacks of blocks run in scoring; by policy, critic, reference and reward model.
    trained_bodies: stacks of blocks run by each epoch.
    body_passes: 3 with a backward pass to inputs and weights, 2 with one to inputs only.
    unembed_passes: the same of the vocabulary projection.
    trained_blocks: stacks of blocks that an optimizer step goes over.
    trained_embeddings: embeddings that it goes over.
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
WAYS = {
  'separate': Way({}, 4, 2, 3, 3, 2, 2),
  'trunk': Way({'critic.kind': 'trunk'}, 3, 1, 3, 3, 1, 1),
  # The lower half of the blocks is run once for policy and reference, and not at all by the epochs.
  'hydra': Way({'critic.kind': 'trunk', 'model.unfrozen_layers': 'half'}, 2.5, 0.5, 3, 2, 0.5, 0),
  'lora': Way({'critic.kind': 'trunk', 'model.lora.targets': LORA}, 3, 1, 2, 2, 0, 0),
}


def body_flops(w, length):
  """FLOPs of the blocks on B sequences of `length` tokens; attention is half of the square."""
  linear = 2 * (4 * w.width**2 + 2 * w.width * w.mlp)
  attention = 4 * w.width * length / 2
  return w.batch * length * w.layers * (linear + attention)


def unembed_flops(w, slots):
  """Of the vocabulary projection at `slots` tokens of each of B rows."""
  return 2 * w.batch * slots * w.width * w.vocab


def flops(w, way='separate', epochs=EPOCHS):
  """Floating-point operations of one iteration: {'rollout', 'scoring', 'update'}.

  Scoring is a forward pass each of policy, critic, reference and reward model, the first and third
  with log-probabilities of the response; the update does a forward and a backward pass of policy
  and critic in each epoch. Norms, activations, softmax and sampling are not counted.
  """
  way = WAYS[way]
  body, unembed = body_flops(w, w.length), unembed_flops(w, w.response)
  return {
    'rollout': body + unembed,
    'scoring': way.bodies * body + 2 * unembed,
    'update': epochs * (way.trained_bodies * way.body_passes * body + way.unembed_passes * unembed),
  }


def body_weights(w):
  """Weights of the blocks' linear maps."""
  return w.layers * (4 * w.width**2 + 2 * w.width * w.mlp)


def weights(w):
  """Weights of one model, biases and norms left out."""
  return body_weights(w) + w.vocab * w.width


def decode_bytes(w, item_size):
  """Bytes the decode steps read: all weights once each, and the filled part of the key/value cache.

  Args:
    w: Workload.
    item_size: bytes of a weight.

  Returns:
    {'weights', 'cache'}.
  """
  steps = w.response - 1  # the first token comes from the prefill
  filled = steps * w.prompt + steps * (steps + 1) / 2
  return {
    'weights': steps * weights(w) * item_size,
    'cache': filled * w.batch * 2 * w.layers * w.width * item_size,
  }


def optimizer_bytes(w, way='separate', epochs=EPOCHS):
  """Bytes Adam moves in an iteration, in float32: weights and moments twice, gradients once."""
  way = WAYS[way]
  trained = way.trained_blocks * body_weights(w) + way.trained_embeddings * w.vocab * w.width
  return epochs * 7 * 4 * trained


def bound(w, matmul, copy, *, way='separate', epochs=EPOCHS, item_size=4):
  """The least seconds of an iteration at the machine's measured limits.

  FLOPs at the rate of a large matmul; a decode step takes at least as long as its weights take to
  read; the update also takes Adam's traffic.

  Args:
    w: Workload.
    matmul: FLOP/s of a large matmul.
    copy: bytes/s of a large copy, read and written together.
    way: see WAYS.
    epochs: of the update.
    item_size: bytes of a weight as the decode reads it.

  Returns:
    Seconds by part: {'rollout', 'scoring', 'update'}.
  """
  work = flops(w, way, epochs)
  prefill = body_flops(w, w.prompt) + unembed_flops(w, 1)
  decode = work['rollout'] - prefill
  return {
    'rollout': prefill / matmul
    + max(decode / matmul, decode_bytes(w, item_size)['weights'] / copy),
    'scoring': work['scoring'] / matmul,
    'update': work['update'] / matmul + optimizer_bytes(w, way, epochs) / copy,
  }
