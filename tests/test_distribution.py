"""Several devices: two logical CPUs in one process (two_devices.py), two processes on 127.0.0.1."""
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
import tensorflow as tf

import kills
from config import load_config
from running import UserError
from running.program import STOPPED
from conftest import ROOT
from running.devices import check_shares, check_tf_config, make_strategy, shares
from shaping import tail_mask
import train

TRAININGS = ['shaping_in_training', 'shaping_in_attack_and_training', 'fixed', 'adv_only+fixed']


@pytest.fixture(scope='module')
def found(tmp_path_factory):
    path = str(tmp_path_factory.mktemp('two') / 'found.npz')
    done = subprocess.run([sys.executable, os.path.join(ROOT, 'tests', 'two_devices.py'), path],
                          capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    with np.load(path) as z:
        return {key: z[key] for key in z.files}


def both(found, prefix):
    """Yields (name, by one device, by two replicas) of what two_devices.py found."""
    for key in found:
        if key.startswith(prefix) and key.endswith('/1'):
            yield key[len(prefix):-2], found[key], found[f'{key[:-1]}2']


@pytest.mark.parametrize('network', ['Model', 'SmoothModel'])
def test_the_attacks_gradient_through_synchronized_norms_is_one_devices(found, network):
    """It flows through the statistics from one replica to the other.

    Rounding may push an activation over the kink of the leaky ReLU, which changes the gradient of
    the pixels that it sees by some percent. SmoothModel has no kink.
    """
    (_, one, two), = both(found, f'gradient/{network}')
    share, tolerance = (100, 1e-5) if network == 'SmoothModel' else (98, 1e-3)
    assert np.percentile(np.abs(one - two), share) < tolerance * np.abs(one).max()
    assert np.abs(one).max() > 0


# PGD's sign turns rounding into a whole step where a gradient is near 0. TRADES starts where the
# divergence hardly has a gradient, so that it shows most there.
@pytest.mark.parametrize('training, of_metrics, of_weights', [
    *((name, 1e-5, 5e-3) for name in TRAININGS), ('3+trades', 1e-2, 2e-2)])
def test_synchronized_replicas_train_as_one_device(found, training, of_metrics, of_weights):
    """Three steps, attack and moving averages included."""
    for name, one, two in both(found, f'metric/{training}/'):
        np.testing.assert_allclose(two, one, rtol=of_metrics, err_msg=name)
    names = 0
    for name, one, two in both(found, f'weight/{training}/'):
        assert np.abs(one - two).max() <= of_weights * np.abs(one).max() + 1e-7, name
        names += 1
    assert names == 61


@pytest.mark.parametrize('training', [*TRAININGS, '3+trades'])
def test_all_replicas_hold_the_same_weights_and_averages(found, training):
    spreads = [value for key, value in found.items() if key.startswith(f'spread/{training}/')]
    assert len(spreads) > 60 and all((spread == 0).all() for spread in spreads)


def test_each_share_has_the_batchs_ratio(found):
    """Of 16 samples, 12 clean: two shares of 6 clean and 2 attacked."""
    attacked = (found['share/x'] != found['share/x_nat']).mean(axis=(2, 3, 4)) > 0.5
    assert attacked.tolist() == [[False] * 6 + [True] * 2] * 2
    order = [[0, 1, 2, 3, 4, 5, 12, 13], [6, 7, 8, 9, 10, 11, 14, 15]]
    assert (found['share/x_nat'] == found['share/images'][order]).all()
    assert (found['share/y'] == found['share/labels'][order]).all()


def test_per_replica_norms_are_those_of_the_share_and_their_mean_is_kept(found):
    """A forward pass in two replicas, and each of their shares alone on one device."""
    names = set()
    for name, alone, together in both(found, 'norms/'):
        np.testing.assert_allclose(together, alone, rtol=1e-4, atol=1e-5, err_msg=name)
        names.add(name)
    assert names == {'logits', 'moving_mean'}


def test_two_replicas_attack_and_count_the_images_held_out_as_one_device_does(found):
    (natural, adv), two = found['validation/1'], found['validation/2']
    assert (two == [natural, adv]).all() and natural == 1 > adv


def test_shares_cover_the_batch_once_and_keep_the_ratio():
    for num_replicas, size, ratio in ((1, 8, 3), (2, 16, 3), (4, 64, 3), (3, 63, 2), (8, 128, 7)):
        tail = tail_mask(size, ratio)
        found = shares(tail, num_replicas)
        assert sorted(found.ravel()) == list(range(size))
        clean = size // num_replicas * ratio // (ratio + 1)
        assert (tail[found] == (np.arange(size // num_replicas) >= clean)).all()
        assert num_replicas > 1 or (found == np.arange(size)).all()


def test_sizes_that_do_not_fit_are_refused_with_those_that_do():
    config = load_config()
    check_shares(config, 4)
    with pytest.raises(UserError, match='64, divided among 3 replicas, each share 3:1; expected '
                                        'a multiple of 12, such as 60 or 72'):
        check_shares(config, 3)
    check_shares({**config, 'training_mode': 'adv_only'}, 32)
    with pytest.raises(UserError, match='expected a multiple of 3, such as 63 or 66'):
        check_shares({**config, 'training_mode': 'adv_only'}, 3)


@pytest.mark.parametrize('text', [
    None, '', 'x', '3', '[]', '{}', '{"cluster": {}, "task": {"type": "worker", "index": 0}}',
    '{"cluster": {"worker": ["a:1"]}, "task": {"type": "worker", "index": 1}}',
    '{"cluster": {"worker": ["a:1"]}, "task": {"type": "worker", "index": "0"}}',
    '{"cluster": {"worker": ["a"]}, "task": {"type": "worker", "index": 0}}',
    '{"cluster": {"worker": [1]}, "task": {"type": "worker", "index": 0}}',
    '{"cluster": {"worker": ["a:1"], "ps": ["a:2"]}, "task": {"type": "worker", "index": 0}}',
    '{"cluster": {"worker": ["a:1"]}, "task": {"type": "chief", "index": 0}}', '[' * 10 ** 5])
def test_a_tf_config_that_is_none_is_refused(text):
    with pytest.raises(UserError, match='TF_CONFIG.*expected {') as error:
        check_tf_config(text)
    assert '\n' not in str(error.value)


def test_xla_on_several_devices_is_refused():
    with pytest.raises(UserError, match='xla is on'):
        make_strategy({'distribution': 'mirrored', 'xla': 'on'})


# ---- whole trainings


def test_mirrored_training_from_the_command_line(tmp_path):
    """Stopped and started again, too."""
    def run(folder, steps):
        arguments = kills.command(folder, steps, 'batch_norms=synchronized',
                                  'distribution=mirrored')
        done = subprocess.run([*arguments, '--logical_cpus=2'], capture_output=True, text=True,
                              timeout=300)
        assert done.returncode == 0, done.stderr
        return done.stdout
    two, again = str(tmp_path / 'two'), str(tmp_path / 'again')
    run(two, 8)
    run(again, 5)
    assert 'Resuming from' in run(again, 8)
    assert kills.differences(again, two, 8) == []
    train.check_same_replicas({'batch_norms': 'synchronized'}, f'{two}/checkpoint-8', 3)
    with pytest.raises(UserError, match='trained by 2 replicas.*here are 3'):
        train.check_same_replicas({'batch_norms': 'per_replica'}, f'{two}/checkpoint-8', 3)


def workers(folder, steps, of_second=()):
    """Starts two workers of one training; returns their processes.

    Args:
        of_second: settings of the second one alone.
    """
    ports = []
    for _ in range(2):
        with socket.socket() as s:
            s.bind(('127.0.0.1', 0))
            ports.append(s.getsockname()[1])
    cluster = {'worker': [f'127.0.0.1:{port}' for port in ports]}
    arguments = kills.command(folder, steps, 'distribution=multi_worker',
                              'batch_norms=synchronized')
    more = [], [f'--set={setting}' for setting in of_second]
    return [kills.start([*arguments, *more[index]], env={**os.environ, 'TF_CONFIG': json.dumps(
        {'cluster': cluster, 'task': {'type': 'worker', 'index': index}})}) for index in range(2)]


def ended(processes):
    """Returns [(status, stdout, stderr)] of processes that are to end within a minute or two."""
    found = []
    for process in processes:
        stdout, stderr = process.communicate(timeout=150)
        assert 'Traceback' not in stderr, stderr
        found.append((process.returncode, stdout, stderr))
    return found


def until(process, line):
    while line not in process.stdout.readline():
        assert process.poll() is None, process.stderr.read()


@pytest.fixture(scope='module')
def by_two_workers(tmp_path_factory):
    folder = str(tmp_path_factory.mktemp('workers'))
    (chief, stdout, stderr), (other, silent, _) = ended(workers(folder, 20))
    assert chief == other == 0, stderr
    assert 'Step 19:' in stdout and 'Step' not in silent
    return folder


def test_two_workers_train_what_one_process_trains(by_two_workers, tmp_path):
    """The losses of five steps, until PGD's sign has made too much of the rounding."""
    done = subprocess.run(kills.command(str(tmp_path), 5), capture_output=True, timeout=300)
    assert done.returncode == 0
    for theirs, ours in zip(kills.log(by_two_workers), kills.log(tmp_path)):
        assert theirs['loss'] == pytest.approx(ours['loss'], rel=5e-3)


@pytest.mark.slow
def test_workers_that_differ_are_refused(tmp_path):
    found = ended(workers(str(tmp_path), 5, ['weight_decay=0.1']))
    for status, stdout, stderr in found:
        assert status == 2 and 'the workers have different configurations' in stderr
        assert 'Step' not in stdout


def lose(lost, folder):
    """Kills one of two workers in a training of that folder; the other one must end by itself."""
    processes = workers(folder, 4000)
    until(processes[0], 'Step 8:')
    processes[lost].kill()
    begin = time.monotonic()
    status, _, stderr = ended([processes[1 - lost]])[0]
    processes[lost].communicate()
    assert status == STOPPED and time.monotonic() - begin < 100
    assert re.search(r'^train\.py: a worker was lost .* resumes from', stderr, re.MULTILINE)


@pytest.mark.slow
def test_a_lost_worker_ends_the_chief(tmp_path):
    lose(1, str(tmp_path))


@pytest.mark.slow
def test_a_lost_chief_ends_all_and_the_restart_resumes(by_two_workers, tmp_path):
    """The chief writes the checkpoints; it could not save."""
    lose(0, str(tmp_path))
    (chief, stdout, stderr), (other, *_) = ended(workers(str(tmp_path), 20))
    assert chief == other == 0, stderr
    assert kills.resumed_from(stdout) >= 5
    assert kills.differences(str(tmp_path), by_two_workers, 20) == []


def test_a_signal_to_one_worker_saves_and_ends_both(by_two_workers, tmp_path):
    processes = workers(str(tmp_path), 20)
    until(processes[0], 'Step 6:')
    processes[1].send_signal(signal.SIGTERM)
    (chief, stdout, _), (other, *_) = ended(processes)
    assert chief == other == STOPPED
    step = int(re.search(r'Stopped after (\d+) steps', stdout)[1])
    assert tf.train.latest_checkpoint(str(tmp_path)).endswith(f'checkpoint-{step}')
    assert all(status == 0 for status, *_ in ended(workers(str(tmp_path), 20)))
    assert kills.differences(str(tmp_path), by_two_workers, 20) == []
