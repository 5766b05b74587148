"""Runs Tunix's PPOLearner (0.1.7) on a workload.

python -m benchmarks.peers.tunix --workload xs

It runs the learner's `train()` with the vanilla rollout engine on prompts in memory. Tunix has no
GPT-2. We use its Qwen2 instead, with the same attention heads, tied embeddings, and a gated
feed-forward layer of two thirds of the width, which has as many weights and FLOPs. Its norms and
SiLU cost less than GPT-2's. Critic and reward model have a scalar head in place of the vocabulary.

Times: the rollout is `RLCluster.generate`, scoring is the rest of
`_generate_and_compute_advantage`, and the update ends when the loop requests the next prompts.
Tuned in its favour: one microbatch, no sorting in the sampler, a cache as long as prompt and
response, and the glibc allocator settings of benchmarks/run.py.
"""

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from tunix.models.qwen2 import model as qwen2
from tunix.rl import rl_cluster
from tunix.rl import utils
from tunix.rl.ppo import ppo_learner
from tunix.rl.rollout import base_rollout

from benchmarks import workloads
from benchmarks.peers import jax_device
from benchmarks.peers import protocol


class Numbers:
  """Tokenizer with the interface of Tunix. A text is a list of ids written as numbers.

  BOS has id 1. Padding and EOS are outside of the vocabulary, so prompts do not contain them and
  responses do not end.
  """

  def __init__(self, vocab):
    self._vocab = vocab

  def encode(self, text):
    """Returns the ids of a text such as '5 17 3'."""
    return [int(word) for word in text.split()]

  def decode(self, ids):
    """Returns the text of ids."""
    return ' '.join(str(int(i)) for i in ids)

  def bos_id(self):
    """Returns the id of BOS."""
    return 1

  def pad_id(self):
    """Returns the id of padding."""
    return self._vocab

  def eos_id(self):
    """Returns the id of EOS, which no model samples."""
    return self._vocab + 1


def make_model(w, *, tied, seed, device):
  """Creates a random Qwen2 with as many weights and FLOPs as a workload's GPT-2."""
  dtype = jnp.float32 if device == 'cpu' else jnp.bfloat16
  config = qwen2.ModelConfig(
    num_layers=w.layers,
    vocab_size=w.vocab,
    embed_dim=w.width,
    hidden_dim=16 * round(w.mlp / 24),
    num_heads=w.heads,
    head_dim=w.width // w.heads,
    num_kv_heads=w.heads,
    rope_theta=10_000,
    norm_eps=1e-5,
    use_tied_embedding=tied,
    dtype=dtype,
    param_dtype=dtype,
  )
  return qwen2.Qwen2(config, rngs=nnx.Rngs(seed))


def scalar_model(w, *, seed, device):
  """Creates a critic or reward model with Tunix's own function."""
  return utils.create_critic_model(make_model(w, tied=False, seed=seed, device=device), seed)


def make_learner(w, device):
  """Creates a PPOLearner with random models and no limit of steps."""
  mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]).reshape(1, 1), ('fsdp', 'tp'))
  config = rl_cluster.ClusterConfig(
    role_to_mesh={role: mesh for role in rl_cluster.Role},
    training_config=rl_cluster.RLTrainingConfig(
      actor_optimizer=optax.adam(workloads.LEARNING_RATE),
      critic_optimizer=optax.adam(workloads.LEARNING_RATE),
      eval_every_n_steps=10**9,
      max_steps=10**9,
    ),
    rollout_config=base_rollout.RolloutConfig(
      max_tokens_to_generate=w.response,
      max_prompt_length=w.prompt,
      kv_cache_size=w.length,
      temperature=1.0,
      top_p=1.0,
      top_k=None,
    ),
  )
  cluster = rl_cluster.RLCluster(
    actor=make_model(w, tied=True, seed=0, device=device),
    reference=make_model(w, tied=True, seed=0, device=device),
    critic=scalar_model(w, seed=1, device=device),
    reward=scalar_model(w, seed=2, device=device),
    tokenizer=Numbers(w.vocab),
    cluster_config=config,
  )
  return ppo_learner.PPOLearner(
    cluster,
    ppo_learner.PPOConfig(
      num_iterations=workloads.EPOCHS,
      gamma=workloads.GAMMA,
      gae_lambda=workloads.LAM,
      beta=workloads.KL_COEF,
      epsilon=workloads.CLIP,
      clip_range_value=workloads.VALUE_CLIP,
      kl_method='kl',
    ),
  )


def take_times(learner, turns):
  """Patches the learner's methods so that they time rollout and scoring."""
  cluster = learner.rl_cluster
  generate, score = cluster.generate, learner._generate_and_compute_advantage

  def timed_generate(*args, **kwargs):
    out = generate(*args, **kwargs)
    turns.lap('rollout')
    return out

  def timed_score(*args, **kwargs):
    out = jax.block_until_ready(score(*args, **kwargs))
    turns.lap('scoring')
    return out

  cluster.generate, learner._generate_and_compute_advantage = timed_generate, timed_score


def prompts(w, learner, turns):
  """Yields batches of prompts for the learner. Waits for the peer's turn before each batch."""
  rng = np.random.default_rng(0)
  trained = learner.rl_cluster.actor_trainer, learner.rl_cluster.critic_trainer
  turns.wait()
  while True:
    rows = rng.integers(2, w.vocab, (w.batch, w.prompt - 1))  # the first token is BOS
    yield {'prompts': np.array([' '.join(map(str, row)) for row in rows])}
    jax.block_until_ready([nnx.state(trainer.model) for trainer in trained])
    turns.lap('update')
    turns.report()
    turns.wait()


def main():
  options = protocol.arguments(__doc__)
  turns = protocol.Turns(device_peak=jax_device.peak)
  learner = make_learner(options.workload, options.device)
  take_times(learner, turns)
  turns.ready(
    protocol.versions('google-tunix', 'jax', 'flax'), note='Qwen2 with as many weights and FLOPs'
  )
  learner.train(prompts(options.workload, learner, turns))


if __name__ == '__main__':
  main()
