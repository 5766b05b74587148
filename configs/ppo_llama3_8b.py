"""PPO of Llama 3 8B with a critic, a reward model and a reference of the same size.

rlhf plan --config=ppo_llama3_8b --topology=v5e:16x16 --search
rlhf run --workdir=DIR \\
    --config=ppo_llama3_8b:policy=FOLDER,reward=FOLDER,prompts=FILE

FOLDERs are Hugging Face folders: the policy after SFT, and a reward model with the same tokenizer,
from which the critic starts too. `:lora` trains adapters of rank 64 on the linear layers of policy
and critic instead of all weights; the reference is then the policy without its adapters.

The recipe is that of N+ (https://arxiv.org/abs/2403.17031), with 512 episodes of up to 512 + 512
tokens per iteration. Weights and computation are bfloat16; updates are accumulated in float32. It
has not been run at this size: docs/plan.md has the TPU compiler's estimates for three kinds of
chips, and the meshes that fit.
"""

from rlhf_jax import config as c
from rlhf_jax.algorithms import ppo as ppo_lib

# config.json of meta-llama/Meta-Llama-3-8B (https://arxiv.org/abs/2407.21783, table 3).
SHAPES = {
  'family': 'llama',
  'vocab_size': 128_256,
  'hidden_size': 4096,
  'intermediate_size': 14_336,
  'num_hidden_layers': 32,
  'num_attention_heads': 32,
  'num_key_value_heads': 8,
  'max_position_embeddings': 8192,
  'rope_theta': 500_000.0,
  'rms_norm_eps': 1e-5,
  'tie_word_embeddings': False,
}
SMALL = {
  'hidden_size': 64,
  'intermediate_size': 128,
  'num_hidden_layers': 2,
  'num_attention_heads': 4,
  'num_key_value_heads': 2,
  'vocab_size': 512,
}


def get_config(arg=None):
  """Returns the config.

  Arguments: debug (seconds), seed, lora, policy and reward (folders), prompts (a file).
  """
  arg = c.parse_arg(
    arg,
    debug=False,
    seed=0,
    lora=False,
    policy='models/llama-3-8b-sft',
    reward='models/llama-3-8b-reward',
    prompts='data/prompts.jsonl',
  )
  config = ppo_lib.config('n_plus')
  config.seed = arg.seed
  config.model.update(
    {
      'path': arg.policy,
      'init': SHAPES,
      'dtype': 'bfloat16',
      'param_dtype': 'bfloat16',
      'remat': 'block',
    }
  )
  config.reward.model = arg.reward
  config.data.update({'path': arg.prompts, 'max_prompt_length': 512, 'on_long': 'truncate_left'})
  config.sampling.update({'max_new_tokens': 512, 'gather_weights': True})
  config.batch_size, config.microbatch_size, config.steps = 512, 256, 1000
  config.mesh = {'data': 1, 'fsdp': -1, 'tensor': 4}
  config.optim.update({'clip_norm': 1.0, 'warmup_steps': 10, 'warmup_from': 0.1})
  config.checkpoint_every, config.samples_every = 50, 10
  if arg.lora:
    config.model.lora.targets = (('attention/', 64, 128.0), ('mlp/', 64, 128.0))
    config.critic.kind = 'adapters'
    config.optim.learning_rate = 3e-5
  if arg.debug:
    config.model.init.update(SMALL)
    config.data.max_prompt_length, config.sampling.max_new_tokens = 16, 16
    config.update({'batch_size': 16, 'microbatch_size': 8, 'steps': 2})
    config.optim.update({'warmup_steps': 0, 'warmup_from': 0.0})
    config.mesh = {'data': -1, 'fsdp': 1, 'tensor': 1}
  return config
