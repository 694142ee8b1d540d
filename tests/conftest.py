"""What the tests share. tests/data holds numbers that the original computed, slimmed from a run of
MadryLab's code (width 1) on 32 images of CIFAR-10; the 8 training steps of that run need more room
and are read from ../shared/reference where it lies beside the repository.

FUZZ_FACTOR=N in the environment makes every test with random inputs try N times as many.
"""
import collections
import functools
import io
import os
import signal
import sys
import zipfile

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
os.environ['CUDA_VISIBLE_DEVICES'] = '-1'  # the numbers here are a CPU's
for threads in ('TF_NUM_INTRAOP_THREADS', 'TF_NUM_INTEROP_THREADS', 'OMP_NUM_THREADS'):
    os.environ.setdefault(threads, '1')  # small tensors, a test on each core: a tenth less time
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # a background job's: tests send it
    signal.signal(signal.SIGINT, signal.default_int_handler)

import running.quiet  # noqa: E402, F401
from hypothesis import given, settings  # noqa: E402
import keras  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402
import tensorflow as tf  # noqa: E402

from cifar10_input import CIFAR10Data  # noqa: E402
from config import load_config  # noqa: E402
from model import Model  # noqa: E402
from train import make_adversary  # noqa: E402

DATA = os.path.join(ROOT, 'tests', 'data')
CHECKPOINT = os.path.join(DATA, 'madry_w1-250')
FUZZ_FACTOR = int(os.environ.get('FUZZ_FACTOR', '1'))
FUZZED = collections.Counter()  # test: how many inputs it was given


def fuzz(inputs, **strategies):
    """Makes a test try `inputs` random inputs, times FUZZ_FACTOR, and counts them."""
    def decorate(test):
        @functools.wraps(test)
        def counted(*args, **kwargs):
            FUZZED[test.__name__] += 1
            test(*args, **kwargs)
        return settings(max_examples=inputs * FUZZ_FACTOR, deadline=None)(
            given(**strategies)(counted))
    return decorate


def pytest_sessionfinish(session):
    if hasattr(session.config, 'workeroutput'):  # this is one of pytest-xdist's processes
        session.config.workeroutput['fuzzed'] = dict(FUZZED)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node):
    FUZZED.update(getattr(node, 'workeroutput', {}).get('fuzzed', {}))


def pytest_terminal_summary(terminalreporter):
    if FUZZED:
        terminalreporter.section(f'fuzzed: {sum(FUZZED.values()):,} inputs')
        for name, number in FUZZED.items():
            terminalreporter.write_line(f'{number:9,} {name}')


def archive(entries, compression=zipfile.ZIP_DEFLATED):
    """Returns a zip archive of (name or ZipInfo, contents) pairs."""
    f = io.BytesIO()
    with zipfile.ZipFile(f, 'w', compression) as z:
        for name, contents in entries:
            z.writestr(name, contents)
    return f.getvalue()


@pytest.fixture(scope='session')
def golden():
    """What the original computed from CHECKPOINT; the file lists its own keys."""
    with np.load(os.path.join(DATA, 'golden_slim.npz')) as z:
        return {key: z[key] for key in z.files}


@pytest.fixture
def madry_model():
    """The port's w32-1 network with the original's weights."""
    model = Model(num_residual_units=5, width_factor=1)
    assert model.load_madry_checkpoint(CHECKPOINT) == 250
    return model


@pytest.fixture
def small_model():
    """An untrained network, the smallest, always the same."""
    keras.utils.set_random_seed(0)
    return Model(num_residual_units=1, width_factor=1)


@pytest.fixture
def transfer_from(small_model, tmp_path):
    """The configuration's entry that names small_model, stored, as the model of `transfer`."""
    small_model.save_madry_checkpoint(tmp_path / 'source' / 'checkpoint-7', global_step=7)
    return {'transfer_from': str(tmp_path / 'source')}


@pytest.fixture
def small_config():
    """f(key=value, ...) -> the configuration of a quick run on the synthetic set."""
    def make(**settings):
        config = load_config(None, ['dataset=synthetic', 'num_residual_units=1', 'width_factor=1',
                                    'training_batch_size=16', 'num_steps=2', 'eval_batch_size=20',
                                    'num_eval_examples=50', 'step_size_schedule=[[0, 0.1]]',
                                    'apgd_num_steps=3', 'eot_draws=2', 'num_restarts=1',
                                    'square_queries=20', 'num_recordings=5', 'recorded_samples=20',
                                    'shaping_batch_size=20', 'inference_shaping_ratio=3'])
        return {**config, **settings}
    return make


@pytest.fixture
def batch():
    """16 random images, uint8, and their labels."""
    rng = np.random.default_rng(0)
    return rng.integers(0, 256, (16, 32, 32, 3), np.uint8), rng.integers(0, 10, 16)


def attacked_batch(model, config, batch, step, **norms):
    """Returns (x_nat, X^(T), labels) of a training step, as its weight update sees them."""
    get_batch, perturb = make_adversary(model, config, **norms)
    x, x_nat, labels = get_batch(*batch, tf.constant(step, tf.int64))
    return x_nat, perturb(x, x_nat, labels), labels


@pytest.fixture
def data():
    """200 training and 60 test images of random pixels and labels."""
    rng = np.random.default_rng(3)
    def subset(n):
        return rng.integers(0, 256, (n, 32, 32, 3), np.uint8), rng.integers(0, 10, n)
    return CIFAR10Data(subset(200), subset(60), [str(i) for i in range(10)])
