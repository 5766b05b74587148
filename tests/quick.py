"""XLA options for tests, which mostly compile: without LLVM optimizations that is twice as fast."""

import importlib.metadata

OPTIONS = {'xla_backend_optimization_level': 0}
if importlib.metadata.version('jaxlib').startswith('0.10.'):  # later releases exit if it is set
  OPTIONS['xla_cpu_use_fusion_emitters'] = False
FLAGS = ' '.join(f'--{name}={str(value).lower()}' for name, value in OPTIONS.items())
