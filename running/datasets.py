"""Prepares a TensorFlow Datasets data set in a process of its own, which a signal can end at once.

The package downloads in threads that Python joins at its exit: a program that calls it cannot be
stopped. It also tries an address for minutes before it tells of a mistake.
"""
import os
import subprocess
import sys
import threading
from time import monotonic
import urllib.parse

from running import UserError, brief

ANSWER = 8     # seconds within which the server must answer
PATIENCE = 60  # seconds without a byte, later
ANSWERED, DONE = 'answered', 'done'  # what the process says
ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


class Unreachable(UserError):
    """The server does not answer; nothing was written."""


def prepare(name, folder, url):
    """Downloads the data set `name` into a TensorFlow Datasets directory.

    Args:
        url: what is downloaded. Its server is asked first, before `folder` is made.

    Raises:
        Unreachable: it does not answer within ANSWER seconds. UserError: what else went wrong.
    """
    host = urllib.parse.urlsplit(url).hostname
    child = subprocess.Popen(
        [sys.executable, '-m', 'running.datasets', name, os.path.abspath(folder), url], cwd=ROOT,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True,
        stderr=None if sys.stderr.isatty() else subprocess.DEVNULL,  # its progress bars
        env={**os.environ, 'CUDA_VISIBLE_DEVICES': '-1', 'TFDS_DISABLE_TELEMETRY': '1'})
    lines = []
    reader = threading.Thread(target=lambda: lines.extend(child.stdout), daemon=True)
    reader.start()
    try:
        asked = monotonic()
        while not lines and reader.is_alive():
            if monotonic() - asked > ANSWER:
                raise Unreachable(f'{host} does not answer within {ANSWER} seconds')
            reader.join(0.1)
        while reader.is_alive():
            reader.join(0.5)  # a join without a limit would hear no signal
    finally:
        child.kill()
        child.wait()
    said = [line.rstrip('\n') for line in lines]
    if not said or said == [ANSWERED]:
        raise UserError(f'the process that downloads ended with status {child.returncode}')
    if said[0] != ANSWERED:
        raise Unreachable(f'{host} cannot be reached: {said[0]}')
    if said[1] != DONE:
        raise UserError(said[1])


# ---- the process of its own


def main():
    name, folder, url = sys.argv[1:]
    threading.Thread(target=end_with_the_parent, daemon=True).start()
    with os.fdopen(os.dup(1), 'w') as to_parent:
        os.dup2(2, 1)  # whatever else prints
        try:
            ask(url)
            print(ANSWERED, file=to_parent, flush=True)
            download(name, folder)
            print(DONE, file=to_parent, flush=True)
        except Exception as error:  # the packages raise many kinds, with many lines
            print(brief(error), file=to_parent, flush=True)
        os._exit(0)  # without joining threads


def end_with_the_parent():
    sys.stdin.read()
    os._exit(1)


def ask(url):
    """Raises an exception unless the server answers."""
    import requests  # as the package does: its certificates, its proxies
    try:
        with requests.head(url, timeout=ANSWER, allow_redirects=True) as response:
            if response.status_code >= 500 and response.status_code != 501:
                raise OSError(f'it answers {response.status_code}')
    except requests.RequestException as error:
        cause = innermost(error)
        raise OSError(getattr(cause, 'strerror', None) or str(cause)) from None


def innermost(error):
    """Returns what an error was raised for in the first place."""
    while True:
        below = getattr(error, 'reason', None) or error.__cause__ or error.__context__
        below = below or next((e for e in error.args if isinstance(e, BaseException)), None)
        if not isinstance(below, BaseException):
            return error
        error = below


def download(name, folder):
    import requests
    import tensorflow_datasets as tfds
    send = requests.Session.send
    # the package sets no limit
    requests.Session.send = lambda *args, **more: send(*args, **{**more, 'timeout': PATIENCE})
    tfds.builder(name, data_dir=folder).download_and_prepare()


if __name__ == '__main__':
    main()
