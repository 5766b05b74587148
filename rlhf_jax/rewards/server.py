"""A reward server: a Python function or a reward model behind HTTP, in the form of client.py.

python -m rlhf_jax.rewards.server --function=module:function --port=8000
python -m rlhf_jax.rewards.server --model=FOLDER --port=8000

Runs use it with --config.reward.url=http://HOST:8000. It answers one request after another; start
several behind a load balancer for more. Errors of the function have status 500 and name the
example.
"""

from absl import app
from absl import flags

from rlhf_jax import errors
from rlhf_jax.rewards import functions

FUNCTION = flags.DEFINE_string('function', None, "Reward function 'package.module:function'.")
MODEL = flags.DEFINE_string('model', None, 'Or the folder of a reward model.')
HOST = flags.DEFINE_string('host', '127.0.0.1', 'Address to listen on; 0.0.0.0 for all.')
PORT = flags.DEFINE_integer('port', 8000, 'Port to listen on.')


def of_model(path):
  """Returns the reward function of a reward model, which reads complete responses."""
  import jax  # not at the top: a server of a function needs none of these

  from rlhf_jax import sharding
  from rlhf_jax.data import tokenizers
  from rlhf_jax.models import hf
  from rlhf_jax.rewards import learned

  mesh = sharding.make_mesh({}, devices=jax.devices()[:1])
  model, params = hf.load_reward(path, mesh=mesh)
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


def main(_):
  """Serves until it is stopped."""
  import uvicorn

  if (FUNCTION.value is None) == (MODEL.value is None):
    raise app.UsageError('set exactly one of --function and --model')
  try:
    function = (
      of_model(MODEL.value)
      if MODEL.value
      else functions.load_reward(FUNCTION.value, key='--function')
    )
  except errors.UserError as error:
    raise SystemExit(f'error: {error}') from error
  uvicorn.run(make(function), host=HOST.value, port=PORT.value, log_level='warning')


if __name__ == '__main__':
  app.run(main)
