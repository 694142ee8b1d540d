"""Training from Python, and what a training tells while it runs."""
import os
import signal
import threading

import numpy as np
import pytest
import tensorflow as tf

import kills
from config import load_config
from running import outputs
from running.devices import uses_tensor_float_32
from running.outputs import NUM_KEPT, Pace, RunningMeans, Saver, duration
from running.resume import Stopped, take_lock
import train

STEPS = 13


def configuration(folder, **settings):
    return {**load_config(None, kills.settings(folder, STEPS)), 'num_output_steps': 5,
            'num_checkpoint_steps': 3, **settings}


@pytest.fixture
def config(tmp_path):
    return configuration(tmp_path / 'model')


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
    """The folder of a training of that configuration that was never stopped."""
    folder = tmp_path_factory.mktemp('whole')
    train.train(configuration(folder))
    return folder


@pytest.fixture(scope='module')
def every_step(tmp_path_factory):
    """The log of the same training, each step reported by itself."""
    folder = tmp_path_factory.mktemp('every_step')
    train.train(configuration(folder, num_output_steps=1))
    return kills.log(folder)


def handlers():
    return [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]


def send_in_step(monkeypatch, number, step):
    """Makes this process send itself a signal in a training step."""
    timed = Pace.timed

    def timed_with_signal(self, ii):
        if ii == step:
            os.kill(os.getpid(), number)
        return timed(self, ii)
    monkeypatch.setattr(Pace, 'timed', timed_with_signal)


def test_train_returns_its_last_checkpoint_and_reports_means(config, every_step, capsys):
    before = handlers()
    prefix = train.train(config)
    assert prefix == f'{config["model_dir"]}/checkpoint-{STEPS}'
    assert os.path.exists(f'{prefix}.index') and handlers() == before
    take_lock(f'{config["model_dir"]}/lock').close()

    lines = kills.log(config['model_dir'])
    assert [(line['step'], line['mean_of_steps']) for line in lines] == [
        (0, 1), (5, 5), (10, 5), (12, 2)]  # the last step, too
    assert [line['step'] for line in every_step] == list(range(STEPS))
    for line in lines:
        window = every_step[line['step'] + 1 - line['mean_of_steps']:line['step'] + 1]
        assert line['accuracy_nat'] == window[-1]['accuracy_nat']
        for name in set(train.AVERAGED) & set(line):
            assert line[name] == pytest.approx(np.mean([w[name] for w in window]), rel=1e-12)

    captured = capsys.readouterr()
    assert 'deprecated' not in captured.err
    start, first, step, *rest = captured.out.splitlines()
    assert start.startswith('Training on 1 replica, 16 samples')
    assert first.startswith('First step done in ') and step.startswith('Step 0:')
    assert any(line.startswith(f'{STEPS} steps: ') and line.endswith('on this machine')
               for line in rest[:5])  # before step 5 is reported
    assert '(mean of 5 steps)' in captured.out and '(this batch)' in captured.out
    assert train.train(config) == prefix  # nothing is left to do
    assert 'First step' not in capsys.readouterr().out


@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_raises_and_the_same_call_resumes(
        config, whole, monkeypatch, number):
    before = handlers()
    with monkeypatch.context() as patched:
        send_in_step(patched, number, 7)  # between two reports, two points and two checkpoints
        with pytest.raises(Stopped, match='after 8 steps.*saved') as stop:
            train.train(config)
    assert isinstance(stop.value, KeyboardInterrupt) and handlers() == before
    assert train.train(config).endswith(f'checkpoint-{STEPS}')  # the traceback keeps no lock
    assert kills.differences(config['model_dir'], str(whole), STEPS) == []


def test_train_works_in_a_thread_and_lets_go_after_an_error(config, monkeypatch):
    before, found = handlers(), []
    with monkeypatch.context() as patched:
        patched.setattr(Saver, 'check_finite', lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            train.train(config)
    assert handlers() == before
    thread = threading.Thread(target=lambda: found.append(train.train(config)))
    thread.start()
    thread.join()
    assert found[0].endswith(f'checkpoint-{STEPS}')


def test_a_longer_training_is_one_that_had_not_ended_before(config, whole, every_step):
    train.train({**config, 'max_num_training_steps': 8})
    train.train(config)
    ours, theirs = (kills.weights(folder, STEPS) for folder in (config['model_dir'], whole))
    assert set(ours) == set(theirs) and all((ours[name] == theirs[name]).all() for name in ours)
    lines = kills.log(config['model_dir'])
    assert [(line['step'], line['mean_of_steps']) for line in lines] == [
        (0, 1), (5, 5), (7, 2), (10, 5), (12, 2)]
    assert lines[3]['loss'] == pytest.approx(np.mean([w['loss'] for w in every_step[6:11]]))


def test_checkpoints_of_earlier_versions_and_foreign_sums_start_anew(tmp_path):
    means = RunningMeans(('loss', 'kl'), ('output',))
    for loss in (1., 2., 6.):
        means.add({'loss': loss, 'rate': 9.})
    saver = tf.compat.v1.train.Saver(means.variables)
    prefix = saver.save(None, str(tmp_path / 'checkpoint'), 3)
    again = RunningMeans(('loss', 'kl'), ('output', 'summary'), prefix)
    assert again.tell('output', {'loss': 6., 'rate': 9.}) == ({'loss': 3., 'rate': 9.}, 3)
    means.variables['running_means/output'].assign([-1., 0., 0.])
    hostile = saver.save(None, str(tmp_path / 'checkpoint'), 4)
    assert RunningMeans(('loss', 'kl'), ('output',), hostile).tell('output', {})[1] == 0
    others = RunningMeans(('loss',), ('output',), prefix)
    others.add({'loss': 5.})
    assert others.tell('output', {'loss': 5.}) == ({'loss': 5.}, 1)


@pytest.mark.parametrize('seconds, words', [
    (0.04, '0.0 s'), (89, '89 s'), (90, '1.5 minutes'), (3600, '60 minutes'), (7200, '2.0 hours'),
    (40 * 3600, '40 hours'), (80_000 * 72.4, '67 days'), (9e8, '10,417 days')])
def test_durations_in_words(seconds, words):
    assert duration(seconds) == words


def test_the_whole_time_is_told_after_three_timed_steps(monkeypatch):
    times = iter(np.cumsum([0, 50, 0, 72, 0, 500, 0, 72.4, 0, 73]))  # one of them was disturbed
    monkeypatch.setattr(outputs, 'timer', lambda: float(next(times)))
    pace, told = Pace(64, 0, 80_000), []
    for step in range(5):
        with pace.timed(step):
            pass
        told.append(pace.foretell(step))
    assert told == [['First step done in 50 s, graph building included'], [], [],
                    ['80,000 steps: 67 days on this machine'], []]


@pytest.mark.parametrize('capability, on, expected', [
    ((7, 5), True, False), ((8, 0), True, True), ((9, 0), True, True), ((9, 0), False, False)])
def test_tensor_float_32_is_told_where_it_computes(
        monkeypatch, capsys, config, capability, on, expected):
    found = tf.config.experimental
    monkeypatch.setattr(tf.config, 'get_visible_devices', lambda kind: ['gpu'])
    monkeypatch.setattr(found, 'get_device_details', lambda _: {'compute_capability': capability})
    monkeypatch.setattr(found, 'tensor_float_32_execution_enabled', lambda: on)
    assert uses_tensor_float_32() == expected
    train.tell_start(config, 2, 0)
    told = capsys.readouterr().out
    assert 'on 2 replicas, 8 samples' in told and ('TensorFloat-32' in told) == expected
    train.tell_start({**config, 'precision': 'mixed_bfloat16'}, 1, 0)
    assert 'TensorFloat-32' not in capsys.readouterr().out


def test_the_last_checkpoints_are_kept_and_no_other_folder_is_touched(tmp_path):
    """A folder's name may look like a pattern that another one's fits."""
    def saved(name, steps, kept=()):
        os.makedirs(tmp_path / name, exist_ok=True)
        prefixes = [str(tmp_path / name / f'checkpoint-{step}') for step in kept]
        saver = Saver(str(tmp_path / name), {'v': tf.Variable(1.)}, prefixes, None)
        for step in steps:
            saver.save(step)
        return sorted(path for path in os.listdir(tmp_path / name) if path.endswith('.index'))

    def names(*steps):
        return [f'checkpoint-{step}.index' for step in steps]
    assert NUM_KEPT == 3
    assert saved('adv1', [0, 1]) == names(0, 1)
    assert saved('adv[1]', range(5)) == names(2, 3, 4)
    assert saved('adv[1]', [4, 5], [2, 3, 4]) == names(3, 4, 5)  # 4 again, after a kill
    assert len(os.listdir(tmp_path / 'adv[1]')) == 2 * 3 + 1
    assert len(os.listdir(tmp_path / 'adv1')) == 2 * 2 + 1
