"""Runs only transformers: sampling, and one forward and backward pass of the policy.

python -m benchmarks.peers.hf --workload xs

This bounds the speed of an RLHF loop on transformers from above. The loss is the cross-entropy of
the response. There is no critic, no reward model and no optimizer.
"""

import torch
import transformers

from benchmarks.peers import protocol
from benchmarks.peers import torch_models


def generate(model, w, prompts):
  """Samples R tokens after each prompt, and returns tokens [B, T]."""
  settings = transformers.GenerationConfig(
    max_new_tokens=w.response, do_sample=True, temperature=1.0, top_k=0, top_p=1.0, pad_token_id=0
  )
  with torch.no_grad():
    return model.generate(
      input_ids=prompts, attention_mask=torch.ones_like(prompts), generation_config=settings
    )


def forward_backward(model, w, tokens):
  """Computes gradients of the mean negative log-likelihood of the responses."""
  logits = model(input_ids=tokens).logits[:, w.prompt - 1 : -1]
  loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, w.prompt :].flatten())
  loss.backward()
  model.zero_grad()


def main():
  options = protocol.arguments(__doc__)
  turns, w = torch_models.turns(options), options.workload
  where = 'cpu' if options.device == 'cpu' else 'cuda'
  dtype = torch.float32 if options.device == 'cpu' else torch.bfloat16
  model = torch_models.language_model(w).to(where, dtype).eval()
  turns.ready(protocol.versions('transformers', 'torch'), note='only transformers, no PPO')
  while True:
    turns.wait()
    prompts = torch.randint(0, w.vocab, (w.batch, w.prompt), device=where)
    tokens = generate(model, w, prompts)
    turns.lap('rollout')
    forward_backward(model, w, tokens)
    turns.lap('one forward and backward pass')
    turns.report()


if __name__ == '__main__':
  main()
