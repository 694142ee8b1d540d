"""CIFAR-10, or the embedded synthetic set, held once in memory as uint8 (the original's file).

The data set comes from a folder in the published pickle layout, or from TensorFlow Datasets, which
downloads it into the default folder where it is not there yet.
"""
import glob
import os

import numpy as np

from config import load_config
from running import UserError, brief
from running.datasets import prepare
from running.untrusted import Array, read_pickle
import tensorflow as tf

TRAIN_FILES = [f'data_batch_{i + 1}' for i in range(5)]
EVAL_FILE = 'test_batch'
META_FILE = 'batches.meta'
ADDRESS = 'https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz'  # TensorFlow Datasets's own
ARCHIVE_FOLDER = 'cifar-10-batches-py'  # what cifar-10-python.tar.gz unpacks to


class CIFAR10Data:
    """A data set: train_data, validation_data and eval_data (DataSubset) and label_names.

    Args:
        train, test: (uint8 images [n, 32, 32, 3], labels [n]).
        label_names: a name for each label.
        classes: keeps only these label names, renumbered in the order of this list. None: all.
        seed: of the batches' order.
        num_validation: the last so many training images are held out: they are validation_data, and
            neither trained on nor among the clean samples.

    Raises:
        UserError: one of `classes` is not a label name, or no training image is left.
    """

    def __init__(self, train, test, label_names, classes=None, seed=0, num_validation=0):
        for name in classes or ():
            if name not in label_names:
                raise UserError(f'classes holds {name!r}; the label names are '
                                f'{", ".join(label_names)}')
        if classes:
            train, test = (_keep(*subset, [label_names.index(c) for c in classes])
                           for subset in (train, test))
        self.label_names = list(classes or label_names)
        left = len(train[1]) - num_validation
        if left < 1:
            raise UserError(f'num_validation_examples is {num_validation}; expected less than '
                            f'{len(train[1])}, the number of training images')
        self.train_data = DataSubset(train[0][:left], train[1][:left].astype(np.int64), seed)
        self.validation_data = DataSubset(train[0][left:], train[1][left:].astype(np.int64), seed)
        self.eval_data = DataSubset(test[0], test[1].astype(np.int64), seed)

    @property
    def num_classes(self):
        return len(self.label_names)


def load_pickles(path):
    """Returns train, test and label names from data_batch_1..5, test_batch and batches.meta."""
    meta = read_pickle(os.path.join(path, META_FILE))
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
    contents = read_pickle(filename)
    data, labels = contents.get('data'), contents.get('labels')
    if not isinstance(data, Array):
        raise UserError(f'{filename} holds no array named data')
    images = data.to_numpy(filename)
    if images.ndim != 2 or images.shape[1] != 3072 or len(images) == 0:
        raise UserError(f'{filename}: data is {list(images.shape)}; expected [n, 3072]')
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


def augment(images, seed):
    """Pads images [b, 32, 32, 3] by 2 zeros a side, crops 32 x 32 and flips, both at random.

    The job of the original's AugmentedCIFAR10Data, of TensorFlow ops: part of the training step.
    """
    b, size = images.shape[0], images.shape[1]
    padded = tf.pad(images, [[0, 0], [2, 2], [2, 2], [0, 0]])
    corner = tf.random.stateless_uniform([b, 2, 1], seed, 0, 5, tf.int32, alg='philox')
    rows, columns = tf.unstack(corner + tf.range(size), axis=1)  # [b, 32] each
    flipped = tf.random.stateless_uniform([b, 1], tf.random.fold_in(seed, 1, alg='philox'), 0, 2,
                                          tf.int32, alg='philox') == 1
    columns = tf.where(flipped, tf.reverse(columns, [1]), columns)
    return tf.gather(tf.gather(padded, rows, batch_dims=1), columns, axis=2, batch_dims=1)


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
            raise UserError(f'training_batch_size is {batch_size}; expected at most {self.n}, the '
                            'number of training images')
        epoch, batch = divmod(step, self.n // batch_size)
        if epoch != self._epoch:
            self._order = np.random.default_rng([self.seed, epoch]).permutation(self.n)
            self._epoch = epoch
        chosen = self._order[batch * batch_size:(batch + 1) * batch_size]
        return self.xs[chosen], self.ys[chosen]


def load_data(config, download=False):
    """Returns the CIFAR10Data that a configuration asks for.

    Args:
        download: download CIFAR-10 into data_path where it is not there. The data_path of
            config.json is downloaded into unasked; any other may be a typing error.

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
        if any(map(os.path.exists, files)):
            train, test, names = load_pickles(path)
        else:
            if not holds_tfds(path):
                download_tfds(path, download or path == load_config()['data_path'])
            train, test, names = load_tfds(path)
    return CIFAR10Data(train, test, names, config['classes'], config['np_random_seed'],
                       config['num_validation_examples'])


def eval_examples(data, config):
    """Returns the first num_eval_examples images (uint8) and labels of the evaluation set.

    Raises:
        UserError: there are fewer.
    """
    n = config['num_eval_examples']
    if n > data.eval_data.n:
        raise UserError(f'num_eval_examples is {n}; expected at most {data.eval_data.n}, the '
                        'number of evaluation images')
    return data.eval_data.xs[:n], data.eval_data.ys[:n]


# ---- TensorFlow Datasets


def holds_tfds(path):
    """Returns whether 'cifar10' is in a TensorFlow Datasets directory, sound or not.

    An interrupted download leaves folders with other names.
    """
    return bool(glob.glob(os.path.join(glob.escape(path), 'cifar10', '[0-9]*')))


def download_tfds(path, allowed):
    """Lets TensorFlow Datasets download 'cifar10' (160 MB) into a directory.

    Raises:
        UserError: it is not allowed to, or it cannot.
    """
    ways = (f'a folder with {TRAIN_FILES[0]}..5, {EVAL_FILE} and {META_FILE}, or a TensorFlow '
            'Datasets directory with cifar10')
    what = 'holds no CIFAR-10' if os.path.isdir(path) else 'is no folder'
    if not allowed:
        raise UserError(f'data_path {path} {what}; expected {ways}, or --download to download it '
                        'there')
    print(f'data_path {path} {what}: downloading 160 MB from {ADDRESS} with TensorFlow Datasets',
          flush=True)
    try:
        prepare('cifar10', path, ADDRESS)
    except UserError as error:
        raise UserError(f'CIFAR-10 cannot be downloaded into data_path {path}: {error}; expected '
                        f'in data_path {ways}') from None


def load_tfds(path):
    """Returns train, test and label names of 'cifar10' in a TensorFlow Datasets directory."""
    os.environ.setdefault('TFDS_DISABLE_TELEMETRY', '1')
    try:
        import tensorflow_datasets as tfds
        builder = tfds.builder('cifar10', data_dir=path)
        subsets = [tfds.as_numpy(builder.as_dataset(split, batch_size=-1))
                   for split in ('train', 'test')]
        names = list(builder.info.features['label'].names)
    except Exception as error:  # the package raises many kinds, with many lines
        raise UserError(f'TensorFlow Datasets cannot read data_path {path}: {brief(error)}; '
                        f'a folder with {TRAIN_FILES[0]}..5, {EVAL_FILE} and {META_FILE} is read, '
                        'too') from None
    _check_names(path, names)
    train, test = ((subset['image'], subset['label']) for subset in subsets)
    for name, (images, labels) in (('train', train), ('test', test)):
        _check_subset(f'{path}: {name}', images, labels, names)
    return train, test, names


# ---- checks


def _keep(images, labels, kept):
    """Returns the images whose label is among `kept`, and their labels' places in `kept`."""
    renumbered = np.full(256, -1)
    renumbered[kept] = np.arange(len(kept))
    labels = renumbered[labels]
    return images[labels >= 0], labels[labels >= 0]


def _check_names(where, names):
    if (len(set(names)) < len(names) or len(names) > 256
            or any(len(name) > 100 or not name.isprintable() for name in names)):
        raise UserError(f'{where}: label_names are not different names')


def _check_subset(where, images, labels, names):
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[1:] != (32, 32, 3):
        raise UserError(f'{where}: images are {images.dtype} {list(images.shape)}; expected '
                        'uint8 [n, 32, 32, 3]')
    if len(images) != len(labels):
        raise UserError(f'{where}: {len(images)} images, but {len(labels)} labels')
    if len(labels) == 0 or labels.min() < 0 or labels.max() >= len(names):
        raise UserError(f'{where}: no labels, or one outside 0..{len(names) - 1}')


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
