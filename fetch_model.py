"""Downloads a model that MadryLab released with the CIFAR-10 challenge and unpacks it.

    python fetch_model.py secret                              # to models/secret
    python fetch_model.py natural --models_dir DIR            # to DIR/natural
    python fetch_model.py adv_trained --url ADDRESS --sha256 HEX

A download that was stopped goes on when the same command is given again. A MODELS_DIR/NAME.zip that
lies there, from a browser for example, is unpacked instead. The addresses are those of the
original's fetch_model.py; the SHA-256 digest of secret.zip is from its README.
"""
import hashlib
import http.client
import io
import itertools
import os
import re
import shlex
import shutil
import stat
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
import zipfile

from absl import flags
from tqdm import tqdm

from config import UserError, brief, check_plain, read_json, run, store_config

# name: (address, SHA-256 of the archive or None where it was not published)
MODELS = {
    'natural': ('https://www.dropbox.com/s/cgzd5odqoojvxzk/natural.zip?dl=1', None),
    'adv_trained': ('https://www.dropbox.com/s/g4b6ntrp8zrudbz/adv_trained.zip?dl=1', None),
    'secret': ('https://www.dropbox.com/s/ywc0hg8lr5ba8zd/secret.zip?dl=1',
               '555be6e892372599380c9da5d5f9802f9cbd098be8a47d24d96937a002305fd4'),
}
MAX_BYTES = 4 * 2 ** 30  # of an archive, packed or not; w32-10 and its velocities take a tenth
MAX_ENTRIES = 10000      # files and folders in it
MAX_DEPTH = 10           # of folders in folders
MAX_NAME = 200           # bytes of a file's or folder's name
MAX_TABLE = 2 * 2 ** 20  # bytes of the table of entries, which zipfile makes ten times as large
CHUNK = 2 ** 20
TIMEOUT = 30             # seconds without a byte
WAITS = (1, 2, 4)        # seconds before each try to go on, counted anew after new bytes
ELSEWHERE = '--url ADDRESS names another place'


class _Cut(Exception):
    """An answer failed or ended too soon; another try may mend it."""


class _Redirects(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, req, fp, code, msg, headers, newurl):
        check_url(newurl, ('https',) if req.type == 'https' else ('http', 'https'))
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def check_url(url, schemes=('http', 'https')):
    """Raises UserError unless the address is one that can be downloaded from."""
    try:
        parts = urllib.parse.urlsplit(url)
        fits = parts.hostname and parts.port != 0 and all('!' <= c <= '~' for c in url)
    except ValueError:
        fits = False
    if not fits or parts.scheme not in schemes:
        raise UserError(f'the address is {url!r}; {"://... or ".join(schemes)}://... would fit')


def _reason(error):
    reason = getattr(error, 'reason', error)
    return brief(getattr(reason, 'strerror', None) or str(reason) or type(error).__name__)


def _ask(url, start, validator):
    """Returns the response to a GET of the bytes from start on. Raises _Cut, UserError."""
    headers = {'Range': f'bytes={start}-', 'If-Range': validator} if start else {}
    request = urllib.request.Request(url, headers={k: v for k, v in headers.items() if v})
    try:
        return urllib.request.build_opener(_Redirects).open(request, timeout=TIMEOUT)
    except urllib.error.HTTPError as error:
        if start and error.code == 416:
            return error  # it is a response too
        error.close()
        fault = f'the server answers {error.code} {_reason(error)}'
        if error.code >= 500:
            raise _Cut(fault) from None
        raise UserError(f'{url}: {fault}; {ELSEWHERE}') from None
    except (OSError, http.client.HTTPException, UnicodeError) as error:
        raise _Cut(_reason(error)) from None


def _body(response):
    """Yields the bytes of a response as they come, so that a cut loses none. Raises _Cut."""
    try:
        while chunk := response.read1(CHUNK):
            yield chunk
    except (OSError, http.client.HTTPException) as error:
        raise _Cut(_reason(error)) from None


def _take(response, part, note, have, state):
    """Adds an answer to the part, of which it goes on from byte `have`, or begins it anew.

    Raises:
        _Cut. UserError: the answer does not fit; nothing of it is written.
    """
    url, headers, chunks = state['url'], response.headers, _body(response)
    told, length = headers.get('Content-Range', ''), headers.get('Content-Length', '')
    length = int(length) if re.fullmatch('[0-9]{1,18}', length) else None
    etag = headers.get('ETag', 'W/')  # a weak one does not vouch for bytes (RFC 9110, 13.1.5)
    validator = headers['Last-Modified'] if etag.startswith('W/') else etag
    if have and (response.status == 416 or (response.status == 206 and state['validator']
                                            and validator not in (None, state['validator']))):
        os.remove(note)  # without it the next answer begins anew
        raise _Cut('the file has changed')
    if have and response.status == 206:
        match = re.fullmatch(rf'bytes {have}-([0-9]{{1,18}})/([0-9]{{1,18}}|\*)', told)
        total = int(match[2]) if match and match[2] != '*' else state['total']
        if (not match or state['total'] not in (None, total)
                or length not in (None, int(match[1]) + 1 - have)):
            raise UserError(f'{url} was asked for what follows {have} bytes of {state["total"]} '
                            f'and sends {told!r}; {part} is kept, remove it to start afresh')
    elif response.status == 200:
        total, head = length, b''
        while len(head) < 4 and (chunk := next(chunks, b'')):
            head += chunk
        if len(head) < min(4, total or 0):
            raise _Cut('the connection was cut')
        if not head.startswith(b'PK'):
            raise UserError(f'{url} sends no zip archive but {brief(headers.get_content_type())} '
                            f'that begins with {head[:9]!r}: a dead link? {ELSEWHERE}')
        chunks = itertools.chain([head], chunks)
    else:
        raise UserError(f'{url}: the server answers {response.status}; {ELSEWHERE}')
    limit = MAX_BYTES if total is None else total
    if limit > MAX_BYTES:
        raise UserError(f'{url} announces {total:,} bytes; {MAX_BYTES:,} at most would fit')
    if response.status == 200:
        if have:
            print('Starting over: the file has changed, or the server sends whole files only')
        have = 0
        os.makedirs(os.path.dirname(part), exist_ok=True)
        open(part, 'wb').close()  # first: under the new note the old bytes would pass as its own
        store_config({'url': url, 'validator': validator, 'total': total}, note)
    print(f'Downloading {url} to {part}, from byte {have:,} of',
          'an unknown number' if total is None else f'{total:,}', flush=True)
    with open(part, 'ab') as f, tqdm(total=total, initial=have, unit='B', unit_scale=True,
                                     leave=False, disable=not sys.stderr.isatty()) as bar:
        for chunk in chunks:
            have += len(chunk)
            if have > limit:
                raise UserError(f'{url} sends more than {limit:,} bytes; {part} is kept')
            f.write(chunk)
            bar.update(len(chunk))


def _is_note(state, url):
    """Returns whether a note holds what _take writes, about this address."""
    total, validator = state.get('total', ''), state.get('validator', 0)
    return (state.get('url') == url and (total is None or type(total) is int and total >= 0)
            and (validator is None or isinstance(validator, str)))


def download(url, path, checked):
    """Downloads url to path by way of path.part, which an interrupted download leaves behind.

    A part is gone on from when the server can tell that its file is still the same (by ETag or
    Last-Modified, kept in path.part.json), or when a digest is going to tell: `checked`.

    Raises:
        UserError: the file cannot be had; what has come is kept.
    """
    part, note = f'{path}.part', f'{path}.part.json'
    cut, most, failures, answered = None, 0, 0, False
    while True:
        state = read_json(note) if os.path.exists(note) else {}
        if not _is_note(state, url) or not os.path.exists(part):
            state = {'url': url, 'validator': None, 'total': 0}
        size, total = os.path.getsize(part) if state['total'] != 0 else 0, state['total']
        # a server that names no size may end by hanging up; the archive's end tells it from a cut
        if size and (size == total or (total is None and zipfile.is_zipfile(part))):
            break
        if cut:
            failures = 1 if size > most else failures + 1
            if failures > len(WAITS) or not answered:
                raise UserError(f'{url}: {cut}; the same command tries again')
            print(f'At byte {size:,}: {cut}; trying again', flush=True)
            time.sleep(WAITS[failures - 1])
        cut, most = 'the connection was cut', max(most, size)
        have = size if state['validator'] or checked else 0
        try:
            with _ask(url, have, state['validator']) as response:
                answered = True
                _take(response, part, note, have, state)
        except _Cut as error:
            cut = error
    os.replace(part, path)
    os.remove(note)


def find_checkpoints(folder):
    """Returns the prefixes of the checkpoints below a folder, the latest step last."""
    found = []
    for where, _, names in os.walk(folder):
        stems = {name.partition('.data-')[0] for name in names if '.data-' in name}
        found += [os.path.join(where, stem) for stem in stems
                  if f'{stem}.index' in names and not stem.startswith('.')]  # a Mac's shadow files
    return sorted(found, key=lambda prefix: [int(n) for n in re.findall('[0-9]+', prefix)[-1:]])


def check_entries(entries):
    """Raises UserError unless zip entries are plain files and folders that stay where put."""
    total = sum(entry.file_size for entry in entries)
    if len(entries) > MAX_ENTRIES or total > MAX_BYTES:
        raise UserError(f'holds {len(entries):,} entries, {total:,} bytes unpacked; '
                        f'{MAX_ENTRIES:,} and {MAX_BYTES:,} at most would fit')
    for entry in entries:
        name = entry.orig_filename  # zipfile's other one ends at the first NUL
        path, kind = name.removesuffix('/'), stat.S_IFMT(entry.external_attr >> 16)
        parts = path.split('/')
        faults = {
            'could lead elsewhere': (any(c in '\\:' or not c.isprintable() for c in name)
                                     or any(p.strip('. ') == '' for p in parts)
                                     or entry.filename != name),
            'is too long a name': (len(parts) > MAX_DEPTH
                                   or any(len(p.encode()) > MAX_NAME for p in parts)),
            'is no plain file or folder':
                kind not in (0, stat.S_IFREG if path == name else stat.S_IFDIR),
            'is packed by neither of deflate and store':  # others unpack without bounds on memory
                entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)}
        for fault, found in faults.items():
            if found:
                raise UserError(f'holds {name[:200]!r}, which {fault}')


class _Archive(io.BufferedReader):
    """A file that zipfile cannot read a table of millions of entries from, all at once."""

    def read(self, size=-1):
        if size is not None and size > MAX_TABLE:
            raise zipfile.BadZipFile(f'a table of {size:,} bytes')
        return super().read(size)


def _contents(archive, entry):
    try:
        with archive.open(entry) as f:
            while chunk := f.read(CHUNK):
                yield chunk
    except Exception as error:  # a damaged archive raises nearly anything
        raise UserError(f'is damaged: {_reason(error)}') from None


def unpack(path, folder):
    """Unpacks a zip archive's checkpoints to a folder, which comes into being whole or not at all.

    The folder takes the place of the archive's innermost one that holds all its checkpoints.

    Raises:
        UserError: the archive is damaged, unsafe, too large or holds no checkpoint.
    """
    temporary, written = f'{folder}.unpacking', 0
    f = _Archive(io.FileIO(path))
    try:
        archive = zipfile.ZipFile(f)
    except Exception as error:  # likewise
        f.close()
        raise UserError(f'is damaged: {_reason(error)}') from None
    with f, archive:
        check_entries(archive.infolist())
        shutil.rmtree(temporary, ignore_errors=True)  # of a run that was killed
        os.mkdir(temporary)
        try:
            for entry in archive.infolist():
                target = os.path.join(temporary, entry.filename)
                os.makedirs(target if entry.is_dir() else os.path.dirname(target), exist_ok=True)
                if entry.is_dir():
                    continue
                with open(target, 'xb') as f:
                    for chunk in _contents(archive, entry):
                        written += len(chunk)
                        if written > MAX_BYTES:
                            raise UserError(f'unpacks to more than {MAX_BYTES:,} bytes')
                        f.write(chunk)
            found = find_checkpoints(temporary)
            if not found:
                raise UserError('holds no checkpoint: no NAME.index with its NAME.data-...')
            os.rename(os.path.commonpath([os.path.dirname(prefix) for prefix in found]), folder)
        except (FileExistsError, NotADirectoryError):  # as this file system compares names
            raise UserError(f'holds {entry.filename!r} twice, or as a file and a folder') from None
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def main(words):
    if len(words) != 1:
        raise UserError(f'{len(words)} models named; one of {", ".join(MODELS)} would fit')
    url, sha256 = MODELS[words[0]]
    url, sha256 = flags.FLAGS.url or url, flags.FLAGS.sha256 or sha256
    check_url(url)
    if sha256 and not re.fullmatch('[0-9a-fA-F]{64}', sha256):
        raise UserError(f'--sha256 is {sha256!r}; 64 hexadecimal digits would fit')
    folder = os.path.join(flags.FLAGS.models_dir or '.', words[0])
    path = f'{folder}.zip'
    if find_checkpoints(folder):
        print(f'{folder} is there already')
    else:
        for end in ('', '.unpacking', '.zip', '.zip.part', '.zip.part.json', '.zip.part.json.tmp'):
            if os.path.islink(folder + end):
                raise UserError(f'{folder}{end} is a link, which nothing is written through; '
                                'remove it, or name another --models_dir')
            if '.zip' in end and os.path.lexists(folder + end):
                check_plain(folder + end, MAX_BYTES)
        if os.path.lexists(folder):
            raise UserError(f'{folder} is there and holds no checkpoint; move it away, or name '
                            'another --models_dir')
        if os.path.exists(path):
            print(f'{path} is there already: not downloaded again', flush=True)
        else:
            download(url, path, checked=bool(sha256))
        try:
            with open(path, 'rb') as f:
                digest = hashlib.file_digest(f, 'sha256').hexdigest()
            print(f'{path}: {os.path.getsize(path):,} bytes, SHA-256 {digest}', flush=True)
            if not sha256:
                print('No digest was published for it: --sha256 can require this one next time')
            elif digest != sha256.lower():
                raise UserError(f'has the SHA-256 digest {digest}; {sha256.lower()} would fit')
            unpack(path, folder)
        except UserError as error:
            os.replace(path, f'{path}.bad')
            raise UserError(f'{path} {error}. It is {path}.bad now; the same command starts '
                            'afresh') from None
        os.remove(path)
        print(f'Unpacked to {folder}; {path} removed')
    print('To evaluate it:\n    ' + shlex.join([
        'python', 'eval.py', '--checkpoint', find_checkpoints(folder)[-1],
        '--set', f'model_dir={folder}']))


if __name__ == '__main__':
    flags.DEFINE_string('url', None, "Address of the archive, in place of the original's.")
    flags.DEFINE_string('models_dir', 'models', 'The model is unpacked into a folder of this one.')
    flags.DEFINE_string('sha256', None, 'Digest that the archive must have.')
    run(main, tuple(MODELS))
