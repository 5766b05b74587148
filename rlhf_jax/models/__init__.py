"""Language models, their heads, and their files.

Outside this package nobody sees a module object: a `Model` is functions of parameters.
"""

from rlhf_jax.models.transformer import Model

__all__ = ['Model']
