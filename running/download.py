"""Downloads one large file, by way of a part that an interrupted download leaves behind."""
import http.client
import itertools
import json
import os
import re
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
import zipfile

from tqdm import tqdm

from running import UserError, brief
from running.files import create, plain, replacing
from running.untrusted import MAX_BYTES, read_json

CHUNK = 2 ** 20
TIMEOUT = 30             # seconds without a byte
WAITS = (1, 2, 4)        # seconds before each new try, counted again after new bytes
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
        raise UserError(f'the address is {url!r}; expected {"://... or ".join(schemes)}://...')


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
    """Adds an answer, the bytes from `have` on or the whole file, to the part.

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
        os.remove(note)  # without it the next answer starts over
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
        raise UserError(f'{url} announces {total:,} bytes; expected {MAX_BYTES:,} at most')
    if response.status == 200:
        if have:
            print('Starting over: the file has changed, or the server sends whole files only')
        have = 0
        os.makedirs(os.path.dirname(part), exist_ok=True)
        os.close(create(part))  # first: under the new note the old bytes would pass as its own
        with replacing(note) as f:
            json.dump({'url': url, 'validator': validator, 'total': total}, f)
    print(f'Downloading {url} to {part}, from byte {have:,} of',
          'an unknown number' if total is None else f'{total:,}', flush=True)
    with open(part, 'ab', opener=plain) as f, tqdm(
            total=total, initial=have, unit='B', unit_scale=True, leave=False,
            disable=not sys.stderr.isatty()) as bar:
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

    A partial download is resumed if the server can tell that its file is still the same (by ETag or
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
