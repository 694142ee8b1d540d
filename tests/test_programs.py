"""The programs as a user runs them, end to end on the embedded set, in processes of their own."""
import glob
import json
import os
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
import tensorflow as tf

from running import UserError
from running.untrusted import read_json
from conftest import CHECKPOINT, ROOT
from run_attack import load_examples

SETTINGS = ['dataset=synthetic', 'num_residual_units=1', 'width_factor=1', 'training_batch_size=16',
            'num_steps=2', 'step_size_schedule=[[0, 0.1]]', 'num_output_steps=2',
            'num_summary_steps=3', 'num_checkpoint_steps=2', 'num_eval_examples=150',
            'eval_batch_size=100']


def program(name, *arguments, settings=(), cwd=None):
    """Runs a program; returns (exit status, stdout, the lines on stderr that are ours)."""
    done = subprocess.run(
        [sys.executable, os.path.join(ROOT, name), *arguments,
         *[f'--set={setting}' for setting in settings]],
        cwd=cwd, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=300)
    assert 'Traceback' not in done.stderr, done.stderr
    ours = [line for line in done.stderr.splitlines() if line.startswith(f'{name}: ')]
    return done.returncode, done.stdout, ours


def weights(folder, step):
    reader = tf.train.load_checkpoint(os.path.join(folder, f'checkpoint-{step}'))
    return {name: reader.get_tensor(name) for name in reader.get_variable_to_shape_map()}


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    """(folder of a training of seven steps, what it printed)"""
    folder = str(tmp_path_factory.mktemp('model'))
    status, stdout, stderr = program('train.py', settings=[
        *SETTINGS, 'max_num_training_steps=7', f'model_dir={folder}'])
    assert status == 0, stderr
    return folder, stdout


def test_training_reports_stores_and_keeps_three_checkpoints(trained):
    folder, stdout = trained
    for line in ('Step 0:    (', '    training nat accuracy ', '    training adv accuracy ',
                 'learning rate 0.1', ' examples per second, 0:00:'):
        assert line in stdout
    assert sorted(os.path.basename(path) for path in glob.glob(f'{folder}/checkpoint-*.index')) == [
        f'checkpoint-{step}.index' for step in (4, 6, 7)]
    assert read_json(f'{folder}/config.json')['max_num_training_steps'] == 7
    tags = set()
    for path in glob.glob(f'{folder}/events*'):
        for record in tf.data.TFRecordDataset(path):
            event = tf.compat.v1.Event.FromString(record.numpy())
            tags |= {value.tag for value in event.summary.value}
    assert {'accuracy adv train', 'accuracy adv', 'xent adv train', 'xent adv',
            'images adv train', 'accuracy clean', 'xent clean', 'images clean train'} <= tags


def test_a_training_that_was_stopped_and_started_ends_as_one_that_was_not(trained, tmp_path):
    for steps in (3, 7):
        status, stdout, stderr = program('train.py', settings=[
            *SETTINGS, f'max_num_training_steps={steps}', f'model_dir={tmp_path}'])
        assert status == 0, stderr
    assert f'Resuming from {tmp_path}/checkpoint-3' in stdout
    whole, resumed = weights(trained[0], 7), weights(tmp_path, 7)
    assert set(whole) == set(resumed) and whole['global_step'] == 7
    for name in whole:
        assert (whole[name] == resumed[name]).all(), name


def test_another_configuration_in_the_same_folder_is_refused(trained):
    status, _, stderr = program('train.py', settings=[
        *SETTINGS, 'training_mode=natural', f'model_dir={trained[0]}'])
    assert status != 0 and len(stderr) == 1 and 'training_mode' in stderr[0]


def test_checkpoints_whose_state_file_is_lost_are_not_written_over(trained, tmp_path):
    shutil.copy(os.path.join(trained[0], 'checkpoint-6.index'), tmp_path)
    status, _, stderr = program('train.py', settings=[*SETTINGS, f'model_dir={tmp_path}'])
    assert status != 0 and len(stderr) == 1 and 'holds checkpoints' in stderr[0]
    assert sorted(os.listdir(tmp_path)) == ['checkpoint-6.index', 'lock']


def test_divergence_stops_the_run_and_keeps_the_last_good_checkpoint(tmp_path):
    status, _, stderr = program('train.py', settings=[
        *SETTINGS, 'step_size_schedule=[[0, 0.1], [3, 1e30]]', 'max_num_training_steps=50',
        'num_checkpoint_steps=1', f'model_dir={tmp_path}'])
    assert status != 0 and len(stderr) == 1 and 'NaN or infinite' in stderr[0]
    last = tf.train.latest_checkpoint(str(tmp_path))
    assert os.path.basename(last) in stderr[0]
    step = int(last.rsplit('-', 1)[1])
    assert 0 < step < 10
    assert all(np.isfinite(value).all() for value in weights(tmp_path, step).values())


def test_eval_prints_and_stores_every_cell(trained):
    folder, _ = trained
    settings = ['apgd_num_steps=2', 'eot_draws=2', 'num_attack_examples={"apgd_eot": 20}']
    attacks = ['clean', 'fgsm', 'pgd', 'deepfool', 'shaping', 'adaptive', 'apgd_eot']
    status, stdout, stderr = program('eval.py', '--model_dir', folder, '--attack',
                                     ','.join(attacks), '--num_draws', '2', settings=settings)
    assert status == 0, stderr
    with open(f'{folder}/eval/results.json') as f:
        results = json.load(f)
    assert results['step'] == 7 and results['checkpoint'].endswith('checkpoint-7')
    assert results['config'] == {
        **read_json(f'{folder}/config.json'), 'model_dir': folder, 'apgd_num_steps': 2,
        'eot_draws': 2, 'num_attack_examples': {'apgd_eot': 20}}
    assert len(results['results']) == 27
    for r in results['results']:
        assert r['num_examples'] == (150 if r['attack'] in attacks[:-1] else 20)
        assert f'{100 * r["accuracy"]:.2f} [' in stdout
        assert ('accuracy_all_draws' in r) == (r['inference'] == 'bn_shaping')
    for name in ('bn', 'pn', 'bn_shaping', *attacks, 'worst case', 'worst in ball', 'median L2',
                 'under 2 draws'):
        assert name in stdout


def test_watch_evaluates_each_new_checkpoint_until_it_is_stopped(trained, tmp_path):
    """The folder gets a second checkpoint while eval.py waits; Ctrl-C then ends it quietly."""
    names = ('checkpoint-{}.index', 'checkpoint-{}.data-00000-of-00001')
    for name in names:
        shutil.copy(os.path.join(trained[0], name.format(6)), tmp_path)
    shutil.copy(os.path.join(trained[0], 'config.json'), tmp_path)
    (tmp_path / 'checkpoint-9.index').write_bytes(b'cut short')  # named, and skipped
    process = subprocess.Popen(
        [sys.executable, os.path.join(ROOT, 'eval.py'), '--watch', '--model_dir', str(tmp_path),
         '--attack', 'clean', '--inference', 'pn'], stdout=subprocess.PIPE, text=True,
        stderr=subprocess.PIPE, env={**os.environ, 'PYTHONUNBUFFERED': '1'},
        # a shell's background job, which these tests may be, ignores SIGINT, and so would its child
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    seen = ''
    for step in (6, 7):
        while f'step {step}   ' not in seen or not seen.endswith('Waiting for the next checkpoint'):
            letter = process.stdout.read(1)
            assert letter, process.stderr.read()
            seen += letter
        if step == 6:
            for name in reversed(names):
                shutil.copy(os.path.join(trained[0], name.format(7)), tmp_path)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130 and 'Traceback' not in stderr
    assert 'eval.py: stopped' in stderr and 'checkpoint-9 is damaged and skipped' in stderr


def test_stored_attack_is_scored_as_eval_scores_it(trained, tmp_path):
    folder, _ = trained
    status, _, stderr = program('pgd_attack.py', '--model_dir', folder, cwd=tmp_path)
    assert status == 0, stderr
    x_adv = np.load(tmp_path / 'attack.npy', allow_pickle=False)
    assert x_adv.shape == (150, 32, 32, 3) and x_adv.dtype == np.float32
    status, stdout, stderr = program('run_attack.py', '--model_dir', folder, cwd=tmp_path)
    assert status == 0, stderr
    pred = np.load(tmp_path / 'pred.npy', allow_pickle=False)
    assert pred.shape == (150,) and pred.dtype == np.int64
    program('eval.py', '--model_dir', folder, '--attack', 'pgd', '--inference', 'pn')
    with open(f'{folder}/eval/results.json') as f:
        accuracy = json.load(f)['results'][0]['accuracy']
    assert f'Accuracy: {100 * accuracy:.2f}%' in stdout
    status, stdout, _ = program('run_attack.py', '--model_dir', folder,
                                '--inference', 'bn_shaping', cwd=tmp_path)
    assert status == 0 and 'bn_shaping' in stdout


@pytest.mark.parametrize('name, setting, named', [
    ('pgd_attack.py', 'store_adv_path=nowhere/attack.npy', 'store_adv_path is nowhere'),
    ('train.py', 'num_eval_examples=2001', 'num_eval_examples is 2001')])
def test_what_would_fail_after_hours_is_told_at_once(tmp_path, name, setting, named):
    status, _, stderr = program(name, settings=['dataset=synthetic', setting], cwd=tmp_path)
    assert status != 0 and len(stderr) == 1 and named in stderr[0]
    assert os.listdir(tmp_path) == []


def test_eval_takes_the_originals_checkpoints(tmp_path):
    status, stdout, stderr = program('eval.py', '--checkpoint', CHECKPOINT, '--attack', 'clean',
                                     '--inference', 'pn', settings=[
        'dataset=synthetic', 'width_factor=1', 'num_eval_examples=100', f'model_dir={tmp_path}'])
    assert status == 0, stderr
    assert 'step 250' in stdout


@pytest.mark.parametrize('arguments, named', [
    (['--model_dir', 'nowhere'], 'nowhere/config.json'),
    (['--set=model_dir=nowhere', '--set=dataset=synthetic', '--set=num_eval_examples=9'],
     'model_dir nowhere holds no checkpoint'),
    (['--attack', 'pgdd'], 'pgdd'),
    (['--set=dataset=synthetic'], 'num_eval_examples')])
def test_evals_mistakes_are_told_in_one_line(tmp_path, arguments, named):
    status, _, stderr = program('eval.py', *arguments, cwd=tmp_path)
    assert status != 0 and len(stderr) == 1 and named in stderr[0]
    assert not os.path.exists(tmp_path / 'nowhere')  # a mistake leaves nothing behind


@pytest.mark.parametrize('spoil, named', [
    (lambda x: x[:5], r'shape \[5, 32, 32, 3\]; expected \[10, 32, 32, 3\]'),
    (lambda x: x.astype(np.int32), 'int32'),
    (lambda x: x.astype('S8'), 'S8'),
    (lambda x: x.astype(object), 'not a .npy file of numbers'),
    (lambda x: np.where(np.arange(10)[:, None, None, None] == 3, np.nan, x), 'NaN'),
    (lambda x: np.where(x < 128, x + 9, x), 'epsilon, 8'),
    (lambda x: np.where(x > 250, 256., x), r'\[0, 255\]'),
    (lambda x: (x - 128).astype(np.uint8), 'epsilon')])
def test_a_stored_attack_that_is_not_what_it_must_be_is_named(tmp_path, spoil, named):
    x_nat = np.random.default_rng(0).integers(0, 256, (10, 32, 32, 3)).astype(np.uint8)
    path = str(tmp_path / 'attack.npy')
    np.save(path, spoil(x_nat.astype(np.float64)))
    with pytest.raises(UserError, match=named) as error:
        load_examples(path, x_nat, 8.)
    assert '\n' not in str(error.value) and path in str(error.value)


def test_good_examples_of_each_type_are_taken(tmp_path):
    x_nat = np.random.default_rng(0).integers(0, 248, (10, 32, 32, 3)).astype(np.uint8)
    for dtype in (np.uint8, np.float32, np.float64):
        path = str(tmp_path / 'attack.npy')
        np.save(path, (x_nat + 8).astype(dtype))
        assert (load_examples(path, x_nat, 8.) == x_nat + 8).all()


@pytest.mark.parametrize('contents', [
    b'', b'no numbers', b'\x93NUMPY\x01\x00',
    b"\x93NUMPY\x01\x00\x76\x00{'descr': '<f4', 'fortran_order': False, "
    b"'shape': (1000000000, 32, 32, 3), }" + b' ' * 41 + b'\n' + b'1234'])
def test_a_file_that_is_no_array_or_claims_ten_terabytes_is_refused(tmp_path, contents):
    path = tmp_path / 'attack.npy'
    path.write_bytes(contents)
    with pytest.raises(UserError, match='attack.npy'):
        load_examples(str(path), np.zeros((10, 32, 32, 3), np.uint8), 8.)


def test_a_missing_file_is_named():
    with pytest.raises(UserError, match='nowhere.npy cannot be read: No such file'):
        load_examples('nowhere.npy', np.zeros((10, 32, 32, 3), np.uint8), 8.)
