"""The data: what is read comes out exactly, and damaged or hostile files end in one line."""
import os
import pickle
import pickletools
import re
import shutil
import struct
import time
import tracemalloc

from hypothesis import strategies as st
import numpy as np
import pytest

import cifar10_input
from cifar10_input import DataSubset, eval_examples, load_data, load_pickles, make_synthetic
from conftest import fuzz
from running import UserError, untrusted

NAMES = ['airplane', 'automobile', 'bird', 'cat', 'deer', 'dog', 'frog', 'horse', 'ship', 'truck']
TRAIN_FILES = [f'data_batch_{i}' for i in range(1, 6)]
FILES = [*TRAIN_FILES, 'test_batch']
PER_FILE = 20


# ---- writing pickles as Python 2 did


class Raw(bytes):
    """Opcodes to be written as they are, where a value would stand."""


class Array:
    """An array's pickle, in every part as told: what an honest writer never makes."""

    def __init__(self, data, shape=None, dtype=None, raw=None):
        self.shape = data.shape if shape is None else shape
        self.dtype = data.dtype.str[1:].encode() if dtype is None else dtype
        self.raw = data.tobytes() if raw is None else raw


class Python2Pickler:
    """Writes protocol 2 as Python 2's cPickle does: byte strings, and a memo of nearly all."""

    def __init__(self):
        self.memoized = 0

    def memo(self):
        n, self.memoized = self.memoized, self.memoized + 1
        return b'q' + bytes([n]) if n < 256 else b'r' + struct.pack('<I', n)

    def text(self, value):
        short = len(value) < 256
        head = b'U' + bytes([len(value)]) if short else b'T' + struct.pack('<i', len(value))
        return head + value + self.memo()

    def array(self, value):
        parts = [b'cnumpy.core.multiarray\n_reconstruct\n', self.memo(), b'cnumpy\nndarray\n',
                 self.memo(), b'K\x00\x85', self.memo(), self.text(b'b'), b'\x87', self.memo(),
                 b'R', self.memo(), b'(K\x01(', *map(self.write, value.shape), b't', self.memo(),
                 b'cnumpy\ndtype\n', self.memo(), self.text(value.dtype), b'K\x00K\x01\x87',
                 self.memo(), b'R', self.memo(), b'(K\x03', self.text(b'|'), b'NNN',
                 b'J\xff\xff\xff\xff' * 2, b'K\x00t', self.memo(), b'b\x89', self.text(value.raw),
                 b't', self.memo(), b'b']
        return b''.join(parts)

    def write(self, value):
        if isinstance(value, Raw):
            return bytes(value)
        if isinstance(value, bytes):
            return self.text(value)
        if isinstance(value, bool):
            return b'\x88' if value else b'\x89'
        if isinstance(value, int):
            if 0 <= value < 256:
                return b'K' + bytes([value])
            if 0 <= value < 65536:
                return b'M' + struct.pack('<H', value)
            if -2 ** 31 <= value < 2 ** 31:
                return b'J' + struct.pack('<i', value)
            number = value.to_bytes(value.bit_length() // 8 + 1, 'little', signed=True)
            return b'\x8a' + bytes([len(number)]) + number
        if isinstance(value, list):
            return b']' + self.memo() + b'(' + b''.join(map(self.write, value)) + b'e'
        if isinstance(value, dict):
            items = (self.write(k) + self.write(v) for k, v in value.items())
            return b'}' + self.memo() + b'(' + b''.join(items) + b'u'
        return self.array(Array(value) if isinstance(value, np.ndarray) else value)


def python2_dumps(value):
    return b'\x80\x02' + Python2Pickler().write(value) + b'.'


def with_text_keys(value):
    """What Python 3 makes of Python 2's byte strings when it reads them as latin1."""
    if isinstance(value, dict):
        return {with_text_keys(k): with_text_keys(v) for k, v in value.items()}
    if isinstance(value, list):
        return [with_text_keys(v) for v in value]
    return value.decode('latin1') if isinstance(value, bytes) else value


WRITERS = {
    'Python 2': python2_dumps,
    'Python 3, protocol 2': lambda v: pickle.dumps(with_text_keys(v), 2),
    'Python 3, protocol 3': lambda v: pickle.dumps(with_text_keys(v), 3),
    'Python 3, protocol 4': lambda v: pickle.dumps(with_text_keys(v), 4),
    'Python 3, protocol 2, byte strings': lambda v: pickle.dumps(v, 2),
    'Python 3, protocol 4, byte strings': lambda v: pickle.dumps(v, 4),
}


# ---- a data set of 20 images a file


def make_contents(per_file=PER_FILE):
    """Images [6, n, 32, 32, 3] and labels [6, n] of the six files; every label in each."""
    rng = np.random.default_rng(5)
    labels = np.stack([rng.permutation(np.arange(per_file) % 10) for _ in FILES])
    return rng.integers(0, 256, (len(FILES), per_file, 32, 32, 3), np.uint8), labels


IMAGES, LABELS = make_contents()


def datafile(i=0, images=IMAGES, labels=LABELS):
    """The dict that the i-th of FILES holds: rows of all red, all green, all blue."""
    return {b'batch_label': b'training batch %d of 5' % (i + 1), b'labels': labels[i].tolist(),
            b'data': images[i].transpose(0, 3, 1, 2).reshape(-1, 3072)}


def meta(per_file=PER_FILE):
    return {b'num_cases_per_batch': per_file, b'label_names': [n.encode() for n in NAMES],
            b'num_vis': 3072}


def write(folder, name, raw):
    with open(os.path.join(folder, name), 'wb') as f:
        f.write(raw)


def write_all(folder, dumps=python2_dumps, images=IMAGES, labels=LABELS):
    os.makedirs(folder, exist_ok=True)
    for i, name in enumerate(FILES):
        write(folder, name, dumps(datafile(i, images, labels)))
    write(folder, 'batches.meta', dumps(meta(images.shape[1])))


def config(folder, **settings):
    return {'dataset': 'cifar10', 'data_path': str(folder), 'classes': None, 'np_random_seed': 0,
            'num_validation_examples': 0, 'num_eval_examples': 7, **settings}


@pytest.fixture
def folder(tmp_path):
    """A sound data set as Python 2 wrote it; a test may damage it."""
    write_all(tmp_path)
    return str(tmp_path)


def refusal(folder, name='data_batch_1', **settings):
    """The one line with which the data set is refused; it names the file."""
    with pytest.raises(UserError) as caught:
        load_data(config(folder, **settings))
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    assert os.path.join(folder, name) in message
    assert len(message) < len(folder) + 400
    return message


def assert_sound(folder):
    data = load_data(config(folder))
    np.testing.assert_array_equal(data.train_data.xs, IMAGES[:5].reshape(-1, 32, 32, 3))
    np.testing.assert_array_equal(data.train_data.ys, LABELS[:5].reshape(-1))
    np.testing.assert_array_equal(data.eval_data.xs, IMAGES[5])
    np.testing.assert_array_equal(data.eval_data.ys, LABELS[5])
    return data


# ---- what comes out


@pytest.mark.parametrize('writer', WRITERS)
def test_images_and_labels_come_back_exactly(tmp_path, writer):
    write_all(tmp_path, WRITERS[writer])
    data = assert_sound(str(tmp_path))
    for subset in (data.train_data, data.eval_data):
        assert subset.xs.dtype == np.uint8 and subset.ys.dtype == np.int64
        assert subset.n == len(subset.xs) == len(subset.ys)
    assert data.label_names == NAMES and data.num_classes == 10


def test_filenames_and_foreign_keys_do_no_harm(folder):
    """The published files also hold the names of the images."""
    names = [b'camion_s_%06d.png' % i for i in range(1000)]
    write(folder, 'data_batch_2', python2_dumps({**datafile(1), b'filenames': names}))
    write(folder, 'data_batch_3',
          pickle.dumps(with_text_keys({**datafile(2), b'filenames': names}), 2))
    assert_sound(folder)


def test_column_major_array_is_read_as_its_writer_saw_it(folder):
    contents = datafile()
    contents[b'data'] = np.asfortranarray(contents[b'data'])
    write(folder, 'data_batch_1', pickle.dumps(contents, 2))
    assert_sound(folder)


def test_meta_without_a_number_of_cases_will_do(folder):
    contents = meta()
    del contents[b'num_cases_per_batch']
    write(folder, 'batches.meta', python2_dumps(contents))
    assert_sound(folder)


def test_classes_keeps_only_these_renumbered_in_their_order(folder):
    data = load_data(config(folder, classes=['horse', 'automobile', 'frog']))
    assert data.label_names == ['horse', 'automobile', 'frog'] and data.num_classes == 3
    for subset, files in ((data.train_data, slice(0, 5)), (data.eval_data, slice(5, 6))):
        images, labels = IMAGES[files].reshape(-1, 32, 32, 3), LABELS[files].reshape(-1)
        kept = np.isin(labels, [7, 1, 6])
        np.testing.assert_array_equal(subset.xs, images[kept])
        assert subset.ys.dtype == np.int64
        names = [data.label_names[y] for y in subset.ys]
        assert names == [NAMES[y] for y in labels[kept]]


def test_unknown_class_is_named_with_the_label_names(folder):
    with pytest.raises(UserError) as caught:
        load_data(config(folder, classes=['cat', 'zebra']))
    assert str(caught.value) == "classes holds 'zebra'; the label names are " + ', '.join(NAMES)


def test_eval_examples_are_the_first_and_no_more_than_there_are(folder):
    data = load_data(config(folder))
    images, labels = eval_examples(data, config(folder, num_eval_examples=7))
    np.testing.assert_array_equal(images, IMAGES[5, :7])
    np.testing.assert_array_equal(labels, LABELS[5, :7])
    assert len(eval_examples(data, config(folder, num_eval_examples=20))[0]) == 20
    with pytest.raises(UserError, match='num_eval_examples is 21; expected at most 20, '):
        eval_examples(data, config(folder, num_eval_examples=21))


# ---- batches


def numbered(n, seed=0):
    """A DataSubset whose labels number its images."""
    xs = np.zeros((n, 32, 32, 3), np.uint8)
    xs[:, 0, 0, 0] = np.arange(n)
    return DataSubset(xs, np.arange(n), seed)


def test_a_step_has_its_batch_whatever_was_asked_before():
    data = numbered(50)
    in_order = [data.get_batch(step, 8) for step in range(20)]
    for step in (19, 0, 7, 6, 13, 0):
        for subset in (data, numbered(50)):
            images, labels = subset.get_batch(step, 8)
            np.testing.assert_array_equal(images, in_order[step][0])
            np.testing.assert_array_equal(labels, in_order[step][1])


def test_images_and_labels_stay_together():
    images, labels = numbered(50).get_batch(3, 8)
    np.testing.assert_array_equal(images[:, 0, 0, 0], labels)
    assert images.dtype == np.uint8 and labels.dtype == np.int64


@pytest.mark.parametrize('n, batch_size', [(50, 8), (48, 8), (8, 8), (15, 8)])
def test_an_epoch_sees_an_image_at_most_once_and_ends_before_the_batch_it_cannot_fill(
        n, batch_size):
    data = numbered(n)
    steps = n // batch_size
    for epoch in range(3):
        batches = [data.get_batch(epoch * steps + i, batch_size)[1] for i in range(steps)]
        assert all(len(batch) == batch_size for batch in batches)
        assert len(set(np.concatenate(batches))) == steps * batch_size


def test_epochs_and_seeds_differ():
    def epoch(data, number):
        return np.concatenate([data.get_batch(number * 5 + i, 10)[1] for i in range(5)]).tolist()

    orders = [epoch(numbered(50, seed), number) for seed in (0, 1, 2 ** 31 - 1)
              for number in range(3)]
    assert len(set(map(tuple, orders))) == 9
    assert all(sorted(order) == list(range(50)) for order in orders)
    assert sorted(orders[0]) != orders[0]  # and are shuffled


def test_batch_order_follows_np_random_seed(folder):
    first, second, again = (load_data(config(folder, np_random_seed=seed)).train_data
                            for seed in (1, 2, 1))
    assert (first.get_batch(0, 50)[0] == again.get_batch(0, 50)[0]).all()
    assert (first.get_batch(0, 50)[0] != second.get_batch(0, 50)[0]).any()


def test_batch_larger_than_the_data_set_is_refused():
    with pytest.raises(UserError, match='^training_batch_size is 51; expected at most 50, .*s$'):
        numbered(50).get_batch(0, 51)


# ---- damaged files


@pytest.mark.parametrize('name', ['batches.meta', *FILES])
def test_missing_file_is_named(folder, name):
    os.remove(os.path.join(folder, name))
    assert refusal(folder, name).endswith('cannot be read: No such file or directory')


@pytest.mark.parametrize('name', ['batches.meta', *FILES])
def test_empty_file_and_folder_are_named(folder, name):
    write(folder, name, b'')
    refusal(folder, name)
    os.remove(os.path.join(folder, name))
    os.mkdir(os.path.join(folder, name))
    assert 'cannot be read' in refusal(folder, name)


@pytest.mark.parametrize('name', ['batches.meta', 'data_batch_1', 'test_batch'])
@pytest.mark.parametrize('writer', ['Python 2', 'Python 3, protocol 4'])
def test_truncated_file_is_named(tmp_path, name, writer):
    write_all(tmp_path, WRITERS[writer])
    folder = str(tmp_path)
    with open(os.path.join(folder, name), 'rb') as f:
        raw = f.read()
    everywhere = {*range(120), *range(0, len(raw), 1009), *range(len(raw) - 60, len(raw))}
    for length in sorted(n for n in everywhere if n < len(raw)):
        write(folder, name, raw[:length])
        refusal(folder, name)


def test_file_larger_than_any_of_cifar10_is_not_read(folder):
    with open(os.path.join(folder, 'data_batch_1'), 'r+b') as f:
        f.truncate(2 ** 34)  # a hole: it takes no room on the disk
    costing_little(refusal, folder)


ROWS = datafile()[b'data']


@pytest.mark.parametrize('changes, said', [
    ({b'labels': [*LABELS[0].tolist()[:-1], 10]}, 'a label is outside 0..9'),
    ({b'labels': [-1, *LABELS[0].tolist()[1:]]}, 'a label is outside 0..9'),
    ({b'labels': LABELS[0].tolist()[:-1]}, '20 images, but 19 labels'),
    ({b'labels': [*LABELS[0].tolist(), 0]}, '20 images, but 21 labels'),
    ({b'labels': []}, '20 images, but 0 labels'),
    ({b'labels': [True] * 20}, 'no list of integers named labels'),
    ({b'labels': [b'cat'] * 20}, 'no list of integers named labels'),
    ({b'labels': b'x' * 20}, 'no list of integers named labels'),
    ({b'labels': LABELS[0].astype(np.uint8)}, 'no list of integers named labels'),
    ({b'labels': Raw(b'N')}, 'no list of integers named labels'),
    ({b'data': ROWS[:19]}, 'holds 19 images; batches.meta says 20'),
    ({b'data': ROWS[:, :3071]}, 'data is [20, 3071]; expected [n, 3072]'),
    ({b'data': ROWS.reshape(-1)}, 'data is [61440]; expected [n, 3072]'),
    ({b'data': IMAGES[0]}, 'data is [20, 32, 32, 3]; expected [n, 3072]'),
    ({b'data': ROWS[:0]}, 'not a uint8 array'),
    ({b'data': ROWS[:0, :0]}, 'data is [0, 0]; expected [n, 3072]'),
    ({b'data': ROWS.astype(np.int8)}, 'not a uint8 array'),
    ({b'data': ROWS.astype(np.uint16)}, 'not a uint8 array'),
    ({b'data': ROWS.astype(np.float32)}, 'not a uint8 array'),
    ({b'data': ROWS > 127}, 'not a uint8 array'),
    ({b'data': Array(ROWS, raw=ROWS.tobytes()[:-1])}, 'not a uint8 array'),
    ({b'data': Array(ROWS, raw=ROWS.tobytes() + b'x')}, 'not a uint8 array'),
    ({b'data': Array(ROWS, raw=b'')}, 'not a uint8 array'),
    ({b'data': Array(ROWS, shape=(10 ** 12, 3072))}, 'not a uint8 array'),
    ({b'data': Array(ROWS, shape=(10 ** 12, 3072), raw=b'')}, 'not a uint8 array'),
    ({b'data': Array(ROWS, shape=(2 ** 50, 2 ** 50))}, 'not a uint8 array'),
    ({b'data': Array(ROWS, shape=(-1, 3072))}, 'not a uint8 array'),
    ({b'data': Array(ROWS, shape=(1,) * 100)}, 'not a uint8 array'),
    ({b'data': Array(ROWS, shape=(True, 3072))}, 'not a uint8 array'),
    ({b'data': Array(ROWS, shape=(b'20', 3072))}, 'not a uint8 array'),
    ({b'data': Array(ROWS, dtype=b'O8')}, 'not a uint8 array'),
    ({b'data': ROWS.tobytes()}, 'holds no array named data'),
    ({b'data': LABELS[0].tolist()}, 'holds no array named data'),
    ({b'data': Raw(b'N')}, 'holds no array named data'),
    ({b'data': Raw(b'cnumpy\ndtype\nU\x02u1\x85R')}, 'holds no array named data'),
    ({b'data': Raw(b'cnumpy.core.multiarray\n_reconstruct\n)R')}, 'not a uint8 array'),
    ({b'data': Raw(b'cnumpy.core.multiarray\n_reconstruct\n')}, 'holds no array named data'),
])
def test_unfit_contents_are_named(folder, changes, said):
    write(folder, 'data_batch_1', python2_dumps({**datafile(), **changes}))
    assert said in costing_little(refusal, folder)


@pytest.mark.parametrize('key, said', [(b'labels', 'no list of integers named labels'),
                                       (b'data', 'no array named data')])
def test_missing_contents_are_named(folder, key, said):
    contents = datafile(5)
    del contents[key]
    write(folder, 'test_batch', python2_dumps(contents))
    assert said in refusal(folder, 'test_batch')


@pytest.mark.parametrize('changes', [
    {b'label_names': []},
    {b'label_names': b'cat'},
    {b'label_names': list(range(10))},
    {b'label_names': [b'cat'] * 10},
    {b'label_names': [b'two\nlines', *meta()[b'label_names'][1:]]},
    {b'label_names': Raw(b'N')},
    {b'num_cases_per_batch': b'20'},
    {b'num_cases_per_batch': True},
    {b'num_cases_per_batch': Raw(b'\x8b' + struct.pack('<i', 5000) + b'\x01' * 5000)},
])
def test_unfit_meta_is_named(folder, changes):
    write(folder, 'batches.meta', python2_dumps({**meta(), **changes}))
    refusal(folder, 'batches.meta')


@pytest.mark.parametrize('raw', [b'PK\x03\x04', b'\x80\x02].', b'\x80\x02N.', b'\x80\x02K\x07.',
                                 b'\x80\x02.', b'.', b'\x80\x09}.', b'<!DOCTYPE html>\n<html>'])
def test_file_that_is_no_pickle_of_a_dict_is_named(folder, raw):
    write(folder, 'data_batch_1', raw)
    assert 'is not a CIFAR-10 pickle' in refusal(folder)


def test_pickled_objects_of_other_kinds_are_refused(folder):
    objects = np.array([[1, 'two'], [None, 4]], object)
    for protocol in range(6):
        for data in (objects, np.float64(1), {1, 2}, UserError('x'), os.system, range(3), 1.5):
            write(folder, 'data_batch_1', pickle.dumps({**datafile(), b'data': data}, protocol))
            refusal(folder)


# ---- hostile files


def costing_little(action, *args):
    """Returns what an action returns, having seen that it takes less than 2 seconds and 64 MB."""
    begin = time.process_time()
    action(*args)
    assert time.process_time() - begin < 2
    tracemalloc.start()  # in a second run: it takes time itself
    try:
        result = action(*args)
        assert tracemalloc.get_traced_memory()[1] < 2 ** 26
    finally:
        tracemalloc.stop()
    return result


@pytest.mark.parametrize('call', [
    b'cos\nsystem\n(S%(command)s\ntR',
    b'cposix\nsystem\n(S%(command)s\ntR',
    b'cos\nsystem\nS%(command)s\n\x85R',
    b'(S%(command)s\nios\nsystem\n',
    b'(cos\nsystem\nS%(command)s\no',
    b'V\x6f\x73\nVsystem\n\x93(S%(command)s\ntR',
    b'\x8c\x02os\x8c\x06system\x93(S%(command)s\ntR',
    b'c__builtin__\neval\n(S"__import__(\'os\').system(%(command)s)"\ntR',
    b'\x8c\x08builtins\x8c\x04exec\x93(S"__import__(\'os\').system(%(command)s)"\ntR',
])
@pytest.mark.parametrize('name', ['batches.meta', 'data_batch_1'])
def test_a_pickle_that_calls_a_program_does_not_get_to_it(folder, call, name):
    sentinel = os.path.join(folder, 'sentinel')
    contents = meta() if name == 'batches.meta' else datafile()
    hostile = Raw(call % {b'command': f"'echo > {sentinel}'".encode()})
    raw = python2_dumps({**contents, b'': hostile})
    pickle.loads(raw, encoding='latin1')
    assert os.path.exists(sentinel)  # such is the pickle: Python's own unpickler obeys it
    os.remove(sentinel)
    write(folder, name, raw)
    refusal(folder, name)
    assert not os.path.exists(sentinel)


MANY = 2 ** 61 - 1  # the modulus of Python's hash of an integer
GET, PUT = b'h\x01', b'q\x01'
MEMOIZED = len(re.findall('MEMO|PUT', ' '.join(
    opcode.name for opcode, _, _ in pickletools.genops(python2_dumps(datafile())))))
START = b'U\x01k' + PUT + b'N'
WIDE = b'(' + GET * 999 + b't'  # a tuple that holds one tuple 999 times
ENCODE = (b'U\x01ac_codecs\nencode\nq\x01U\x01bX' + struct.pack('<I', 2 ** 20) + b'x' * 2 ** 20
          + b'q\x02U\x01cX\x06\x00\x00\x00latin1q\x03')  # in the memo: a call, a text, an encoding
BOMBS = {
    'a memo index beyond all reason': b'U\x01kr' + struct.pack('<I', 2 ** 26) + b'N',
    'a memo index in decimal': b'U\x01kp67108864\nN',
    'a string that claims 10 GB': b'U\x01k\x8e' + struct.pack('<Q', 10 ** 10) + b'abc',
    'a text that claims 10 GB': b'U\x01k\x8d' + struct.pack('<Q', 10 ** 10) + b'abc',
    'a string of negative length': b'U\x01kT' + struct.pack('<i', -5) + b'abc',
    'a string that claims 2 GB': b'U\x01kT' + struct.pack('<i', 2 ** 31 - 1) + b'abc',
    'an integer that claims 2 GB': b'U\x01k\x8b' + struct.pack('<i', 2 ** 31 - 1) + b'abc',
    'a frame that claims 10 GB': b'\x95' + struct.pack('<Q', 10 ** 10) + b'U\x01kN',
    'a bytearray of 10 GB': b'U\x01k\x96' + struct.pack('<Q', 10 ** 10),
    'nested pairs as keys': START + (GET + GET + b'\x86' + PUT + b'N') * 40,
    'nested wide tuples as keys': START + (WIDE + PUT + b'N') * 5,
    'wide tuples through MEMOIZE': b'U\x01k\x94N' + b''.join(
        b'(' + (b'h' + bytes([i])) * 999 + b't\x94N' for i in range(MEMOIZED, MEMOIZED + 5)),
    'wide tuples put twice': START + (WIDE + b'q\x02' + PUT + b'N') * 5,
    'wide tuples under a frame': START + (WIDE + b'\x95' + bytes(8) + b'\x80\x04' + PUT + b'N') * 5,
    'wide tuples under an empty APPENDS': START + (WIDE + b'(e' + PUT + b'N') * 5,
    'wide tuples under an empty SETITEMS': START + (WIDE + b'(u' + PUT + b'N') * 5,
    'wide tuples under an empty BUILD': START + (WIDE + b'Nb' + PUT + b'N') * 5,
    'wide tuples under a POP': START + (WIDE + b'N0' + PUT + b'N') * 5,
    'a tuple in 200,000 tuples as a key': b')' + b'\x85' * 200000 + b'N',
    'integers that share a hash': b'U\x01k}(' + b''.join(
        b'\x8a\x0b' + (MANY * i).to_bytes(11, 'little') + b'N' for i in range(1, 30000)) + b'u',
    'one text encoded by one tuple': ENCODE + b'U\x01k](h\x01h\x02h\x03\x86q\x04R' + (
        b'h\x01h\x04R' * 200 + b'e'),
    'one text encoded by many tuples': ENCODE + b'U\x01k](' + b'h\x01h\x02h\x03\x86R' * 200 + b'e',
    'an encoding with an endless name': ENCODE + b'U\x01k]q\x04(NNe' + b''.join(
        b'U\x01k]q' + bytes([i + 1]) + b'(' + (b'h' + bytes([i])) * 2 + b'e' for i in range(4, 64))
        + b'U\x01kh\x01U\x01xh\x40\x86R',
    'a million values': b'U\x01k](' + b'N' * 2 ** 20 + b'e',
    'a million marks': b'U\x01k' + b'(' * 2 ** 20,
    'integers that could share a way through a dict': b'U\x01k}(' + b''.join(
        b'J' + struct.pack('<i', 2 ** 16 + i) + b'N' for i in range(2000)) + b'u',
    'one long text encoded over and over': ENCODE + b'U\x01k](' + b'h\x01h\x02h\x03\x86R' * 9
        + b'e',
    'lists in lists': b'U\x01k' + b']' * 10 ** 5 + b'a' * (10 ** 5 - 1),
    'an array in arrays': b'U\x01k' + b'cnumpy.core.multiarray\n_reconstruct\n)R' * 9 + b'b' * 8,
    'a list that holds itself': b'U\x01k]' + PUT + GET + b'a',
    'a persistent id': b'U\x01kK\x01Q',
    'a registered extension': b'U\x01k\x82\x01',
    'a class made anew': b'U\x01kcnumpy\ndtype\n)\x81',
    'what lies within a name': b'U\x01k\x8c\x07_codecs\x8c\x12encode.__globals__\x93',
    'a name of several lines': b'U\x01k\x8c\x05o\ns\n\n\x8c\x07sys\ntem\x93',
    'a codec that is no encoding': b'U\x01kc_codecs\nencode\nU\x01xU\x03zip\x86R',
    'the encoding of a list': b'U\x01kc_codecs\nencode\n]X\x06\x00\x00\x00latin1\x86R',
    'a call of nothing': b'U\x01kcnumpy\nndarray\n)R',
}
HARMLESS = {'lists in lists', 'an array in arrays', 'a list that holds itself'}


@pytest.mark.parametrize('bomb', BOMBS)
def test_a_pickle_that_asks_for_the_impossible_costs_little(folder, bomb):
    """Each bomb is one item more in a file that is sound otherwise."""
    raw = python2_dumps(datafile())
    raw = b'\x80\x04' + raw[2:-2] + BOMBS[bomb] + raw[-2:]
    write(folder, 'data_batch_1', raw)
    costing_little(assert_sound if bomb in HARMLESS else refusal, folder)


@pytest.mark.parametrize('target', [
    'numpy.core.multiarray\n_reconstruct', 'numpy._core.multiarray\n_reconstruct',
    'numpy\nndarray', 'numpy\ndtype', '_codecs\nencode'])
@pytest.mark.parametrize('state', [
    b'}U\x04evilK\x01s',
    b'}X\x04\x00\x00\x00evilK\x01s',
    b'N}X\x04\x00\x00\x00evilK\x01s\x86',
    b'N}X\x09\x00\x00\x00to_numpyNs\x86',
    b'N}X\x0c\x00\x00\x00__defaults__)s\x86',
    b'N}X\x08\x00\x00\x00__doc__\nNs\x86',
    b'N}X\x08\x00\x00\x00__init__Ns\x86',
    b')', b'N', b'K\x01\x85'])
def test_a_pickle_cannot_set_attributes_on_what_stands_in_for_numpy(folder, target, state):
    stand_ins = [stand_in for stand_in in untrusted._Unpickler.ADMITTED.values()
                 if stand_in is not None]
    before = [dict(vars(stand_in)) for stand_in in stand_ins]
    hostile = Raw(b'c' + target.encode() + b'\n' + state + b'b')
    write(folder, 'data_batch_1', python2_dumps({**datafile(), b'data': hostile}))
    refusal(folder)
    assert [dict(vars(stand_in)) for stand_in in stand_ins] == before
    write(folder, 'data_batch_1', python2_dumps(datafile()))
    assert_sound(folder)


@pytest.fixture(scope='module')
def small_folder(tmp_path_factory):
    """A sound data set of two images a file, and the bytes of its files."""
    folder = tmp_path_factory.mktemp('small')
    images, labels = make_contents(2)
    write_all(folder, images=images, labels=labels)
    files = {}
    for name in (*FILES, 'batches.meta'):
        with open(os.path.join(folder, name), 'rb') as f:
            files[name] = f.read()
    return str(folder), files


FRAGMENTS = [b'\x80\x02', b'}', b']', b'(', b')', b'N', b'K\x01', b'J\xff\xff\xff\xff',
             b'U\x04data', b'U\x06labels', b'U\x00', b'X\x01\x00\x00\x00x',
             b'X\x06\x00\x00\x00latin1', b'\x85', b'\x86', b'\x87', b't', b'l', b'd', b'a', b'e',
             b's', b'u', b'q\x00', b'h\x00', b'\x94', b'cnumpy.core.multiarray\n_reconstruct\n',
             b'cnumpy\nndarray\n', b'cnumpy\ndtype\n', b'c_codecs\nencode\n', b'\x93', b'R', b'b',
             b'0', b'.']


@fuzz(300, raw=st.binary(max_size=200)
      | st.lists(st.sampled_from(FRAGMENTS), max_size=30).map(lambda f: b''.join(f) + b'.'),
      name=st.sampled_from(['batches.meta', 'data_batch_1', 'test_batch']))
def test_random_bytes_are_refused_in_one_line(small_folder, raw, name):
    folder, files = small_folder
    write(folder, name, raw)
    try:
        refusal(folder, name)
    finally:
        write(folder, name, files[name])


@fuzz(400, data=st.data(), name=st.sampled_from(['batches.meta', 'data_batch_1', 'test_batch']))
def test_flipped_bytes_are_refused_in_one_line_or_leave_a_sound_data_set(small_folder, data, name):
    """The bytes around the pixels are drawn as often as the pixels themselves."""
    folder, files = small_folder
    raw = bytearray(files[name])
    places = (st.integers(0, len(raw) - 1) | st.integers(0, min(len(raw), 320) - 1)
              | st.integers(max(0, len(raw) - 20), len(raw) - 1))
    for place, value in data.draw(st.lists(st.tuples(places, st.integers(0, 255)), min_size=1,
                                           max_size=3)):
        raw[place] = value
    write(folder, name, raw)
    try:
        train, test, names = load_pickles(folder)
    except UserError as error:
        assert len(str(error).splitlines()) == 1 and folder in str(error)
    else:
        for (images, labels), n in ((train, 10), (test, 2)):
            assert images.shape == (n, 32, 32, 3) and images.dtype == np.uint8
            assert labels.shape == (n,) and labels.dtype == np.int64
            assert labels.min() >= 0 and labels.max() < len(names)
    finally:
        write(folder, name, files[name])


# ---- TensorFlow Datasets


@pytest.fixture(scope='module')
def tfds():
    os.environ['TFDS_DISABLE_TELEMETRY'] = '1'
    return pytest.importorskip('tensorflow_datasets')


@pytest.fixture(scope='module')
def prepared(tfds, tmp_path_factory):
    """A TensorFlow Datasets directory with 20 images of 'cifar10', 15 for training."""
    images, labels = IMAGES[0], LABELS[0]
    splits = {'train': range(15), 'test': range(15, 20)}

    with tfds.core.registered.skip_registration():  # the package's own cifar10 must read it
        class Cifar10(tfds.core.GeneratorBasedBuilder):
            VERSION = tfds.core.Version('3.0.2')

            def _info(self):
                features = tfds.features.FeaturesDict({
                    'id': tfds.features.Text(), 'image': tfds.features.Image(shape=(32, 32, 3)),
                    'label': tfds.features.ClassLabel(names=NAMES)})
                return tfds.core.DatasetInfo(builder=self, features=features)

            def _split_generators(self, dl_manager):
                return {split: self._generate_examples(split) for split in splits}

            def _generate_examples(self, split):
                for i in splits[split]:
                    yield i, {'id': str(i), 'image': images[i], 'label': int(labels[i])}

    folder = str(tmp_path_factory.mktemp('tfds'))
    Cifar10(data_dir=folder).download_and_prepare()
    return folder


@pytest.fixture
def offline(monkeypatch):
    """No download succeeds."""
    def fail(*_):
        raise UserError('No route to host')
    monkeypatch.setattr(cifar10_input, 'prepare', fail)


def tfds_refusal(folder, download=False):
    with pytest.raises(UserError) as caught:
        load_data(config(folder), download)
    message = str(caught.value)
    assert len(message.splitlines()) == 1 and f'data_path {folder}' in message
    assert 'data_batch_1..5, test_batch and batches.meta' in message
    return message


def test_tfds_directory_is_read_exactly(prepared, offline):
    data = load_data(config(prepared))
    assert data.label_names == NAMES
    for subset, chosen in ((data.train_data, slice(0, 15)), (data.eval_data, slice(15, 20))):
        assert subset.xs.dtype == np.uint8 and subset.ys.dtype == np.int64
        found = sorted((image.tobytes(), int(y)) for image, y in zip(subset.xs, subset.ys))
        assert found == sorted((image.tobytes(), int(y))
                               for image, y in zip(IMAGES[0, chosen], LABELS[0, chosen]))
    classes = load_data(config(prepared, classes=['ship', 'cat']))
    assert sorted(classes.train_data.ys) == sorted([8, 3].index(y) for y in LABELS[0, :15]
                                                   if y in (8, 3))


def test_unpacked_archive_inside_data_path_is_found(tmp_path):
    os.mkdir(tmp_path / 'cifar-10-batches-py')
    write_all(str(tmp_path / 'cifar-10-batches-py'))
    data = load_data(config(str(tmp_path)))
    assert (data.train_data.n, data.eval_data.n) == (5 * PER_FILE, PER_FILE)


def test_pickles_are_preferred_to_a_tfds_directory_beside_them(prepared, offline, tmp_path):
    folder = str(tmp_path / 'both')
    shutil.copytree(prepared, folder)
    write_all(folder)
    assert_sound(folder)


def test_data_set_that_cannot_be_downloaded_is_told_in_one_line(offline, tmp_path, capfd):
    message = tfds_refusal(str(tmp_path), download=True)
    assert message.startswith('CIFAR-10 cannot be downloaded into') and 'No route' in message
    assert f'{tmp_path} holds no CIFAR-10: downloading 160 MB' in capfd.readouterr().out


def test_interrupted_download_is_begun_again(offline, tmp_path):
    os.makedirs(tmp_path / 'cifar10' / 'incomplete.ABCDEF_3.0.2')
    assert 'cannot be downloaded' in tfds_refusal(str(tmp_path), download=True)


@pytest.mark.parametrize('name', ['\x1b[2Jcat', 'dog', 'c' * 101])
def test_label_names_of_a_tfds_directory_that_would_not_print_are_refused(
        prepared, offline, tmp_path, name):
    folder = str(tmp_path / 'named')
    shutil.copytree(prepared, folder)
    path = os.path.join(folder, 'cifar10', '3.0.2', 'label.labels.txt')
    with open(path, encoding='utf-8') as f:
        text = f.read()
    with open(path, 'w', encoding='utf-8') as f:
        f.write(text.replace('cat', name))
    with pytest.raises(UserError) as caught:
        load_data(config(folder))
    assert str(caught.value) == f'{folder}: label_names are not different names'


def test_tfds_that_raises_at_once_is_told_in_one_line(tfds, monkeypatch, tmp_path):
    def fail(*_, **__):
        raise RuntimeError()
    monkeypatch.setattr(tfds, 'builder', fail)
    os.makedirs(tmp_path / 'cifar10' / '3.0.2')
    assert 'cannot read' in tfds_refusal(str(tmp_path))


@pytest.mark.parametrize('damage', ['empty', 'no records', 'short records', 'no info', 'bad info'])
def test_broken_tfds_directory_is_told_in_one_line(prepared, offline, tmp_path, damage):
    folder = str(tmp_path / 'broken')
    shutil.copytree(prepared, folder)
    version = os.path.join(folder, 'cifar10', '3.0.2')
    info = os.path.join(version, 'dataset_info.json')
    records = [os.path.join(version, name) for name in os.listdir(version) if 'tfrecord' in name]
    assert len(records) == 2
    if damage == 'empty':
        shutil.rmtree(version)
        os.mkdir(version)
    elif damage == 'no info':
        os.remove(info)
    elif damage == 'bad info':
        with open(info, 'w', encoding='utf-8') as f:
            f.write('{"name": ')
    else:
        for path in records:
            os.truncate(path, os.path.getsize(path) // 2)
            if damage == 'no records':
                os.remove(path)
    assert tfds_refusal(folder).startswith('TensorFlow Datasets cannot read')


# ---- the embedded set


@pytest.fixture(scope='module')
def synthetic():
    return make_synthetic()


def test_synthetic_set_is_deterministic():
    first, second = make_synthetic(300, 100), make_synthetic(300, 100)
    for a, b in zip(first[:2], second[:2]):
        np.testing.assert_array_equal(a[0], b[0])
        np.testing.assert_array_equal(a[1], b[1])
    assert first[2] == second[2]
    assert (make_synthetic(300, 100, seed=1)[0][0] != first[0][0]).any()


def test_synthetic_set_has_ten_classes_of_bytes(synthetic):
    train, test, names = synthetic
    assert len(set(names)) == 10
    for (images, labels), n in ((train, 10000), (test, 2000)):
        assert images.shape == (n, 32, 32, 3) and images.dtype == np.uint8
        shares = np.bincount(labels, minlength=10) / n
        assert len(shares) == 10 and shares.min() > 0.08 and shares.max() < 0.12


def test_load_data_gives_the_synthetic_set_without_looking_at_data_path(synthetic, tmp_path):
    data = load_data(config(tmp_path / 'nowhere', dataset='synthetic'))
    train, test, names = synthetic
    np.testing.assert_array_equal(data.train_data.xs, train[0])
    np.testing.assert_array_equal(data.eval_data.ys, test[1])
    assert data.label_names == names
    assert not os.path.exists(tmp_path / 'nowhere')


def folded(images):
    """The mean 4 x 4 tile of each image's brightness, without its mean."""
    tiles = images.mean(3, dtype=np.float32).reshape(-1, 8, 4, 8, 4).mean((1, 3))
    return tiles - tiles.mean((1, 2), keepdims=True)


def hues(images):
    """The tenth of the colour circle that each image's blob lies in."""
    colour = images.mean((1, 2), dtype=np.float32) @ np.exp(-2j * np.pi * np.arange(3) / 3)
    return np.rint(np.angle(colour) / (2 * np.pi) * 10).astype(int) % 10


def test_synthetic_texture_always_names_the_class(synthetic):
    """The nearest of ten tiles, each taken from one training image, in any of its 16 shifts."""
    (images, labels), (test_images, test_labels), _ = synthetic
    tiles = folded(images[[np.flatnonzero(labels == c)[0] for c in range(10)]])
    shifted = np.stack([np.roll(tiles, (i, j), (1, 2)) for i in range(4) for j in range(4)], 1)
    matches = np.einsum('nij,csij->ncs', folded(test_images), shifted).max(2)
    assert np.mean(matches.argmax(1) == test_labels) > 0.999


def test_synthetic_texture_is_within_reach_of_an_attack_of_epsilon_8(synthetic):
    tiles = folded(synthetic[1][0])
    assert 7 < np.abs(tiles).mean() < 8.5


def test_synthetic_hue_names_the_class_in_64_percent_of_the_images(synthetic):
    """In 60%, and by chance in a tenth of the others: large enough to outlast an attack."""
    for images, labels in synthetic[:2]:
        assert abs(np.mean(hues(images) == labels) - 0.64) < 0.03
    images = synthetic[1][0].astype(np.float32)
    colour = images - images.mean(3, keepdims=True)  # without the texture, which is grey
    assert np.abs(colour).max((1, 2, 3)).mean() > 2 * 8
