"""Takes the screenshots of the labelling page in docs/images/feedback, with a made-up project.

python -m tools.feedback_screenshots [OUT]

Serves a temporary store and opens every page in Chromium:
NAME.png is 1200 pixels wide, NAME-phone.png 390 pixels, and NAME-dark.png has dark colours.
"""

import argparse
import contextlib
import pathlib
import shutil
import socket
import tempfile
import threading

from tools import feedback_example
from tools import screenshots

OUT = pathlib.Path(__file__).parents[1] / 'docs' / 'images' / 'feedback'
WIDE = {'viewport': {'width': 1200, 'height': 800}}
PHONE = {'viewport': {'width': 390, 'height': 844}, 'has_touch': True}
OWNER = ('annotators', 'agreement', 'elo', 'disagreement', 'export')
TALLEST = 1100  # pixels: what is below is cut off
NAMES = ('ppo-2', 'ppo-1')  # policies of the chat, whose dialogue is in the store
COLOURS = 64  # of the palette of a picture
# Messages of a dialogue, each with its two answers; the first answer is chosen.
DIALOGUE = (
  (
    'How long should I let tea steep?',
    'Black tea three to five minutes, green tea two to three. Is it loose or in bags?',
    'It depends on the tea.',
  ),
  (
    'Loose, a green one from Japan. It always gets bitter.',
    'Then the water is too hot. Let it cool to 70\u00a0°C, and pour the tea off after a minute and '
    'a half. A second infusion needs thirty seconds only.',
    'Use less tea, or add some sugar.',
  ),
)


@contextlib.contextmanager
def served(folder):
  """Yields (origin, store, project) of a page that a thread serves."""
  import uvicorn

  from rlhf_jax.feedback import store as store_lib
  from rlhf_jax.feedback.page import app
  from rlhf_jax.feedback.page import serve

  with store_lib.Store.open(folder / 'feedback.db') as store:
    project = feedback_example.fill(store)
    application = app.create(store, project, policies=NAMES)
    listener = socket.create_server(('127.0.0.1', 0))
    port = listener.getsockname()[1]
    server = uvicorn.Server(serve.config(application, host='127.0.0.1', port=port))
    thread = threading.Thread(target=server.run, args=([listener],))
    thread.start()
    try:
      yield f'http://127.0.0.1:{port}', store, project
    finally:
      server.should_exit = True
      thread.join()


class Camera:
  """Takes pictures of pages in several windows, all signed in as one annotator."""

  def __init__(self, browser, origin, link, out):
    self.out = out
    self.pages = {}
    for shape, options in (
      ('', WIDE),
      ('-phone', PHONE),
      ('-dark', WIDE | {'color_scheme': 'dark'}),
    ):
      page = browser.new_context(base_url=origin, reduced_motion='reduce', **options).new_page()
      page.goto(f'/sign-in/{link}')
      page.get_by_role('button', name='Continue as').click()
      page.locator('#task-title').wait_for()
      self.pages[shape] = page

  def take(self, name, path, shapes=('', '-phone')):
    """Opens a path and writes NAME.png and NAME-phone.png."""
    for shape in shapes:
      page = self.pages[shape]
      page.goto(path)
      shoot(page, self.out / f'{name}{shape}.png')


def shoot(page, path):
  """Writes a picture of a page, at most TALLEST pixels high, with a palette to make it small."""
  from PIL import Image

  size = page.viewport_size
  height = page.evaluate('document.body.scrollHeight')
  page.set_viewport_size(size | {'height': max(400, min(height, TALLEST))})
  page.screenshot(path=path)
  page.set_viewport_size(size)
  with Image.open(path) as picture:
    small = picture.convert('RGB').quantize(COLOURS)
  small.save(path, optimize=True)
  print(f'{path} {path.stat().st_size / 1000:.0f} kB')


def dialogue(store, project, annotator):
  """Adds a dialogue whose last two answers wait for a choice; returns its id."""
  from rlhf_jax.feedback import accounts
  from rlhf_jax.feedback import dialogues

  row = accounts.add_dialogue(store.database, project, annotator, 'helpful')
  for number, (message, *texts) in enumerate(DIALOGUE):
    dialogues.say(store, project, row, message)
    answers = [dialogues.Answered(text, name, None, None) for text, name in zip(texts, NAMES)]
    prompt = dialogues.state(store, row).prompt
    dialogues.add_answers(store, project, annotator, prompt, answers)
    if number < len(DIALOGUE) - 1:
      task = dialogues.state(store, row).task
      assignment = store.lease(project, task, annotator)
      best = next(item.id for item in task.completions if item.policy == NAMES[0])
      answer = {'chosen': best, 'strength': 3}
      store.judge(assignment, annotator, answer, seconds=12.0, token=assignment.token)
  return row.id


def take(browser, out, folder):
  """Takes all pictures."""
  with served(folder) as (origin, store, project):
    owner, link = store.add_annotator('Olga', role='owner')
    feedback_example.add_own(store, project, owner)
    guest = browser.new_context(base_url=origin, **PHONE).new_page()
    guest.goto('/sign-in')
    shoot(guest, out / 'sign-in-phone.png')
    guest.goto(f'/sign-in/{link}')
    shoot(guest, out / 'link-phone.png')
    camera = Camera(browser, origin, link, out)
    for name in ('pair', 'rank', 'best', 'rate', 'right-to-left'):
      camera.take(name, '/', ('', '-phone', '-dark') if name == 'pair' else ('', '-phone'))
      page = camera.pages['']
      token = page.locator('#task [name=token]').get_attribute('value')
      page.keyboard.press('s')
      page.locator(
        f'#task [name=token]:not([value="{token}"]), #main:not(:has(#task))'
      ).first.wait_for(state='attached')
    for name in ('progress', 'instructions', 'account'):
      camera.take(name, f'/{name}', ('-phone',) if name == 'account' else ('', '-phone'))
    camera.take('chat-list', '/chat')
    camera.take('chat', f'/chat/{dialogue(store, project, owner)}')
    camera.take('owner', '/owner')
    for name in OWNER:
      camera.take(
        f'owner-{name}', f'/owner/{name}', ('', '-dark') if name == 'elo' else ('', '-phone')
      )


def main():
  """Reads the command line and takes the pictures."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawTextHelpFormatter
  )
  parser.add_argument('out', metavar='OUT', nargs='?', default=OUT, type=pathlib.Path)
  options = parser.parse_args()
  path = screenshots.browser()
  if path is None:
    parser.error('found no browser: apt-get install chromium')
  from playwright import sync_api

  shutil.rmtree(options.out, ignore_errors=True)
  options.out.mkdir(parents=True)
  with sync_api.sync_playwright() as playwright, tempfile.TemporaryDirectory() as folder:
    browser = playwright.chromium.launch(executable_path=path, args=['--no-sandbox'])
    take(browser, options.out, pathlib.Path(folder))
    browser.close()


if __name__ == '__main__':
  main()
