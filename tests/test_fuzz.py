"""Files from strangers: whatever they hold, one printable line, or what was promised; never more.

Every loader is given random bytes, damaged files, and files made up of parts that are each in
order. While it runs, Python's audit events are watched, so that nothing is executed, imported,
connected to or written where it should not be; its memory is measured, and it may not take long.

    FUZZ_FACTOR=20 python -m pytest tests/test_fuzz.py
"""
import contextlib
import encodings.cp437  # noqa: F401  zipfile reads names with it: not while imports are watched
import io
import json
import mmap  # noqa: F401  NumPy maps files with it: likewise
import os
import pickletools
import resource
import shutil
import signal
import socket
import stat
import struct
import sys
import tokenize  # noqa: F401  NumPy reads odd headers with it: likewise
import tracemalloc
import unicodedata
import zipfile

from hypothesis import strategies as st
import numpy as np
import pytest

from cifar10_input import load_pickles
from config import SCHEMA, check_config, load_config, parse_setting
from conftest import ROOT, archive, fuzz
from run_attack import load_examples
from running import UserError, download
from running.untrusted import find_checkpoints, unpack
from test_cifar10_input import FILES, make_contents, write_all

WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
EVENTS = ('exec', 'import', 'marshal.', 'pickle.', 'ctypes.', 'socket.', 'subprocess.', 'pty.',
          'urllib.', 'os.exec', 'os.fork', 'os.posix_spawn', 'os.system', 'os.putenv',
          'cpython.run', 'code.__new__', 'sys.settrace', 'sys.setprofile', 'webbrowser.')
CHANGES = ('os.chmod', 'os.chown', 'os.link', 'os.mkdir', 'os.remove', 'os.rename', 'os.rmdir',
           'os.symlink', 'os.truncate', 'os.utime', 'shutil.')

watched = {'folder': None, 'seen': None}  # seen: a list while a loader runs, otherwise None


def watch(event, arguments):
    """An audit hook. It stays until Python ends, and looks only while a loader runs."""
    if watched['seen'] is None:
        return
    paths = [os.fspath(a) for a in arguments if isinstance(a, (str, os.PathLike))]
    inside = watched['folder'] is not None and all(
        path.startswith(watched['folder']) for path in paths if os.sep in path)
    if (event.startswith(EVENTS) or (event.startswith(CHANGES) and not inside)
            or (event == 'open' and arguments[2] & WRITING and not inside)):
        watched['seen'].append((event, *map(repr, arguments)))


sys.addaudithook(watch)


class TooSlow(BaseException):
    """A loader did not come back. No Exception, which a loader may take for a damaged file's."""


def too_slow(*_):
    raise TooSlow


@contextlib.contextmanager
def guarded(memory=2 ** 24, seconds=10, folder=None):
    """Fails when the block executes or changes anything outside a folder, or costs too much."""
    before = signal.signal(signal.SIGALRM, too_slow)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    tracemalloc.start()
    watched['folder'], watched['seen'] = folder, []
    try:
        yield
    finally:
        seen, watched['seen'] = watched['seen'], None
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert seen == []
    assert peak < memory


def outcome(action, *args, named='', **limits):
    """Returns (what an action returns, None), or (None, the one line of its UserError)."""
    with guarded(**limits):
        try:
            return action(*args), None
        except UserError as error:
            message = str(error)
    assert message.strip() and len(message) < 3000
    assert not any(unicodedata.category(c) in ('Cc', 'Cs', 'Zl', 'Zp') for c in message)
    assert named in message
    return None, message


@st.composite
def damaged(draw, raw, head=200, tail=20):
    """A file in which bytes were changed, cut out, put in or repeated, often near its ends."""
    raw = bytearray(draw(raw) if isinstance(raw, st.SearchStrategy) else raw)
    for _ in range(draw(st.integers(1, 4))):
        n = len(raw)
        places = (st.integers(0, n) | st.integers(0, min(n, head))
                  | st.integers(max(0, n - tail), n))
        start, how = draw(places), draw(st.integers(0, 3))
        if how == 0 and start < n:
            raw[start] = draw(st.integers(0, 255))
        elif how == 1:
            raw[start:start] = draw(st.binary(min_size=1, max_size=8))
        elif how == 2:
            del raw[start:start + draw(st.integers(1, 40))]
        else:
            end = min(n, start + draw(st.integers(1, 40)))
            raw[start:end] = draw(st.sampled_from([b'\0', b'\xff', b'9', bytes(raw[start:end])])
                                  ) * (2 if draw(st.booleans()) else end - start)
    return bytes(raw)


def test_the_watch_sees_what_it_is_there_for(tmp_path):
    """The canary itself: each of these would fail the tests below."""
    for harm in (lambda: exec('1'), lambda: os.system('true'), lambda: socket.socket().close(),
                 lambda: open(tmp_path / 'new', 'w').close(), lambda: os.mkdir(tmp_path / 'folder'),
                 lambda: bytes(2 ** 25)):
        with pytest.raises(AssertionError), guarded():
            harm()
    with pytest.raises(TooSlow), guarded(seconds=0.05):
        while True:
            pass
    with guarded(folder=str(tmp_path)):
        open(tmp_path / 'newer', 'w').close()


# ---- what is no plain file


@pytest.fixture
def a_gigabyte():
    """Leaves the process a gigabyte more: whoever reads on and on fails, and not the machine."""
    with open('/proc/self/statm', encoding='ascii') as f:
        pages = int(f.read().split()[0])
    limits = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + 2 ** 30, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, limits)


IMAGES, LABELS = make_contents(2)
X_NAT = np.random.default_rng(0).integers(0, 256, (1, 32, 32, 3)).astype(np.uint8)
READERS = {
    'a configuration': lambda path: load_config(path),
    'settings of a model': lambda path: load_config(base=path),
    'examples': lambda path: load_examples(path, X_NAT, 8.),
    'a data set': lambda path: load_pickles(os.path.dirname(path)),
}


@pytest.mark.parametrize('kind', ['pipe', 'endless device', 'socket', 'folder', '10 GB', 'loop'])
@pytest.mark.parametrize('reader', READERS)
def test_what_is_no_plain_file_is_refused_without_a_wait(
        tmp_path, monkeypatch, a_gigabyte, reader, kind):
    write_all(str(tmp_path), images=IMAGES, labels=LABELS)
    path = str(tmp_path / 'test_batch')
    os.remove(path)
    if kind == 'pipe':
        os.mkfifo(path)
    elif kind == 'endless device':
        os.symlink('/dev/zero', path)
    elif kind == 'folder':
        os.mkdir(path)
    elif kind == 'loop':
        os.symlink(path, path)
    elif kind == '10 GB':
        with open(path, 'wb') as f:
            f.truncate(10 ** 10)  # a hole: it takes no room on the disk
    else:
        monkeypatch.chdir(tmp_path)  # a socket's path has 107 bytes at most
        with socket.socket(socket.AF_UNIX) as s:
            s.bind('test_batch')
    _, message = outcome(READERS[reader], path, named=path)
    assert message and 'MemoryError' not in message


# ---- .npy files


def npy(header, body=b'', version=1, length=None):
    header = header.encode('latin1', 'replace') if isinstance(header, str) else header
    length = len(header) if length is None else length
    size = (struct.pack('<H', length & 0xffff) if version == 1 else struct.pack('<I', length))
    return b'\x93NUMPY' + bytes([version, 0]) + size + header + body


def header(descr="'<f4'", shape='(1, 32, 32, 3)', order='False'):
    return f"{{'descr': {descr}, 'fortran_order': {order}, 'shape': {shape}, }}"


def saved(array):
    f = io.BytesIO()
    np.save(f, array)
    return f.getvalue()


def load_npy(folder, raw):
    """Returns the examples in a file of these bytes, or None; what comes out is as promised."""
    path = os.path.join(folder, 'attack.npy')
    with open(path, 'wb') as f:
        f.write(raw)
    x_adv, message = outcome(load_examples, path, X_NAT, 8., named=path)
    if message is None:
        assert x_adv.dtype == np.float32 and x_adv.shape == X_NAT.shape
        assert np.isfinite(x_adv).all() and x_adv.min() >= -0.001 and x_adv.max() <= 255.001
        assert np.abs(x_adv - X_NAT.astype(np.float32)).max() <= 8.001
        np.testing.assert_array_equal(
            x_adv, np.load(path, allow_pickle=False).astype(np.float32))
    assert os.listdir(folder) == ['attack.npy']
    return x_adv


VALID = [saved(X_NAT.astype(dtype)) for dtype in (np.uint8, np.float32, np.float64)]
HEADERS = {
    'a claim of 4 GB': npy(header(), version=2, length=2 ** 32 - 1),
    'a claim of 4 GB, version 3': npy(header(), version=3, length=2 ** 32 - 1),
    'a claim of 10 KB that is kept': npy(header() + ' ' * 20000, version=2),
    'signs that exhaust the parser': npy('-' * 9990 + '1'),
    'brackets': npy('[' * 9990),
    'brackets that close': npy('[' * 90 + ']' * 90),
    'a sum of thousands': npy('1+' * 4900 + '1'),
    'attributes': npy('a.' * 4900 + 'b'),
    'an integer of thousands of digits': npy(header(shape='(' + '9' * 9000 + ',)')),
    'an integer past 64 bits': npy(header(shape=f'({2 ** 64 + 1}, 32, 32, 3)')),
    'a product past 64 bits': npy(header(shape=f'({2 ** 32}, {2 ** 32}, 4)')),
    'a product that comes to the true one': npy(header(
        shape=f'({2 ** 62 + 1}, 32, 32, 3)'), bytes(12288)),
    'terabytes': npy(header(shape='(1000000000, 32, 32, 3)')),
    'negative': npy(header(shape='(-1, 32, 32, 3)'), bytes(12288)),
    'twice negative': npy(header(shape='(-1, -32, 32, 3)'), bytes(12288)),
    'booleans': npy(header(shape='(True, 32, 32, 3)'), bytes(12288)),
    'no dimension': npy(header(shape='()'), bytes(12288)),
    'no example': npy(header(shape='(0, 32, 32, 3)')),
    'a hundred dimensions': npy(header(shape='(' + '1, ' * 100 + ')'), bytes(12288)),
    'objects': npy(header("'|O'"), bytes(24576)),
    'a structure of objects': npy(header("[('a', '|O')]"), bytes(24576)),
    'a structure': npy(header("[('a', '<f4'), ('\\x1b[2J', '<f4')]"), bytes(24576)),
    'a structure of thousands': npy(header('[' + "('', '<f4')," * 700 + ']'), bytes(24576)),
    'an array in an array': npy(header("('<f4', (2147483647,))"), bytes(12288)),
    'the wrong end first': npy(header("'>f4'"), bytes(12288)),
    'dates': npy(header("'<M8[s]'"), bytes(24576)),
    'text': npy(header("'<U1'"), bytes(12288)),
    'nothing': npy(header("'|V0'"), bytes(12288)),
    'complex numbers': npy(header("'<c8'"), bytes(24576)),
    'a type of many lines': npy(header("'two\\nlines\\x1b[2J'")),
    'a type that is a call': npy(header("__import__('os').system('true')")),
    'a warning of lines': npy("'\\d'\\\n(1)(2)"),
    'a key that is not hashed': npy('{[]: 1}'),
    'cut short': npy(header(), bytes(12287)),
    'an archive of arrays': b'PK\x03\x04' + bytes(100),
    'a pickle': b'\x80\x04cos\nsystem\n(S"true"\ntR.',
}


@pytest.mark.filterwarnings('error')
@pytest.mark.parametrize('what', HEADERS)
def test_a_header_that_asks_for_too_much_is_refused_at_little_cost(tmp_path, a_gigabyte, what):
    assert load_npy(str(tmp_path), HEADERS[what]) is None


LITERALS = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
    | st.binary(max_size=5) | st.sampled_from(['<f4', '|u1', '<f8', '|O', '>f4', '|V8', '<M8[ns]',
                                               'f4,f4', '(2,3)<f4', '<U7', '|b1', 1, 32, 3, -1]),
    lambda inner: st.lists(inner, max_size=4) | st.lists(inner, max_size=4).map(tuple)
    | st.tuples(st.text(max_size=3), inner)
    | st.dictionaries(st.text(max_size=3), inner, max_size=3), max_leaves=8)
SHAPES = (st.sampled_from([(1, 32, 32, 3), (3072,), (1, 3072), (), (1, 32, 32)]) | LITERALS
          | st.lists(st.integers(-2, 40) | st.integers(), max_size=6).map(tuple)).map(repr)
DTYPES = (st.sampled_from(['<f4', '|u1', '<f8']) | LITERALS
          | st.lists(st.tuples(st.text(max_size=3), st.sampled_from(['<f4', '|u1', '|O'])),
                     max_size=3)).map(repr)
ORDERS = st.sampled_from(['False', 'True', '0', 'None'])


@fuzz(400, text=st.builds(header, DTYPES, SHAPES, ORDERS) | LITERALS.map(repr)
      | st.text(max_size=60), version=st.sampled_from([1, 1, 1, 2, 3, 0, 9]),
      padding=st.sampled_from(['', '\n', ' ' * 40]), length=st.none() | st.integers(0, 2 ** 32 - 1),
      body=st.sampled_from(VALID))
def test_examples_of_any_header(tmp_path_factory, text, version, padding, length, body):
    pixels = body[128:]
    load_npy(folder_for(tmp_path_factory, 'npy'), npy(text + padding, pixels, version, length))


@fuzz(400, raw=damaged(st.sampled_from(VALID), head=140) | damaged(st.sampled_from(
    [raw for raw in HEADERS.values() if len(raw) < 400])) | st.binary(max_size=300).map(
        lambda tail: b'\x93NUMPY' + tail) | st.binary(max_size=300))
def test_examples_in_damaged_files(tmp_path_factory, raw):
    load_npy(folder_for(tmp_path_factory, 'npy'), raw)


def folder_for(tmp_path_factory, name):
    """A folder that all inputs of a test share: making one for each takes longer than the test."""
    folder = tmp_path_factory.getbasetemp() / name
    folder.mkdir(exist_ok=True)
    return str(folder)


# ---- pickles


def decimal(opcode, end=b'\n'):
    return st.integers(-2 ** 70, 2 ** 70).map(lambda n: opcode + str(n).encode() + end)


TEXTS = st.text(max_size=4) | st.sampled_from(['latin1', 'data', 'labels', 'u1', 'os', 'x' * 300])
LEAVES = st.one_of(
    st.sampled_from([b'N', b'\x88', b'\x89', b')', b']', b'}', b'I00\n', b'I01\n', b'I0x10\n',
                     b"S'a\\'b'\n", b'S"\\x41"\n', b'V\\u1234\n', b'L5L\n', b'\x8a\x00']),
    st.integers(0, 255).map(lambda n: b'K' + bytes([n])),
    st.integers(0, 65535).map(lambda n: b'M' + struct.pack('<H', n)),
    st.integers(-2 ** 31, 2 ** 31 - 1).map(lambda n: b'J' + struct.pack('<i', n)),
    decimal(b'I'), decimal(b'L', b'L\n'),
    st.binary(max_size=9).map(lambda raw: b'\x8a' + bytes([len(raw)]) + raw),
    st.binary(max_size=9).map(lambda raw: b'\x8b' + struct.pack('<i', len(raw)) + raw),
    TEXTS.map(str.encode).flatmap(lambda raw: st.sampled_from([
        b'X' + struct.pack('<I', len(raw)) + raw, b'\x8d' + struct.pack('<Q', len(raw)) + raw,
        b'T' + struct.pack('<i', len(raw)) + raw, b'B' + struct.pack('<I', len(raw)) + raw,
        b'\x8e' + struct.pack('<Q', len(raw)) + raw,
        *([b'U' + bytes([len(raw)]) + raw, b'C' + bytes([len(raw)]) + raw,
           b'\x8c' + bytes([len(raw)]) + raw] if len(raw) < 256 else [])])))
ADMITTED = [b'cnumpy.core.multiarray\n_reconstruct\n', b'cnumpy._core.multiarray\n_reconstruct\n',
            b'cnumpy\nndarray\n', b'cnumpy\ndtype\n', b'c_codecs\nencode\n',
            b'\x8c\x05numpy\x8c\x05dtype\x93']
CALLED = st.sampled_from(ADMITTED) | st.sampled_from([
    b'cos\nsystem\n', b'cbuiltins\neval\n', b'\x8c\x02os\x8c\x06system\x93',
    b'c\x1b[2J\n\xc2\x9b\n', b'cnumpy\nload\n', b'cconfig\nUserError\n'])


def compound(inner):
    """Opcodes that leave one value on the stack, of opcodes that leave one each."""
    some = st.lists(inner, max_size=4).map(b''.join)
    pairs = st.lists(st.tuples(inner, inner).map(b''.join), max_size=3).map(b''.join)
    tuples = st.one_of(some.map(lambda v: b'(' + v + b't'), inner.map(lambda v: v + b'\x85'),
                       st.tuples(inner, inner).map(lambda v: b''.join(v) + b'\x86'),
                       st.tuples(inner, inner, inner).map(lambda v: b''.join(v) + b'\x87'))
    calls = st.tuples(CALLED, tuples).map(lambda v: b''.join(v) + b'R')
    places = st.integers(0, 5).map(lambda n: bytes([n]))
    return st.one_of(
        some.map(lambda v: b'](' + v + b'e'), some.map(lambda v: b'(' + v + b'l'),
        inner.map(lambda v: b']' + v + b'a'), pairs.map(lambda v: b'}(' + v + b'u'),
        pairs.map(lambda v: b'(' + v + b'd'),
        st.tuples(inner, inner).map(lambda v: b'}' + b''.join(v) + b's'), tuples, calls, CALLED,
        st.tuples(calls | CALLED | inner, inner).map(lambda v: b''.join(v) + b'b'),
        st.tuples(inner, places).map(lambda v: v[0] + b'q' + v[1]),
        inner.map(lambda v: v + b'\x94'), places.map(lambda n: b'h' + n),
        inner.map(lambda v: b'\x95' + struct.pack('<Q', len(v)) + v))


VALUES = st.recursive(LEAVES, compound, max_leaves=12)


def opcodes_of(raw):
    """Returns the opcodes of a pickle, each with its argument, as bytes."""
    starts = [place for _, _, place in pickletools.genops(raw)]
    return [raw[a:b] for a, b in zip(starts, [*starts[1:], len(raw)])]


@pytest.fixture(scope='module')
def data_set(tmp_path_factory):
    """A sound data set of two images a file; its files' bytes, and their opcodes."""
    folder = str(tmp_path_factory.mktemp('small'))
    write_all(folder, images=IMAGES, labels=LABELS)
    files = {}
    for name in (*FILES, 'batches.meta'):
        with open(os.path.join(folder, name), 'rb') as f:
            files[name] = f.read()
    return folder, files, {name: opcodes_of(raw) for name, raw in files.items()}


def load_data_set(data_set, name, raw):
    """Loads the data set with a file replaced by these bytes; what comes out is as promised."""
    folder, files, _ = data_set
    path = os.path.join(folder, name)
    with open(path, 'wb') as f:
        f.write(raw)
    try:
        loaded, message = outcome(load_pickles, folder, named=folder)
    finally:
        with open(path, 'wb') as f:
            f.write(files[name])
    assert sorted(os.listdir(folder)) == sorted(files)
    if message is None:
        train, test, names = loaded
        assert len(set(names)) == len(names) <= 256 and all(map(str.isprintable, names))
        for images, labels in (train, test):
            assert images.shape == (len(labels), 32, 32, 3) and images.dtype == np.uint8
            assert labels.dtype == np.int64 and 0 <= labels.min() <= labels.max() < len(names)
        np.testing.assert_array_equal(train[0][2:], IMAGES[1:5].reshape(-1, 32, 32, 3))
    return message


SOME_FILES = st.sampled_from(['batches.meta', 'data_batch_1', 'test_batch'])


@fuzz(500, name=SOME_FILES, key=st.sampled_from([b'data', b'labels', b'label_names', b'', b'x']),
      value=VALUES, protocol=st.integers(0, 5))
def test_a_data_set_with_a_value_of_any_opcodes_in_order(data_set, name, key, value, protocol):
    """One item more, which may replace a true one; its opcodes fit together."""
    raw = data_set[1][name]
    assert raw.endswith(b'u.')
    load_data_set(data_set, name, b'\x80' + bytes([protocol]) + raw[2:-2] + b'U' + bytes([len(key)])
                  + key + value + b'u.')


@fuzz(500, data=st.data(), name=SOME_FILES)
def test_a_data_set_with_opcodes_moved_dropped_repeated_or_replaced(data_set, data, name):
    opcodes = list(data_set[2][name])
    for _ in range(data.draw(st.integers(1, 4))):
        places = st.integers(0, len(opcodes) - 1)
        i, j, how = data.draw(places), data.draw(places), data.draw(st.integers(0, 4))
        if how == 0:
            opcodes[i], opcodes[j] = opcodes[j], opcodes[i]
        elif how == 1 and len(opcodes) > 1:
            del opcodes[i]
        elif how == 2:
            opcodes.insert(i, opcodes[j])
        elif how == 3:
            opcodes.insert(i, data.draw(VALUES))
        else:
            opcodes[i] = data.draw(VALUES | CALLED | LEAVES)
    load_data_set(data_set, name, b''.join(opcodes))


@fuzz(300, data=st.data(), name=SOME_FILES)
def test_a_damaged_data_set(data_set, data, name):
    load_data_set(data_set, name, data.draw(damaged(data_set[1][name], head=320)))


@fuzz(200, value=VALUES, name=SOME_FILES)
def test_a_data_set_with_a_file_of_any_opcodes_in_order(data_set, value, name):
    assert load_data_set(data_set, name, b'\x80\x04' + value + b'.')


@pytest.mark.parametrize('call', [b'cos\nsys\x1b[2J\n', b'\x8c\x04\xc2\x9b2J\x8c\x01x\x93',
                                  b'\x8c\x05\xe2\x80\xa8os\x8c\x01x\x93'])
def test_a_name_in_a_pickle_cannot_write_to_the_terminal(data_set, call):
    message = load_data_set(data_set, 'data_batch_1', b'\x80\x04' + call + b')R.')
    assert 'it asks for ' in message  # and no more than one printable line: see outcome()


# ---- configurations

with open(os.path.join(ROOT, 'config.json'), encoding='utf-8') as f:
    BASE_TEXT = f.read()
TOKENS = st.sampled_from([
    '{', '}', '[', ']', ',', ':', ' ', '\n', '"', '\\', 'null', 'true', 'false', 'NaN', 'Infinity',
    '-Infinity', '1e999', '-1e-999', '0', '-0', '1', '64', '1.0', '01', '0x10', '9' * 30, '9' * 400,
    '9' * 5000, '"\\ud800"', '"\\u2028"', '"\\u009b"', '\u2028', '\x85', '\ufeff', '\x1b[2J', '\0',
    '"_comment":', '/*', '//', '"a.npy"', '[[0, 0.1]]', '[' * 200, ']' * 200, '{"cw": 1}'
]) | st.sampled_from([f'"{key}":' for key in SCHEMA]) | st.text(max_size=5).map(json.dumps)
JSON_TEXT = st.lists(TOKENS, max_size=12).map(''.join) | st.lists(
    st.tuples(st.sampled_from(list(SCHEMA)), TOKENS).map(lambda v: f'"{v[0]}": {v[1]}'),
    max_size=4).map(lambda items: '{' + ', '.join(items) + '}')


def assert_sound_config(config):
    assert list(config) == list(SCHEMA)
    check_config(config)
    text = json.dumps(config, allow_nan=False)
    assert json.loads(text) == config  # what is stored is read back
    for key in ('model_dir', 'data_path', 'store_adv_path'):
        os.fsencode(config[key])
        assert len(config[key].splitlines()) == 1


def load_config_file(folder, raw, as_base):
    path = os.path.join(folder, 'any.json')
    with open(path, 'wb') as f:
        f.write(raw)
    config, message = outcome(lambda: load_config(base=path) if as_base else load_config(path))
    if message is None:
        assert_sound_config(config)
    else:
        assert path in message or any(key in message for key in SCHEMA)
    assert os.listdir(folder) == ['any.json']


@fuzz(400, text=JSON_TEXT, as_base=st.booleans())
def test_a_configuration_of_any_text(tmp_path_factory, text, as_base):
    load_config_file(folder_for(tmp_path_factory, 'json'), text.encode('utf-8', 'surrogatepass'),
                     as_base)


@fuzz(400, raw=damaged(BASE_TEXT.encode(), head=2000, tail=400) | st.binary(max_size=100))
def test_a_damaged_configuration(tmp_path_factory, raw):
    load_config_file(folder_for(tmp_path_factory, 'json'), raw, True)


@fuzz(400, settings=st.lists(
    st.tuples(st.sampled_from([f'{key}=' for key in SCHEMA]) | st.text(max_size=9),
              JSON_TEXT | st.text(max_size=20)).map(''.join), min_size=1, max_size=3))
def test_any_settings(settings):
    config, message = outcome(lambda: load_config(settings=settings))
    if message is None:
        assert_sound_config(config)


@pytest.mark.parametrize('text, said', [
    ('{"' + 'long ' * 10000 + '": 1}', 'unknown key'),
    ('{"%s": 1, "%s": 2}' % (('long ' * 10000,) * 2), 'is given twice'),
    ('{"store_adv_path": "/home/user/.profile"}', 'must be the path of a .npy file'),
    (r'{"model_dir": "\u009b2J"}', 'must be the path of a folder'),
    (r'{"data_path": "two\u2028lines"}', 'must be the path of a folder'),
    ('[' + '[],' * 2 ** 21 + '[]]', 'bytes; expected 4,194,304 at most')])
def test_a_strangers_configuration_is_refused_in_a_line_of_reasonable_length(tmp_path, text, said):
    path = tmp_path / 'config.json'
    path.write_text(text)
    _, message = outcome(load_config, str(path))
    assert said in message and len(message) < 1500


def test_a_key_given_twice_within_a_setting_is_refused_as_in_a_file():
    _, message = outcome(lambda: load_config(settings=['num_attack_examples={"cw": 1, "cw": 2}']))
    assert 'num_attack_examples' in message
    assert parse_setting('num_attack_examples={"cw": 1, "pgd": 2}')[1] == {'cw': 1, 'pgd': 2}


# ---- archives


MODEL = [('m/', b''), ('m/checkpoint', b'model_checkpoint_path: "x"\n'),
         ('m/checkpoint-7.index', b'index' * 9), ('m/checkpoint-7.data-00000-of-00001', b'x' * 999)]
ARCHIVES = [archive(MODEL, how) for how in (zipfile.ZIP_DEFLATED, zipfile.ZIP_STORED)]


def load_archive(folder, raw):
    """Unpacks an archive of these bytes; returns the refusal, or None for a model as promised."""
    path, models = os.path.join(folder, 'm.zip'), os.path.join(folder, 'models')
    with open(path, 'wb') as f:
        f.write(raw)
    shutil.rmtree(models, ignore_errors=True)
    os.mkdir(models)
    model = os.path.join(models, 'm')
    _, message = outcome(unpack, path, model, folder=models)
    assert sorted(os.listdir(folder)) == ['m.zip', 'models']
    assert os.listdir(models) == ([] if message else ['m'])
    if message is None:
        assert find_checkpoints(model)
        for where, folders, names in os.walk(model):
            for name in (*folders, *names):
                mode = os.lstat(os.path.join(where, name)).st_mode
                assert stat.S_ISDIR(mode) if name in folders else stat.S_ISREG(mode)
                assert not mode & 0o7111 or name in folders  # nothing that could be run
    return message


@fuzz(500, raw=damaged(st.sampled_from(ARCHIVES), head=400, tail=350) | st.binary(max_size=100).map(
    lambda tail: b'PK\x03\x04' + tail))
def test_a_damaged_archive(tmp_path_factory, raw):
    load_archive(folder_for(tmp_path_factory, 'zip'), raw)


PARTS = st.sampled_from(['..', '.', '', 'm', 'a', 'A', '~', 'C:', '\\', 'con', ' ', 'x' * 300,
                         '\x1b[2J', '\u2028', '\x9b', '\0', 'a\nb', 'checkpoint-7.index',
                         'checkpoint-7.data-00000-of-00001']) | st.text(
                             st.characters(exclude_categories=['Cs']), max_size=4)


@st.composite
def entries(draw):
    entry = zipfile.ZipInfo('placeholder')
    parts = draw(st.lists(PARTS, min_size=1, max_size=4) | PARTS.map(lambda part: [part] * 12))
    entry.filename = '/'.join(parts)  # past zipfile's own tidying
    entry.create_system = draw(st.sampled_from([0, 3, 19]))
    entry.external_attr = draw(st.sampled_from(
        [0, 0o644 << 16, 0o100755 << 16, 0o104755 << 16, 0o120777 << 16, 0o020666 << 16,
         0o040755 << 16, 16]) | st.integers(0, 2 ** 32 - 1))
    entry.compress_type = draw(st.sampled_from([zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED,
                                                zipfile.ZIP_BZIP2]))
    entry.extra = draw(st.sampled_from([b'', b'\x01\x00\x08\x00' + bytes(8), b'\x75\x70\x09\x00\x01'
                                        + bytes(4) + b'../e', b'\xff\xff\xff\xff']))
    return entry, draw(st.sampled_from([b'', b'evil', bytes(10000)]))


@fuzz(400, more=st.lists(entries(), max_size=3), first=st.booleans(),
      damage=st.none() | st.integers(0, 2 ** 31))
@pytest.mark.filterwarnings('ignore:Duplicate name')
def test_an_archive_with_any_entries(tmp_path_factory, more, first, damage):
    raw = bytearray(archive([*more, *MODEL] if first else [*MODEL, *more]))
    if damage is not None:
        raw[damage % len(raw)] ^= 1 << damage % 8
    load_archive(folder_for(tmp_path_factory, 'zip'), bytes(raw))


@pytest.mark.parametrize('name, said', [
    ('m/' + 'x' * 300, 'is too long a name'), ('m/' * 30000 + 'x', 'is too long a name'),
    ('m/\x1b[2J', 'could lead elsewhere'), ('m/two\u2028lines', 'could lead elsewhere')])
def test_an_entrys_name_that_no_file_can_have_is_refused(tmp_path, name, said):
    assert said in load_archive(str(tmp_path), archive([*MODEL, (name, b'')]))


def test_a_table_of_millions_of_entries_is_not_read(tmp_path):
    """zipfile would make ten times its size of it before the entries can be counted."""
    entry = archive([('m/', b'')])
    table, end = entry[entry.index(b'PK\1\2'):entry.index(b'PK\5\6')], entry[-22:]
    number = 10 ** 5
    table *= number
    raw = entry[:32] + table + end[:12] + struct.pack('<II', len(table), 32) + end[20:]
    message = load_archive(str(tmp_path), raw)
    assert message == f'is damaged: a table of {len(table):,} bytes'


@pytest.mark.parametrize('note', [
    {}, {'url': 'http://a/'}, {'url': 'http://b/', 'validator': None, 'total': None},
    {'url': 'http://a/', 'validator': 7, 'total': 7}, {'url': 'http://a/', 'validator': None},
    {'url': 'http://a/', 'validator': None, 'total': '7'},
    {'url': 'http://a/', 'validator': None, 'total': -7},
    {'url': 'http://a/', 'validator': None, 'total': True}])
def test_a_note_that_download_did_not_write_is_not_believed(note):
    assert not download._is_note(note, 'http://a/')
    assert download._is_note({'url': 'http://a/', 'validator': '"x"', 'total': 7}, 'http://a/')
