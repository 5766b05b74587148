"""A reward server: a Python function or a reward model over HTTP, with the protocol of client.py.

python -m rlhf_jax.rewards.server --function=module:function --port=8000
python -m rlhf_jax.rewards.server --model=FOLDER --port=8000

Runs use it with --config.reward.url=http://HOST:8000. It answers one request at a time; to answer
several at once, start several servers behind a load balancer. Errors of the function have status
500 and name the example.
"""

import argparse

from rlhf_jax import errors
from rlhf_jax.rewards import functions


def of_model(path):
  """Returns the reward function of a reward model, which reads complete responses.

  The score of a model with several heads is the mean over its heads.
  """
  import jax  # not at the top: a server of a function needs none of these

  from rlhf_jax import sharding
  from rlhf_jax.data import tokenizers
  from rlhf_jax.models import heads
  from rlhf_jax.models import hf
  from rlhf_jax.rewards import learned

  mesh = sharding.make_mesh({}, devices=jax.devices()[:1])
  model, params = hf.load_reward(path, mesh=mesh)
  params |= {'head': heads.mean(params['head'])}
  tokenizer = tokenizers.load(path)
  tokenizers.fit(tokenizer, model)
  score = learned.of_texts(model, params, tokenizer, max_length=model.max_length, mesh=mesh)

  def reward_fn(prompts, responses, *, response_tokens, metadata):
    del response_tokens, metadata
    with jax.set_mesh(mesh):
      return score(prompts, responses, [True] * len(prompts))

  return reward_fn


def make(function):
  """Returns the FastAPI application of a reward function."""
  import fastapi
  import pydantic

  class Request(pydantic.BaseModel):
    prompts: list[str]
    responses: list[str]
    metadata: list[dict]

  application = fastapi.FastAPI()

  @application.post('/')
  async def score(request: Request):  # in the main thread, where time limits work
    texts = request.prompts, request.responses
    if len({*map(len, texts), len(request.metadata)}) > 1:
      raise fastapi.HTTPException(422, 'prompts, responses and metadata have different lengths')
    limit = functions.Limit(functions.TIMEOUT, '', allow_nan=True)
    empty = [[] for _ in request.prompts]
    try:
      scores = functions.call(
        function,
        *texts,
        response_tokens=empty,
        metadata=request.metadata,
        response_length=0,
        limit=limit,
      )
    except errors.UserError as error:
      raise fastapi.HTTPException(500, str(error)) from error
    return {'scores': [None if score != score else score for score in scores.tolist()]}

  return application


def main():
  """Serves until it is stopped."""
  try:
    import uvicorn
  except ImportError as error:
    raise SystemExit(
      f"error: the server needs the extra 'http' ({error}): pip install 'rlhf_jax[http]'"
    ) from error
  parser = argparse.ArgumentParser('python -m rlhf_jax.rewards.server')
  served = parser.add_mutually_exclusive_group(required=True)
  served.add_argument('--function', help="reward function, 'package.module:function'")
  served.add_argument('--model', help='or the folder of a reward model')
  parser.add_argument('--host', default='127.0.0.1', help='address to listen on; 0.0.0.0: all')
  parser.add_argument('--port', type=int, default=8000, help='port to listen on')
  flags = parser.parse_args()
  try:
    function = (
      of_model(flags.model)
      if flags.model
      else functions.load_reward(flags.function, key='--function')
    )
  except errors.UserError as error:
    raise SystemExit(f'error: {error}') from error
  uvicorn.run(make(function), host=flags.host, port=flags.port, log_level='warning')


if __name__ == '__main__':
  main()
