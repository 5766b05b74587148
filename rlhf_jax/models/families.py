"""The model families by the `model_type` of their config.json: one file of functions each."""

from rlhf_jax.models import bert
from rlhf_jax.models import gemma
from rlhf_jax.models import gemma2
from rlhf_jax.models import gemma3
from rlhf_jax.models import gpt2
from rlhf_jax.models import llama
from rlhf_jax.models import mistral
from rlhf_jax.models import neox
from rlhf_jax.models import opt
from rlhf_jax.models import phi3
from rlhf_jax.models import qwen2
from rlhf_jax.models import qwen3
from rlhf_jax.models import roberta
from rlhf_jax.models import t5

FAMILIES = {
    'bert': bert,
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
    'roberta': roberta,
    't5': t5,
}
