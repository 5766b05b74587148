"""Takes screenshots of reports and of the documentation with Chromium.

python -m tools.screenshots OUT NAME=PAGE [NAME=PAGE ...]

PAGE is an HTML file, such as runs/quickstart/report.html or docs/_build/html/index.html. Writes
three pictures of each page to the folder OUT: NAME-wide.png (1200 pixels wide), NAME-narrow.png
(400 pixels) and NAME-dark.png (1200 pixels, dark mode).
"""

import argparse
import pathlib
import shutil
import subprocess
import tempfile

BROWSERS = ('chromium', 'chromium-browser', 'google-chrome')
ARGUMENTS = (
  '--headless',
  '--no-sandbox',
  '--disable-gpu',
  '--disable-quic',
  '--no-first-run',
  '--disable-background-networking',
  '--disable-component-update',
  '--disable-sync',
  '--hide-scrollbars',
)
SHAPES = {
  'wide': ('--window-size=1200,1500',),
  'narrow': ('--window-size=400,1500',),
  'dark': ('--window-size=1200,1500', '--blink-settings=preferredColorScheme=0'),
}


def browser():
  """Returns the path of the browser; None if there is none."""
  return next(filter(None, map(shutil.which, BROWSERS)), None)


def call(page, *arguments):
  """Opens a page in a new browser profile.

  Args:
    page: Path of an HTML file.
    *arguments: Further arguments of the browser.

  Returns:
    The browser's output.
  """
  with tempfile.TemporaryDirectory() as profile:
    return subprocess.run(
      (
        browser(),
        *ARGUMENTS,
        f'--user-data-dir={profile}',
        *arguments,
        pathlib.Path(page).absolute().as_uri(),
      ),
      capture_output=True,
      text=True,
      timeout=120,
      check=True,
    ).stdout


def take(page, path, *arguments):
  """Writes a screenshot of a page to a PNG file.

  Args:
    page: Path of an HTML file.
    path: Path of the picture.
    *arguments: Further arguments of the browser, such as its window size.
  """
  call(page, f'--screenshot={pathlib.Path(path).absolute()}', *arguments)


def main():
  """Reads the command line and takes the screenshots."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawTextHelpFormatter
  )
  parser.add_argument('out', metavar='OUT', help='folder of the pictures')
  parser.add_argument('pages', metavar='NAME=PAGE', nargs='+', help='an HTML file and its name')
  options = parser.parse_args()
  if browser() is None:
    parser.error(f'found no browser: install one of {", ".join(BROWSERS)}')
  out = pathlib.Path(options.out)
  out.mkdir(parents=True, exist_ok=True)
  for pair in options.pages:
    name, _, page = pair.partition('=')
    if not pathlib.Path(page).is_file():
      parser.error(f'{pair}: {page or "PAGE"} is not a file; write NAME=PAGE')
    for shape, arguments in SHAPES.items():
      take(page, out / f'{name}-{shape}.png', *arguments)
      print(out / f'{name}-{shape}.png')


if __name__ == '__main__':
  main()
