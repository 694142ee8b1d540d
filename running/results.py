"""Results as JSON: one file to which many runs add their rows, with where each row comes from.

A file is an object that holds a list of objects, its rows, under 'results'. A row that is computed
again takes the place of its former self; all others stay. Nothing here is unpickled or run.
"""
import contextlib
from datetime import UTC, datetime
import errno
import fcntl
import json
import os
import platform
import subprocess
import tempfile

from running import UserError, brief
from running.files import replacing
from running.unfinished import ROOT, code
from running.untrusted import read_json

MAX_RESULTS_BYTES = 2 ** 28  # of a file of results; a row has some 1,000
GIT_SECONDS = 5.             # a checkout on a slow disk is not waited for any longer


def read_results(path):
    """Returns the contents of a file of results, a dict; one without rows where there is no file.

    Raises:
        UserError: it is damaged, or another kind of file.
    """
    if not os.path.lexists(path):
        return {'results': []}
    contents = read_json(path, MAX_RESULTS_BYTES)
    rows = contents.get('results')
    if not (isinstance(rows, list) and all(isinstance(row, dict) for row in rows)):
        raise UserError(f'{path} is no file of results: it holds no list of objects named results')
    return contents


def add_results(path, head, rows, identity, renewed=lambda former, row: row):
    """Adds rows to a file of results, at once; each replaces the row of the same identity, if any.

    Two programs may do so at the same time: each reads what the other one wrote.

    Args:
        path: the file, which need not exist, nor need its folder.
        head: what else the file says, a dict; keys of it that are there are replaced.
        rows: dicts. identity: f(row) -> text, the same for rows that replace each other.
        renewed: f(former row, row) -> the row that takes the former one's place.

    Returns:
        the rows as they were added.

    Raises:
        UserError: the file is damaged, or another kind of file: it stays as it is.
        OSError: it cannot be written.
    """
    folder = os.path.dirname(os.path.abspath(path))
    os.makedirs(folder, exist_ok=True)
    with locked(folder):
        before = read_results(path)
        new = {identity(row): row for row in rows}
        former, again = [], []
        for row in before['results']:
            key = identity(row)
            if key in new:
                row = renewed(row, new.pop(key))
                again.append(row)
            former.append(row)
        with replacing(path) as f:
            json.dump({**before, **head, 'results': [*former, *new.values()]}, f, indent=1)
    return [*again, *new.values()]


@contextlib.contextmanager
def locked(folder):
    """Waits until no other process is in such a block for the same folder. Leaves no file."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def check_writable(path, expected):
    """Raises UserError, ending in `expected`, unless a file can be written at path. Leaves nothing.

    The folder need not exist; it is not made.
    """
    folder = os.path.dirname(os.path.abspath(path))
    while not os.path.lexists(folder):
        folder = os.path.dirname(folder)
    try:
        if os.path.isdir(path) or str(path).endswith(os.sep):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(f'{path} cannot be written: {error.strerror or brief(error)}; '
                        f'expected {expected}') from None


def provenance():
    """Returns where a number comes from: digest of the code, commit, library versions, date."""
    digest, libraries = code()
    return {'code': digest[:16], 'commit': commit(),
            'libraries': {'python': platform.python_version(), **libraries},
            'date': datetime.now(UTC).isoformat(timespec='seconds')}


def commit(root=ROOT):
    """Returns the commit of a git checkout, '-dirty' behind it if files were changed, or None."""
    if not os.path.exists(os.path.join(root, '.git')):
        return None
    try:
        done = subprocess.run(
            ['git', '-C', root, 'describe', '--always', '--abbrev=40', '--exclude=*', '--dirty'],
            env={**os.environ, 'GIT_OPTIONAL_LOCKS': '0'}, stdin=subprocess.DEVNULL,
            capture_output=True, text=True, timeout=GIT_SECONDS)
    except (OSError, ValueError, subprocess.SubprocessError):  # no git, say
        return None
    return done.stdout.strip() or None
