"""CIFAR-10, or the embedded synthetic set, held once in memory as uint8 (the original's file).

The data set comes from a folder in the published pickle layout, or from TensorFlow Datasets, which
downloads it where it is not there yet. Pickles from the web are code, so they are read by an
unpickler that knows lists, dicts, numbers and strings, and stands in for NumPy's array.
"""
import io
import os
import pickle
import pickletools

import numpy as np

from config import UserError, brief, read_bytes

TRAIN_FILES = [f'data_batch_{i + 1}' for i in range(5)]
EVAL_FILE = 'test_batch'
META_FILE = 'batches.meta'
ARCHIVE_FOLDER = 'cifar-10-batches-py'  # what cifar-10-python.tar.gz unpacks to
MAX_FILE_BYTES = 2 ** 26  # a published file has 31 MB
MAX_OPCODES = 2 ** 18  # and some 30,000 of these
MAX_WIDE_INTEGERS = 1000  # and none of these: beyond 16 bits


class DataSubset:
    """Images and labels of the training or the evaluation set.

    Args:
        xs: uint8 [n, 32, 32, 3].
        ys: int64 [n].
        seed: the batches' order follows from it and the step number alone.
    """

    def __init__(self, xs, ys, seed=0):
        self.xs, self.ys, self.n = xs, ys, len(xs)
        self.seed = seed
        self._epoch = None

    def get_batch(self, step, batch_size):
        """Returns images and labels of step number `step` (from 0), uint8 and int64.

        Every epoch has a permutation of its own, and ends, as in the original, before the batch
        that it could not fill.
        """
        if batch_size > self.n:
            raise UserError(f'training_batch_size is {batch_size}; at most {self.n}, the number of '
                            'training images, would fit')
        epoch, batch = divmod(step, self.n // batch_size)
        if epoch != self._epoch:
            self._order = np.random.default_rng([self.seed, epoch]).permutation(self.n)
            self._epoch = epoch
        chosen = self._order[batch * batch_size:(batch + 1) * batch_size]
        return self.xs[chosen], self.ys[chosen]


class CIFAR10Data:
    """A data set: train_data and eval_data (DataSubset) and label_names.

    Args:
        train, test: (uint8 images [n, 32, 32, 3], labels [n]).
        label_names: a name for each label.
        classes: keeps only these label names, renumbered in the order of this list. None: all.
        seed: of the batches' order.

    Raises:
        UserError: one of `classes` is not a label name.
    """

    def __init__(self, train, test, label_names, classes=None, seed=0):
        for name in classes or ():
            if name not in label_names:
                raise UserError(f'classes holds {name!r}; the label names are '
                                f'{", ".join(label_names)}')
        if classes:
            train, test = (_keep(*subset, [label_names.index(c) for c in classes])
                           for subset in (train, test))
        self.label_names = list(classes or label_names)
        self.train_data = DataSubset(train[0], train[1].astype(np.int64), seed)
        self.eval_data = DataSubset(test[0], test[1].astype(np.int64), seed)

    @property
    def num_classes(self):
        return len(self.label_names)


def _keep(images, labels, kept):
    """Returns the images whose label is among `kept`, and their labels' places in `kept`."""
    renumbered = np.full(256, -1)
    renumbered[kept] = np.arange(len(kept))
    labels = renumbered[labels]
    return images[labels >= 0], labels[labels >= 0]


def load_data(config):
    """Returns the CIFAR10Data that a configuration asks for.

    Raises:
        UserError: files that are missing, cut short, mislabelled or hostile, with one line.
    """
    if config['dataset'] == 'synthetic':
        train, test, names = make_synthetic()
    else:
        path = config['data_path']
        if os.path.isdir(os.path.join(path, ARCHIVE_FOLDER)):
            path = os.path.join(path, ARCHIVE_FOLDER)
        files = [os.path.join(path, name) for name in (*TRAIN_FILES, EVAL_FILE, META_FILE)]
        load = load_pickles if any(map(os.path.exists, files)) else load_tfds
        train, test, names = load(path)
    return CIFAR10Data(train, test, names, config['classes'], config['np_random_seed'])


def eval_examples(data, config):
    """Returns the first num_eval_examples images (uint8) and labels of the evaluation set.

    Raises:
        UserError: there are fewer.
    """
    n = config['num_eval_examples']
    if n > data.eval_data.n:
        raise UserError(f'num_eval_examples is {n}; at most {data.eval_data.n}, the number of '
                        'evaluation images, would fit')
    return data.eval_data.xs[:n], data.eval_data.ys[:n]


# ---- TensorFlow Datasets


def load_tfds(path):
    """Returns train, test and label names of 'cifar10' in a TensorFlow Datasets directory.

    Where the directory does not hold it, TensorFlow Datasets downloads it (160 MB) into it.
    """
    os.environ.setdefault('TFDS_DISABLE_TELEMETRY', '1')
    import tensorflow_datasets as tfds
    here = True
    try:
        builder = tfds.builder('cifar10', data_dir=path)
        here = os.path.isdir(builder.data_dir)  # not yet, after a download that was interrupted
        if not here:
            print(f'{path} holds neither {TRAIN_FILES[0]} nor {builder.name}/{builder.version}: '
                  'downloading with TensorFlow Datasets', flush=True)
            builder.download_and_prepare()
        subsets = [tfds.as_numpy(builder.as_dataset(split, batch_size=-1))
                   for split in ('train', 'test')]
        names = list(builder.info.features['label'].names)
    except Exception as error:  # the package raises many kinds, with many lines
        what = 'read' if here else 'download into'
        raise UserError(f'TensorFlow Datasets cannot {what} data_path {path}: {brief(error)}; a '
                        f'folder with {TRAIN_FILES[0]}..5, {EVAL_FILE} and {META_FILE} would '
                        'also fit') from None
    _check_names(path, names)
    train, test = ((subset['image'], subset['label']) for subset in subsets)
    for name, (images, labels) in (('train', train), ('test', test)):
        _check_subset(f'{path}: {name}', images, labels, names)
    return train, test, names


# ---- the published pickles


def load_pickles(path):
    """Returns train, test and label names from data_batch_1..5, test_batch and batches.meta."""
    meta = _read_pickle(os.path.join(path, META_FILE))
    names = meta.get('label_names')
    if not (isinstance(names, list) and names and all(isinstance(n, (bytes, str)) for n in names)):
        raise UserError(f'{os.path.join(path, META_FILE)} holds no list of label_names')
    names = [n if isinstance(n, str) else n.decode('utf-8', 'replace') for n in names]
    _check_names(os.path.join(path, META_FILE), names)
    expected = meta.get('num_cases_per_batch')
    if expected is not None and type(expected) is not int:
        raise UserError(f'{os.path.join(path, META_FILE)}: num_cases_per_batch is not an integer')
    parts = [_load_datafile(os.path.join(path, f), names, expected) for f in TRAIN_FILES]
    train = tuple(np.concatenate(part) for part in zip(*parts))
    return train, _load_datafile(os.path.join(path, EVAL_FILE), names, expected), names


def _load_datafile(filename, names, expected=None):
    """Returns uint8 images [n, 32, 32, 3] and labels [n] of one pickle."""
    contents = _read_pickle(filename)
    data, labels = contents.get('data'), contents.get('labels')
    if not isinstance(data, _Array):
        raise UserError(f'{filename} holds no array named data')
    images = data.to_numpy(filename)
    if images.ndim != 2 or images.shape[1] != 3072 or len(images) == 0:
        raise UserError(f'{filename}: data is {list(images.shape)}; [n, 3072] would fit')
    if not (isinstance(labels, list) and all(type(y) is int for y in labels)):
        raise UserError(f'{filename} holds no list of integers named labels')
    if expected is not None and len(images) != expected:
        raise UserError(f'{filename} holds {len(images)} images; {META_FILE} says {expected}')
    if any(not 0 <= y < len(names) for y in labels):
        raise UserError(f'{filename}: a label is outside 0..{len(names) - 1}')
    images = images.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)  # as stored: all red, green, blue
    labels = np.array(labels, np.int64)
    _check_subset(filename, images, labels, names)
    return np.ascontiguousarray(images), labels


def _check_names(where, names):
    if (len(set(names)) < len(names) or len(names) > 256
            or any(len(name) > 100 or not name.isprintable() for name in names)):
        raise UserError(f'{where}: label_names are not different names')


def _check_subset(where, images, labels, names):
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[1:] != (32, 32, 3):
        raise UserError(f'{where}: images are {images.dtype} {list(images.shape)}; uint8 '
                        '[n, 32, 32, 3] would fit')
    if len(images) != len(labels):
        raise UserError(f'{where}: {len(images)} images, but {len(labels)} labels')
    if len(labels) == 0 or labels.min() < 0 or labels.max() >= len(names):
        raise UserError(f'{where}: no labels, or one outside 0..{len(names) - 1}')


class _Array:
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
        **{(f'numpy.{core}.multiarray', '_reconstruct'): _Array for core in ('core', '_core')},
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


def _read_pickle(filename):
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


# ---- the embedded set


def make_synthetic(num_train=10000, num_test=2000, seed=0, blob_agrees=0.6, blob_contrast=52.,
                   texture_amplitude=8., noise=3.):
    """Builds the embedded set: 10 classes, each with a robust and a non-robust cue.

    After Tsipras et al., "Robustness May Be at Odds with Accuracy": the robust cue, a soft blob
    whose hue names the class, is large against epsilon but names another class in 1 - blob_agrees
    of the images (and the right one by chance in a tenth of those); the non-robust one, a periodic
    4 x 4 texture, always names the class but an attack of epsilon 8 can wipe it out.

    Args:
        blob_contrast, texture_amplitude, noise: in pixels of [0, 255].

    Returns:
        (images, labels) for training, the same for testing, and the ten label names.
    """
    rng = np.random.default_rng(seed)
    n = num_train + num_test
    labels = rng.integers(0, 10, n)
    textures = rng.permuted(np.tile(np.repeat([-1, 1], 8), (10, 1)), axis=1)  # zero mean each
    textures = np.tile(textures.reshape(10, 4, 4), (1, 9, 9)).astype(np.float32)  # [10, 36, 36]
    hues = np.where(rng.random(n) < blob_agrees, labels, rng.integers(0, 10, n))
    angles = 2 * np.pi * (hues[:, None] / 10 + np.array([0, 1 / 3, 2 / 3]))
    colours = np.cos(angles).astype(np.float32)
    centres = rng.uniform(10, 22, (n, 2, 1)).astype(np.float32)
    widths = rng.uniform(5, 8, (n, 1, 1)).astype(np.float32)
    shifts = rng.integers(0, 4, (n, 2))

    grid = np.arange(32, dtype=np.float32)
    bumps = np.exp(-((grid - centres) / widths) ** 2 / 2)  # [n, 2, 32]: along rows, along columns
    images = np.empty((n, 32, 32, 3), np.uint8)
    for i in range(n):
        top, left = shifts[i]
        image = rng.standard_normal((32, 32, 3), np.float32) * noise + 128
        image += (blob_contrast * np.outer(bumps[i, 0], bumps[i, 1]))[..., None] * colours[i]
        image += texture_amplitude * textures[labels[i], top:top + 32, left:left + 32, None]
        images[i] = np.clip(np.rint(image), 0, 255)
    names = [f'class_{i}' for i in range(10)]
    return (images[:num_train], labels[:num_train]), (images[num_train:], labels[num_train:]), names
