"""Loaders of untrusted files: none of them runs, allocates or writes what a file asks for.

Plain files and JSON; CIFAR-10's pickles; .npy files; zip archives of checkpoints.
"""
import io
import json
import os
import pickle
import pickletools
import re
import shutil
import stat
import warnings
import zipfile

import numpy as np

from running import UserError, brief

MAX_JSON_BYTES = 2 ** 22  # of a JSON file; config.json has 1,500

MAX_FILE_BYTES = 2 ** 26  # of a pickle; a published file has 31 MB
MAX_OPCODES = 2 ** 18  # and some 30,000 of these
MAX_WIDE_INTEGERS = 1000  # and none of these: beyond 16 bits

MAX_HEADER = 10000  # bytes of a .npy file's header; NumPy's own limit, and its files have 128

MAX_BYTES = 4 * 2 ** 30  # of an archive, packed or not; w32-10 and its velocities take a tenth
MAX_ENTRIES = 10000      # files and folders in it
MAX_DEPTH = 10           # of folders in folders
MAX_NAME = 200           # bytes of a file's or folder's name
MAX_TABLE = 2 * 2 ** 20  # bytes of the table of entries, which zipfile makes ten times as large
CHUNK = 2 ** 20


# ---- plain files and JSON


def check_plain(path, most=None):
    """Raises UserError unless path is a plain file, of `most` bytes or fewer.

    To be called before a file is opened: a pipe would block for ever, a device may never end.
    """
    try:
        status = os.stat(path)
    except OSError as error:
        raise UserError(f'{path} cannot be read: {error.strerror}') from None
    if stat.S_ISDIR(status.st_mode):
        raise UserError(f'{path} cannot be read: Is a directory')
    if not stat.S_ISREG(status.st_mode):
        raise UserError(f'{path} cannot be read: it is no plain file')
    if most is not None and status.st_size > most:
        raise UserError(f'{path} has {status.st_size:,} bytes; expected {most:,} at most')


def read_bytes(path, most):
    """Returns the contents of a plain file of `most` bytes or fewer. Raises UserError."""
    check_plain(path, most)
    try:
        with open(path, 'rb') as f:
            return f.read(os.fstat(f.fileno()).st_size)
    except OSError as error:
        raise UserError(f'{path} cannot be read: {error.strerror}') from None


def read_json(path, most=MAX_JSON_BYTES):
    """Returns the dict in a JSON file of `most` bytes. Raises UserError when there is none."""
    raw = read_bytes(path, most)
    try:
        value = parse_json(raw.decode('utf-8'))
    except UserError as error:
        raise UserError(f'{path}: {error}') from None
    except (UnicodeDecodeError, RecursionError) as error:
        raise UserError(f'{path} cannot be read: {type(error).__name__}') from None
    except ValueError as error:
        raise UserError(f'{path} is not JSON: {brief(error)}') from None
    if not isinstance(value, dict):
        raise UserError(f'{path} holds {type(value).__name__}; expected an object of keys')
    return value


def parse_json(text):
    """Returns the value of a JSON text. Raises ValueError, RecursionError, UserError."""
    return json.loads(text, object_pairs_hook=_pairs)


def _pairs(pairs):
    """json.loads's object_pairs_hook: refuses a key given twice, drops the original's _comment."""
    result = {}
    for key, value in pairs:
        if key in result:
            raise UserError(f'the key {key[:200]!r} is given twice')
        if key != '_comment':
            result[key] = value
    return result


# ---- .npy files


def map_array(path):
    """Returns the array in a .npy file, mapped into memory. Raises UserError."""
    check_plain(path)  # of any size: what is mapped is not read
    try:
        with open(path, 'rb') as f:
            head = f.read(12)
        # NumPy makes room for all that the header claims, 4 GB, before it looks at its own limit
        if head[6:7] > b'\1' and int.from_bytes(head[8:], 'little') > MAX_HEADER:
            raise ValueError('its header is too long')
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')  # of a header that is odd Python: lines of them
            return np.lib.format.open_memmap(path, mode='r')
    except OSError as error:
        raise UserError(f'{path} cannot be read: {error.strerror or brief(error)}') from None
    except Exception as error:  # a damaged header raises nearly anything
        raise UserError(f'{path} is not a .npy file of numbers: {brief(error)}') from None


# ---- pickles


class Array:
    """Stands in for a NumPy array while a pickle is read; nothing is allocated for it."""

    def __init__(self, *_):
        self.state = None

    def __setstate__(self, state):
        self.state = state

    def to_numpy(self, filename):
        try:
            _, shape, dtype, fortran_order, raw = self.state
            if dtype.name not in ('u1', b'u1', '|u1', b'|u1') or type(raw) is not bytes:
                raise ValueError('not uint8')
            array = np.frombuffer(raw, np.uint8)
            if not all(type(n) is int and 0 <= n <= len(raw) for n in shape):
                raise ValueError('an impossible shape')
            return array.reshape(shape, order='F' if fortran_order else 'C')
        except (AttributeError, TypeError, ValueError) as error:
            raise UserError(f'{filename}: data is not a uint8 array ({brief(error)})') from None


class _Dtype:
    """Stands in for numpy.dtype while a pickle is read."""

    def __init__(self, name, *_):
        self.name = name

    def __setstate__(self, state):
        pass


class _Encode:
    """Stands in for _codecs.encode, with which Python 3 writes byte strings under protocol 2.

    A class, as a pickle could set a function's attributes.
    """

    def __new__(cls, text, encoding):
        if encoding not in ('latin1', b'latin1'):
            raise pickle.UnpicklingError('a byte string in an encoding other than latin1')
        return text.encode('latin1')

    def __setstate__(self, state):
        pass


class _Unpickler(pickle.Unpickler):
    ADMITTED = {
        **{(f'numpy.{core}.multiarray', '_reconstruct'): Array for core in ('core', '_core')},
        ('numpy', 'ndarray'): None,  # only ever an argument of _reconstruct
        ('numpy', 'dtype'): _Dtype,
        ('_codecs', 'encode'): _Encode,
    }

    def find_class(self, module, name):
        if (module, name) not in self.ADMITTED:
            raise pickle.UnpicklingError(f'it asks for {module}.{name}')
        return self.ADMITTED[module, name]


# What lists, dicts, numbers, strings and the arrays' construction need. Left out: persistent ids,
# registered extensions, arbitrary constructors, sets, out-of-band buffers and taking things back.
_OPCODES = set('''PROTO FRAME STOP MARK EMPTY_DICT DICT SETITEM SETITEMS EMPTY_LIST LIST APPEND
    APPENDS EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 NONE NEWTRUE NEWFALSE INT BININT BININT1 BININT2
    LONG LONG1 LONG4 STRING BINSTRING SHORT_BINSTRING BINBYTES SHORT_BINBYTES BINBYTES8 UNICODE
    BINUNICODE SHORT_BINUNICODE BINUNICODE8 GLOBAL STACK_GLOBAL REDUCE BUILD PUT BINPUT LONG_BINPUT
    MEMOIZE GET BINGET LONG_BINGET'''.split())
_INTEGERS = ('INT', 'BININT', 'LONG', 'LONG1', 'LONG4')  # the others have 16 bits or fewer
_UNCOVERING = ('APPEND', 'APPENDS', 'SETITEM', 'SETITEMS', 'BUILD')  # show what lay under values


def read_pickle(filename):
    """Returns the dict in a pickle, its keys as text, without running or allocating what it asks.

    The opcodes are looked over before the unpickler sees them: a memo index beyond all reason makes
    it allocate gigabytes, as do many calls with one tuple of arguments, or with one long text.
    Tuples that hold one tuple many times over, and integers that share a hash, or a way through a
    dict's table, take long or for ever as keys: so neither tuples nor long texts come from the
    memo, no integer is large, and few are wide.
    """
    raw = read_bytes(filename, MAX_FILE_BYTES)
    try:
        num_opcodes = num_tuples = num_wide = 0
        memo, once = {}, False  # whether a memo's item, and the stack's top, may be used only once
        for opcode, argument, _ in pickletools.genops(raw):
            name = opcode.name
            num_opcodes += 1
            num_tuples += 'TUPLE' in name
            if name not in _OPCODES:
                raise pickle.UnpicklingError(f'opcode {name}')
            if name in ('PUT', 'BINPUT', 'LONG_BINPUT', 'MEMOIZE'):
                index = len(memo) if name == 'MEMOIZE' else argument
                if index > num_opcodes:
                    raise pickle.UnpicklingError(f'memo index {index}')
                memo[index] = once
            elif name in ('GET', 'BINGET', 'LONG_BINGET') and memo.get(argument):
                raise pickle.UnpicklingError('a tuple or a long text from the memo')
            elif name not in ('PROTO', 'FRAME'):
                once = ('TUPLE' in name or name in _UNCOVERING
                        or (type(argument) is str and len(argument) > 2 ** 16))
            if type(argument) is int and abs(argument) >= 2 ** 60:
                raise pickle.UnpicklingError('an integer beyond all reason')
            num_wide += name in _INTEGERS and abs(argument) >= 2 ** 16
            if num_wide > MAX_WIDE_INTEGERS:
                raise pickle.UnpicklingError('too many integers beyond 16 bits')
            if num_tuples > 16 or num_opcodes > MAX_OPCODES:
                raise pickle.UnpicklingError('too many tuples or values')
        value = _Unpickler(io.BytesIO(raw), encoding='bytes').load()
    except Exception as error:  # a damaged pickle raises nearly anything
        raise UserError(
            f'{filename} is not a CIFAR-10 pickle, or is damaged: {brief(error)}') from None
    if not isinstance(value, dict):
        raise UserError(f'{filename} is not a CIFAR-10 pickle: it holds no dict')
    return {k.decode('latin1') if isinstance(k, bytes) else k: v for k, v in value.items()}


# ---- zip archives of checkpoints

OF_CHECKPOINTS = re.compile(r'checkpoint|.*\.index|.*\.data-\d+-of-\d+')


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
                        f'expected {MAX_ENTRIES:,} and {MAX_BYTES:,} at most')
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
        raise UserError(f'is damaged: {brief(error)}') from None


def unpack(path, folder):
    """Unpacks a zip archive's checkpoints to a folder, which comes into being whole or not at all.

    The folder takes the place of the archive's innermost one that holds all its checkpoints. What
    is none of a checkpoint's files is left out: a SavedModel or a graph beside it is a program.

    Raises:
        UserError: the archive is damaged, unsafe, too large or holds no checkpoint.
    """
    temporary, written = f'{folder}.unpacking', 0
    f = _Archive(io.FileIO(path))
    try:
        archive = zipfile.ZipFile(f)
    except Exception as error:  # likewise
        f.close()
        raise UserError(f'is damaged: {brief(error)}') from None
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
            for where, _, names in os.walk(temporary):
                for name in names:
                    if not OF_CHECKPOINTS.fullmatch(name):
                        os.remove(os.path.join(where, name))
            os.rename(os.path.commonpath([os.path.dirname(prefix) for prefix in found]), folder)
        except (FileExistsError, NotADirectoryError):  # as this file system compares names
            raise UserError(f'holds {entry.filename!r} twice, or as a file and a folder') from None
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
