"""Many simulated annotators who use the labelling page over HTTP at the same time."""

import asyncio
import dataclasses
import random
import time

import forms
import httpx

HEADERS = {'HX-Request': 'true'}  # as htmx sends it: the answer to a judgement is the next task


@dataclasses.dataclass
class Crowd:
  """Annotators who answer tasks, and what the server told them.

  Attributes:
    origin: Address of the server.
    links: Personal link of each annotator.
    answers: Number of answers of each, if they have the time.
    seconds: How long they work at most.
    thinking: Mean of the exponential distribution of the seconds from a page to the answer.
    acknowledged: The reason, different in each, of every judgement that the server acknowledged.
    refused: Judgements that the server answered with an error, all of them tried again.
    page_seconds: Duration of each request for a page.
    up: Set while the server runs: who gets no answer waits for it and sends the same form again.
    enough: Number of acknowledged judgements at which `reached` is set.
  """

  origin: str
  links: dict
  answers: int
  seconds: float
  thinking: float
  acknowledged: list = dataclasses.field(default_factory=list)
  refused: list = dataclasses.field(default_factory=list)
  page_seconds: list = dataclasses.field(default_factory=list)
  up: asyncio.Event = dataclasses.field(default_factory=asyncio.Event)
  enough: int = 0
  reached: asyncio.Event = dataclasses.field(default_factory=asyncio.Event)

  async def work(self):
    """Lets all annotators work; returns when they are done or no tasks are left."""
    self.up.set()
    clients = [await self._sign_in(link) for link in self.links.values()]
    end = time.perf_counter() + self.seconds
    await asyncio.gather(
      *(self._annotate(name, client, end) for name, client in zip(self.links, clients))
    )
    for client in clients:
      await client.aclose()

  async def _sign_in(self, link):
    client = httpx.AsyncClient(
      base_url=self.origin, headers={'Origin': self.origin}, timeout=60, follow_redirects=True
    )
    path = f'/sign-in/{link}'
    form = forms.to((await client.get(path)).text, path)
    response = await client.post(path, data=form.fields)
    assert response.status_code == 200, response.text
    return client

  async def _annotate(self, name, client, end):
    rng = random.Random(name)
    page = await self._send(client, 'GET', '/')
    for number in range(self.answers):
      await asyncio.sleep(min(rng.expovariate(1 / self.thinking), 60) if self.thinking else 0)
      if 'action="/judge"' not in page or time.perf_counter() > end:
        return
      form = forms.to(page, '/judge')
      reason = f'{name} {number}'
      answer = rng.choice([value for key, value in form.choices if key == 'answer'])
      data = form.fields | {'answer': answer, 'reason': reason}
      page = await self._send(client, 'POST', '/judge', data, reason)
      self.acknowledged.append(reason)
      if len(self.acknowledged) == self.enough:
        self.reached.set()

  async def _send(self, client, method, path, data=None, reason=None):
    """Sends a request until it succeeds; returns the page."""
    while True:
      start = time.perf_counter()
      try:
        response = await client.request(method, path, data=data, headers=HEADERS)
      except httpx.TransportError:  # the server is gone
        await asyncio.sleep(0.05)
        await self.up.wait()
        continue
      if response.status_code == 200:
        self.page_seconds.append(time.perf_counter() - start)
        return response.text
      self.refused.append((reason, response.status_code, response.text))
      await asyncio.sleep(0.05)  # a person presses the button again
