"""XLA's options for tests, which mostly compile: no LLVM optimizations, which halves their time."""

import importlib.metadata

OPTIONS = {'xla_backend_optimization_level': 0}
if importlib.metadata.version('jaxlib').startswith(
  '0.10.'
):  # Later releases end a process that names it.
  OPTIONS['xla_cpu_use_fusion_emitters'] = False
FLAGS = ' '.join(f'--{name}={str(value).lower()}' for name, value in OPTIONS.items())
