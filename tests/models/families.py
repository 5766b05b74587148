"""Random small models of transformers, one function per family; references of the parity tests.

Each function takes a seed and returns a model whose parameters are all random, including norms and
biases. The seed selects the family's options (rotary scalings, ...), so that any 24 consecutive
seeds cover all of them.
"""

import numpy as np
import torch
import transformers

LENGTH = 14  # tokens per sequence in the tests

ROPE_TYPES = ('yarn', 'dynamic', 'longrope', 'default', 'linear', 'llama3', 'proportional')


def pick(draw, options):
  """Returns a random element of a list."""
  return options[draw.integers(len(options))]


def rope_type(seed):
  """Returns a type by the seed; every seventh seed has the same."""
  return ROPE_TYPES[seed % len(ROPE_TYPES)]


def rope_parameters(draw, seed, turning):
  """Returns parameters of the seed's type for `turning` coordinates; some depend on the length."""
  divisors = [1 + draw.random((turning + 1) // 2) * most for most in (1, 9)]
  own = {
    'yarn': {
      'factor': 4.0,
      'original_max_position_embeddings': 64,
      'beta_fast': 4.0,
      'beta_slow': 1.0,
      **pick(
        draw,
        [
          {},
          {'truncate': False},
          {'attention_factor': 1.3},
          {'mscale': 0.7, 'mscale_all_dim': 0.4},
        ],
      ),
    },
    'dynamic': {'factor': 2.0},
    'longrope': {
      'short_factor': divisors[0].tolist(),
      'long_factor': divisors[1].tolist(),
      'original_max_position_embeddings': pick(draw, [8, 20]),
      **pick(draw, [{}, {'factor': 3.0}]),
    },
    'default': {},
    'linear': {'factor': 2.5},
    'llama3': {
      'factor': 8.0,
      'low_freq_factor': 1.0,
      'high_freq_factor': 4.0,
      'original_max_position_embeddings': 16,
    },
    'proportional': {'factor': 1.5, 'partial_rotary_factor': 0.5},
  }
  return {
    'rope_type': rope_type(seed),
    'rope_theta': pick(draw, [100.0, 10000.0, 500000.0]),
    **own[rope_type(seed)],
  }


def randomize(reference, seed):
  """Changes every parameter from its initial value."""
  torch.manual_seed(seed)
  with torch.no_grad():
    for parameter in reference.parameters():
      parameter.add_(0.2 * torch.randn_like(parameter))
  return reference.eval()


def gpt2(seed):
  draw = np.random.default_rng(seed)
  heads = pick(draw, [1, 2, 3])
  return randomize(
    transformers.GPT2LMHeadModel(
      transformers.GPT2Config(
        vocab_size=int(draw.integers(17, 60)),
        n_positions=LENGTH + 2,
        n_embd=heads * pick(draw, [3, 5, 8]),
        n_layer=int(draw.integers(1, 4)),
        n_head=heads,
        n_inner=pick(draw, [None, 13, 24]),
        activation_function=pick(draw, ['gelu_new', 'gelu', 'relu', 'silu', 'gelu_pytorch_tanh']),
        layer_norm_epsilon=pick(draw, [1e-5, 1e-3]),
        scale_attn_weights=bool(draw.integers(2)),
        scale_attn_by_inverse_layer_idx=bool(draw.integers(2)),
        reorder_and_upcast_attn=bool(draw.integers(2)),
        tie_word_embeddings=bool(draw.integers(2)),
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
      )
    ),
    seed,
  )


def llama(seed):
  draw = np.random.default_rng(seed)
  kv_heads, head_width = pick(draw, [1, 2]), pick(draw, [4, 6, 10])
  heads = kv_heads * pick(draw, [1, 2, 3])
  return randomize(
    transformers.LlamaForCausalLM(
      transformers.LlamaConfig(
        vocab_size=int(draw.integers(17, 60)),
        hidden_size=heads * pick(draw, [3, 4, 7]),
        intermediate_size=int(draw.integers(7, 40)),
        num_hidden_layers=int(draw.integers(1, 4)),
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_width,
        max_position_embeddings=pick(draw, [10, 64]),
        hidden_act=pick(draw, ['silu', 'gelu', 'gelu_pytorch_tanh']),
        rms_norm_eps=pick(draw, [1e-6, 1e-3]),
        rope_parameters=rope_parameters(draw, seed, head_width),
        attention_bias=bool(draw.integers(2)),
        mlp_bias=bool(draw.integers(2)),
        tie_word_embeddings=bool(draw.integers(2)),
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
      )
    ),
    seed,
  )


def opt(seed):
  draw = np.random.default_rng(seed)
  heads = pick(draw, [1, 2, 3])
  width = heads * pick(draw, [3, 5, 8])
  return randomize(
    transformers.OPTForCausalLM(
      transformers.OPTConfig(
        vocab_size=int(draw.integers(17, 60)),
        hidden_size=width,
        word_embed_proj_dim=pick(draw, [None, width, 7, 20]),
        ffn_dim=int(draw.integers(7, 40)),
        num_hidden_layers=int(draw.integers(1, 4)),
        num_attention_heads=heads,
        max_position_embeddings=LENGTH + 2,
        activation_function=pick(draw, ['relu', 'relu', 'gelu', 'silu']),
        do_layer_norm_before=pick(draw, [True, True, False]),
        _remove_final_layer_norm=pick(draw, [False, False, True]),
        enable_bias=bool(draw.integers(2)),
        layer_norm_elementwise_affine=pick(draw, [True, True, False]),
        tie_word_embeddings=bool(draw.integers(2)),
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
      )
    ),
    seed,
  )


def gpt_neox(seed):
  draw = np.random.default_rng(seed)
  heads = pick(draw, [1, 2, 3])
  parts = [(8, 0.5), (12, 0.35), (4, 1.0), (6, 0.7)]
  if rope_type(seed) in (
    'default',
    'linear',
    'llama3',
    'longrope',
  ):  # their other types need at least four, an even number
    parts += [(8, 0.25), (5, 0.6), (7, 0.8), (3, 0.3)]  # 2, 3, 5 and 0 of the coordinates
  head_width, part = pick(draw, parts)
  rope = {'partial_rotary_factor': part, **rope_parameters(draw, seed, int(head_width * part))}
  return randomize(
    transformers.GPTNeoXForCausalLM(
      transformers.GPTNeoXConfig(
        vocab_size=int(draw.integers(17, 60)),
        hidden_size=heads * head_width,
        intermediate_size=int(draw.integers(7, 40)),
        num_hidden_layers=int(draw.integers(1, 4)),
        num_attention_heads=heads,
        max_position_embeddings=pick(draw, [10, 64]),
        hidden_act=pick(draw, ['gelu', 'gelu_new', 'relu']),
        layer_norm_eps=pick(draw, [1e-5, 1e-3]),
        rope_parameters=rope,
        use_parallel_residual=bool(draw.integers(2)),
        attention_bias=bool(draw.integers(2)),
        tie_word_embeddings=bool(draw.integers(2)),
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
      )
    ),
    seed,
  )


def windows(draw, depth):
  """Returns a window shorter than the tests' sequences, and layers, some of which have it."""
  return {
    'sliding_window': int(draw.integers(2, LENGTH)),
    'layer_types': [pick(draw, ['sliding_attention', 'full_attention']) for _ in range(depth)],
  }


def llama_sizes(draw):
  """Returns fields that all of Llama's relatives have; heads may share keys and have any width."""
  kv_heads = pick(draw, [1, 2])
  heads = kv_heads * pick(draw, [1, 2, 3])
  return dict(
    vocab_size=int(draw.integers(17, 60)),
    hidden_size=heads * pick(draw, [3, 4, 7]),
    intermediate_size=int(draw.integers(7, 40)),
    num_hidden_layers=int(draw.integers(1, 4)),
    num_attention_heads=heads,
    num_key_value_heads=kv_heads,
    head_dim=pick(draw, [4, 6, 10]),
    max_position_embeddings=pick(draw, [10, 64]),
    rms_norm_eps=pick(draw, [1e-6, 1e-3]),
    tie_word_embeddings=bool(draw.integers(2)),
    bos_token_id=0,
    eos_token_id=1,
    pad_token_id=2,
  )


def mistral(seed):
  draw = np.random.default_rng(seed)
  sizes = llama_sizes(draw)
  return randomize(
    transformers.MistralForCausalLM(
      transformers.MistralConfig(
        **sizes,
        hidden_act=pick(draw, ['silu', 'gelu']),
        sliding_window=pick(draw, [None, 2, 5, 9, 13]),
        rope_parameters=rope_parameters(draw, seed + 3, sizes['head_dim']),
      )
    ),
    seed,
  )


def qwen2(seed):
  draw = np.random.default_rng(seed)
  sizes = llama_sizes(draw)
  layers = pick(
    draw,
    [
      windows(draw, sizes['num_hidden_layers']),
      {'sliding_window': int(draw.integers(2, LENGTH)), 'max_window_layers': int(draw.integers(3))},
    ],
  )
  used = pick(draw, [{'use_sliding_window': True, **layers}, {'sliding_window': 4}])
  return randomize(
    transformers.Qwen2ForCausalLM(
      transformers.Qwen2Config(
        **sizes,
        **used,
        hidden_act=pick(draw, ['silu', 'gelu']),
        rope_parameters=rope_parameters(draw, seed + 2, sizes['head_dim']),
      )
    ),
    seed,
  )


def qwen3(seed):
  draw = np.random.default_rng(seed)
  sizes = llama_sizes(draw)
  layers = pick(
    draw, [{'use_sliding_window': True, **windows(draw, sizes['num_hidden_layers'])}, {}]
  )
  return randomize(
    transformers.Qwen3ForCausalLM(
      transformers.Qwen3Config(
        **sizes,
        **layers,
        attention_bias=bool(draw.integers(2)),
        hidden_act=pick(draw, ['silu', 'gelu']),
        rope_parameters=rope_parameters(draw, seed + 4, sizes['head_dim']),
      )
    ),
    seed,
  )


def gemma(seed):
  draw = np.random.default_rng(seed)
  sizes = llama_sizes(draw)
  return randomize(
    transformers.GemmaForCausalLM(
      transformers.GemmaConfig(
        **sizes,
        attention_bias=bool(draw.integers(2)),
        hidden_act=pick(draw, ['gelu', 'gelu_pytorch_tanh', 'silu']),
        rope_parameters=rope_parameters(draw, seed, sizes['head_dim']),
      )
    ),
    seed,
  )


def gemma2(seed):
  draw = np.random.default_rng(seed)
  sizes = llama_sizes(draw)
  layers = pick(
    draw,
    [windows(draw, sizes['num_hidden_layers']), {'sliding_window': int(draw.integers(2, LENGTH))}],
  )
  return randomize(
    transformers.Gemma2ForCausalLM(
      transformers.Gemma2Config(
        **sizes,
        **layers,
        attention_bias=bool(draw.integers(2)),
        query_pre_attn_scalar=pick(draw, [3, 8]),
        hidden_activation=pick(draw, ['gelu_pytorch_tanh', 'silu']),
        attn_logit_softcapping=pick(draw, [None, 1.0, 3.0]),
        final_logit_softcapping=pick(draw, [None, 2.0, 5.0]),
        rope_parameters=rope_parameters(draw, seed + 1, sizes['head_dim']),
      )
    ),
    seed,
  )


def gemma3(seed):
  draw = np.random.default_rng(seed)
  sizes = llama_sizes(draw)
  layers = pick(
    draw,
    [
      windows(draw, sizes['num_hidden_layers']),
      {'sliding_window': int(draw.integers(2, LENGTH)), 'sliding_window_pattern': 2},
    ],
  )
  ropes = {
    'full_attention': rope_parameters(draw, seed, sizes['head_dim']),
    'sliding_attention': rope_parameters(draw, pick(draw, [0, seed + 3]), sizes['head_dim']),
  }
  for parameters in ropes.values():
    parameters.pop('truncate', None)  # theirs reads it from the outer dict; we refuse it
  return randomize(
    transformers.Gemma3ForCausalLM(
      transformers.Gemma3TextConfig(
        **sizes,
        **layers,
        attention_bias=bool(draw.integers(2)),
        query_pre_attn_scalar=pick(draw, [3, 8]),
        hidden_activation=pick(draw, ['gelu_pytorch_tanh', 'silu']),
        final_logit_softcapping=pick(draw, [None, 2.0, 5.0]),
        rope_parameters=pick(draw, [None, ropes, ropes]),
      )
    ),
    seed,
  )


def phi3(seed):
  draw = np.random.default_rng(seed)
  sizes = llama_sizes(draw)
  head_width, part = pick(draw, [(4, 1.0), (6, 1.0), (8, 0.5), (8, 0.75), (6, 0.7)])
  sizes |= {'hidden_size': sizes['num_attention_heads'] * head_width}
  del sizes['head_dim']
  # The family has only these two types.
  rope = rope_parameters(
    draw, ROPE_TYPES.index(('longrope', 'default')[seed % 2]), int(head_width * part)
  )
  return randomize(
    transformers.Phi3ForCausalLM(
      transformers.Phi3Config(
        **sizes,
        hidden_act=pick(draw, ['silu', 'gelu']),
        sliding_window=pick(draw, [None, 2, 5, 9, 13]),
        original_max_position_embeddings=pick(draw, [8, 16]),
        rope_parameters={'partial_rotary_factor': part, **rope},
      )
    ),
    seed,
  )


# Names of rlhf_jax.models.families.FAMILIES: decoders.
FAMILIES = {
  'gemma': gemma,
  'gemma2': gemma2,
  'gemma3_text': gemma3,
  'gpt2': gpt2,
  'gpt_neox': gpt_neox,
  'llama': llama,
  'mistral': mistral,
  'opt': opt,
  'phi3': phi3,
  'qwen2': qwen2,
  'qwen3': qwen3,
}
