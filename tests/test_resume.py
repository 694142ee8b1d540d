"""Trainings that are stopped, killed, damaged or run twice; kills.py tries many more kills."""
import json
import os
import resource
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
import tensorflow as tf

import kills
from config import load_config, store_config
from running import UserError
from running.program import STOPPED
from conftest import CHECKPOINT, ROOT
from cifar10_input import load_data
from model import Model, checkpoints, damage, find_checkpoint
from running import resume
from running.arriving import step_of
from running.resume import take_lock
import spoil
import train

STEPS = 30


def run(folder, *settings, steps=STEPS, **more):
    """Runs a training to its end; returns (status, stdout, the lines on stderr that are ours)."""
    process = kills.start(kills.command(folder, steps, *settings), **more)
    stdout, stderr = process.communicate(timeout=300)
    assert 'Traceback' not in stderr, stderr
    return process.returncode, stdout, [line for line in stderr.splitlines()
                                        if line.startswith('train.py: ')]


def run_here(folder, steps=STEPS):
    """Runs that training to its end in this process, where TensorFlow is imported already."""
    train.train(load_config(None, kills.settings(folder, steps)))


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
    """The folder of a training of 30 steps that was never stopped; checkpoints 20, 25 and 30."""
    folder = str(tmp_path_factory.mktemp('whole'))
    status, _, stderr = run(folder)
    assert status == 0, stderr
    return folder


@pytest.fixture
def copied(whole, tmp_path):
    """A copy of it that nobody else uses."""
    folder = str(tmp_path / 'model')
    shutil.copytree(whole, folder)
    return folder


@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGKILL])
def test_stopped_and_started_again_it_ends_as_if_it_never_had_been(whole, tmp_path, number):
    folder = str(tmp_path)
    process, stdout = kills.start(kills.command(folder, STEPS)), ''
    while 'Step 13:' not in stdout:
        stdout += process.stdout.readline()
    process.send_signal(number)
    more, stderr = process.communicate(timeout=60)
    stdout += more
    if number == signal.SIGKILL:
        assert process.returncode == -9
    else:
        assert process.returncode == STOPPED and 'Traceback' not in stderr
        done = kills.last_step(stdout) + 1
        assert f'Stopped after {done} steps' in stdout
        assert checkpoints(folder)[0].endswith(f'checkpoint-{done}')
    status, stdout, stderr = run(folder)
    assert status == 0, stderr
    assert 10 <= kills.resumed_from(stdout) < STEPS
    assert kills.differences(folder, whole, STEPS) == []


def test_log_and_curves_are_cut_back_to_the_checkpoint(copied, whole, capsys):
    """As a kill leaves them: steps past the checkpoint, the last line and record cut off."""
    for prefix in checkpoints(copied)[:2]:
        for end in ('.index', '.data-00000-of-00001'):
            os.remove(prefix + end)
    with open(f'{copied}/log.jsonl', 'ab') as f:
        f.write(b'{"step": 3')
    events, = (f'{copied}/{name}' for name in os.listdir(copied) if name.startswith('events'))
    os.truncate(events, os.path.getsize(events) - 5)
    left = ['cut.tmp', 'checkpoint-25.index.tempstate123', 'checkpoint.tmp0a']  # by other kills
    for name in left:
        shutil.copy(events, f'{copied}/{name}')
    run_here(copied)
    assert kills.resumed_from(capsys.readouterr().out) == 20
    assert kills.differences(copied, whole, STEPS) == []
    assert not set(left) & set(os.listdir(copied))
    assert [line['step'] for line in kills.log(copied)] == list(range(STEPS))
    steps = [(tag, step) for tag, step, _ in kills.curves(copied)]
    assert len(steps) == len(set(steps)) and {step for _, step in steps} == set(range(0, STEPS, 4))


def test_a_damaged_checkpoint_is_named_and_passed_over(copied, whole, capsys):
    os.truncate(f'{copied}/checkpoint-30.data-00000-of-00001', 1000)
    with open(f'{copied}/checkpoint-25.index', 'r+b') as f:
        f.seek(40)
        f.write(b'\xff')
    with open(f'{copied}/checkpoint', 'wb') as f:  # the state file: not needed
        f.write(b'\x00 nonsense')
    run_here(copied)
    told = capsys.readouterr()
    assert kills.resumed_from(told.out) == 20
    for step in (30, 25):
        assert f'{copied}/checkpoint-{step} is damaged and skipped' in told.err
    assert kills.differences(copied, whole, STEPS) == []


def test_where_no_checkpoint_is_whole_nothing_is_written_over(copied):
    for prefix in checkpoints(copied):
        os.truncate(f'{prefix}.index', 7)
    before = sorted(os.listdir(copied))
    status, _, stderr = run(copied)
    assert status == 2 and len(stderr) == 1 and 'holds checkpoints, but none' in stderr[0]
    assert sorted(os.listdir(copied)) == before


@pytest.mark.parametrize('kind', spoil.KINDS)
def test_cut_off_and_flipped_bytes_are_recognized_or_harmless(copied, kind):
    outcomes, wrong = spoil.campaign(copied, kind, 60)
    assert wrong == [] and sum(outcomes.values()) == 60
    if kind in ('index', 'data'):
        assert outcomes['recognized'] >= 55  # an index's padding carries nothing


def test_evaluation_passes_over_damage_too(copied, capsys):
    os.truncate(f'{copied}/checkpoint-30.index', 50)
    assert find_checkpoint({'model_dir': copied}).endswith('checkpoint-25')
    assert 'checkpoint-30 is damaged' in capsys.readouterr().err
    with pytest.raises(UserError, match='holds no checkpoint'):
        find_checkpoint({'model_dir': f'{copied}/nowhere'})
    assert find_checkpoint({'model_dir': copied}, CHECKPOINT) == CHECKPOINT
    assert damage(CHECKPOINT) is None  # the original's own


def test_a_second_process_is_refused(copied):
    lock = take_lock(f'{copied}/lock')
    status, _, stderr = run(copied, steps=STEPS + 5)
    assert status == 2 and len(stderr) == 1
    assert f'process {os.getpid()} on ' in stderr[0] and copied in stderr[0]
    lock.close()
    run_here(copied, STEPS + 1)


def test_what_differs_is_listed_all_of_it(tmp_path, small_config):
    config = small_config(model_dir=str(tmp_path))
    store_config(config, tmp_path / 'config.json')
    other = {**config, 'weight_decay': 0.5, 'batch_norms': 'synchronized', 'num_output_steps': 7,
             'num_checkpoint_steps': 9, 'max_num_training_steps': 3, 'eval_batch_size': 8}
    with pytest.raises(UserError) as error:
        train.check_same_run(other, tmp_path / 'config.json')
    assert 'weight_decay (was 0.0002, is 0.5)' in str(error.value)
    assert 'batch_norms (was per_replica, is synchronized)' in str(error.value)
    assert not any(key in str(error.value) for key in ('_steps', 'eval'))


def test_a_finished_training_is_not_stored_as_a_shorter_one(copied):
    with open(f'{copied}/config.json', encoding='utf-8') as f:
        before = f.read()
    status, _, stderr = run(copied, steps=STEPS - 10)
    assert status == 2
    assert stderr == [f'train.py: {copied} holds a training of 30 steps, and '
                      'max_num_training_steps is 20; expected 30 or more, or another model_dir']
    with open(f'{copied}/config.json', encoding='utf-8') as f:
        assert f.read() == before


def test_a_checkpoint_knows_its_training_without_config_json(copied):
    os.remove(f'{copied}/config.json')
    status, _, stderr = run(copied, 'epsilon=4', 'momentum=0.8')
    assert status == 2 and stderr == [
        f'train.py: {copied} holds another training: momentum (was 0.9, is 0.8), epsilon (was 8.0, '
        'is 4.0); expected another model_dir']
    assert not os.path.exists(f'{copied}/config.json')
    run_here(copied, STEPS + 1)
    assert os.path.exists(f'{copied}/config.json')


def origin_of(folder, **changes):
    """Returns the origin of the training in a folder, or of one with other keys, and its data."""
    config = {**load_config(f'{folder}/config.json'), **changes}
    data = load_data(config)
    return config, data, train.make_origin(config, data)


def test_other_images_are_refused(copied):
    config, data, origin = origin_of(copied)
    prefix = f'{copied}/checkpoint-30'
    train.check_same_origin(config, prefix, origin)
    data.train_data.xs[123, 4, 5, 0] ^= 1
    with pytest.raises(UserError, match=f'^{prefix} was trained on other images or labels than '
                       'data_path cifar10_data holds; expected the same, or another model_dir$'):
        train.check_same_origin(config, prefix, train.make_origin(config, data))


def test_a_checkpoint_of_an_older_version_resumes_as_before(copied, whole, capsys):
    """It has no record of its training. The next checkpoint has one."""
    for step in (25, 30):
        os.remove(f'{copied}/checkpoint-{step}.index')
    prefix = f'{copied}/checkpoint-20'
    rewrite(prefix, {train.TRAINING: None, train.IMAGES: None})
    run_here(copied)
    assert kills.resumed_from(capsys.readouterr().out) == 20
    assert kills.differences(copied, whole, STEPS) == []


def rewrite(prefix, changes):
    """Rewrites a checkpoint with some tensors changed, or left out: None."""
    folder, _, step = prefix.rpartition('/checkpoint-')
    tensors = {name: v for name, v in {**kills.weights(folder, step), **changes}.items()
               if v is not None}
    tf.raw_ops.SaveV2(prefix=prefix, tensor_names=list(tensors), tensors=list(tensors.values()),
                      shape_and_slices=[''] * len(tensors))


@pytest.mark.parametrize('name, value', [
    ('training_config', b''), ('training_config', b'[1]'), ('training_config', b'{"epsilon": -1}'),
    ('training_config', b'\xff'), ('training_config', b'[' * 100_000),
    ('training_config', b'{"a\\nb": 1}'), ('training_config', 7), ('images_sha256', b''),
    ('images_sha256', 7.)])
def test_a_record_that_no_training_writes_is_refused_in_one_line(copied, name, value):
    config, _, origin = origin_of(copied)
    if isinstance(value, bytes):
        value = np.frombuffer(value, np.uint8)
    prefix = f'{copied}/checkpoint-30'
    rewrite(prefix, {name: value})
    with pytest.raises(UserError) as error:
        train.check_same_origin(config, prefix, origin)
    assert '\n' not in str(error.value) and prefix in str(error.value)


def test_readers_that_know_no_records_ignore_them(copied):
    """Our own loader, without an optimizer, and TensorFlow 1's Saver, which asks by name."""
    assert Model(1, 1).load_madry_checkpoint(f'{copied}/checkpoint-30') == 30
    with tf.Graph().as_default(), tf.compat.v1.Session() as session:
        biases = tf.compat.v1.get_variable('logit/biases', [10])
        tf.compat.v1.train.Saver().restore(session, f'{copied}/checkpoint-30')
        assert np.isfinite(session.run(biases)).all()


@pytest.mark.parametrize('limit', [20_000, 300_000, 640_000])
def test_a_disk_that_is_full_ends_the_run_in_one_line(whole, tmp_path, limit):
    """A limit on the size of files stands in for it: 604 kB make a checkpoint."""
    folder = str(tmp_path / 'model')
    if limit == 20_000:
        shutil.copytree(whole, folder)  # it resumes from 20, and the curves cannot be cut back
        for path in (f'{folder}/checkpoint-{step}.index' for step in (25, 30)):
            os.remove(path)
    if limit == 640_000:
        shutil.copytree(whole, folder)  # it resumes from 30, and the log cannot grow
        with open(f'{folder}/log.jsonl', 'a') as f:
            f.write(json.dumps({'step': 0, 'filler': ' ' * (limit - f.tell() - 30)}) + '\n')
    before = [damage(prefix) for prefix in checkpoints(folder)]
    status, _, stderr = run(
        folder, steps=STEPS + 5, first=lambda: resource.setrlimit(
            resource.RLIMIT_FSIZE, (limit, limit)))
    assert status == 2 and len(stderr) == 1 and folder in stderr[0] and 'too large' in stderr[0]
    assert [damage(prefix) for prefix in checkpoints(folder)] == before == [None] * len(before)
    assert not any('tempstate' in name or name.endswith('.tmp') for name in os.listdir(folder))


def test_a_disk_that_the_curves_filled_is_noticed(tmp_path, monkeypatch):
    resume.refuse_full_disk(str(tmp_path))
    full = os.statvfs_result((4096, 4096, 1000, 5, 0, 1000, 5, 5, 0, 255))
    monkeypatch.setattr(os, 'statvfs', lambda _: full)
    with pytest.raises(OSError, match='No space left') as error:
        resume.refuse_full_disk(str(tmp_path))
    assert error.value.filename == str(tmp_path)


def test_a_reader_that_is_gone_costs_nothing(tmp_path):
    """train.py 2>&1 | tee: Ctrl-C ends tee, too, and first."""
    process = kills.start(kills.command(str(tmp_path), 4000))
    while 'Step 3:' not in process.stdout.readline():
        pass
    process.stdout.close()
    process.stderr.close()
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == STOPPED
    newest = step_of(checkpoints(str(tmp_path))[0])
    assert newest > 3 and kills.log(tmp_path)[-1]['step'] == newest - 1


@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_ends_even_a_long_step_at_once(number):
    """Not one that comes right after the first. The main thread is busy outside of Python."""
    process = subprocess.Popen(
        [sys.executable, '-c', 'from running.resume import stop_on_signals; import zlib\n'
         'stop_on_signals(); print("ready", flush=True); b = bytes(10 ** 9); zlib.compress(b, 9)\n'
         'zlib.compress(b, 9)'], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    while 'ready' not in process.stdout.readline():
        pass
    process.send_signal(number)
    while 'once more to stop at once' not in process.stderr.readline():
        pass
    process.send_signal(number)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(resume.PATIENCE + 0.2)
    process.send_signal(number)
    assert process.wait(2) == 128 + number


def test_a_folder_that_cannot_be_written_ends_the_run_in_one_line(tmp_path):
    (tmp_path / 'file').write_text('')
    status, _, stderr = run(str(tmp_path / 'file' / 'model'))
    assert status == 2 and len(stderr) == 1 and 'Not a directory' in stderr[0]


def test_a_profile_of_ten_steps_is_written(tmp_path):
    arguments = kills.command(str(tmp_path), 12)
    done = subprocess.run([*arguments, '--profile'], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert 'Profile of steps 1 to 10' in done.stdout
    found = [name for _, _, names in os.walk(tmp_path / 'plugins' / 'profile') for name in names]
    assert any(name.endswith('.xplane.pb') for name in found)
    done = subprocess.run([*arguments, '--profile'], capture_output=True, text=True, timeout=300)
    assert done.returncode == 2 and '0 are left' in done.stderr


def test_a_reader_of_the_log_sees_each_report_as_it_was_printed(whole):
    first = kills.log(whole)[0]
    assert {'step', 'accuracy_nat', 'loss', 'xent_clean', 'accuracy_adv', 'learning_rate'} <= set(
        first)
    assert first['step'] == 0 and first['learning_rate'] == pytest.approx(0.1)


def test_damage_never_allocates_what_an_index_claims(tmp_path):
    """An index may claim a tensor of any size; it is held against the file first."""
    with tf.Graph().as_default(), tf.compat.v1.Session() as session:
        variable = tf.compat.v1.get_variable('large', [1000, 1000])
        session.run(variable.initializer)
        tf.compat.v1.train.Saver([variable]).save(session, str(tmp_path / 'checkpoint'),
                                                  global_step=1, write_meta_graph=False)
    os.truncate(tmp_path / 'checkpoint-1.data-00000-of-00001', 10)
    assert damage(str(tmp_path / 'checkpoint-1')) == 'large is larger than the file that holds it'

