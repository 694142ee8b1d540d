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
from config import INFERENCE_MODES
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
        cwd=cwd, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=900)
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
    settings = ['num_recordings=5', 'recorded_samples=20', 'num_eval_examples=40',
                'eval_batch_size=20', 'shaping_batch_size=20',
                'num_attack_examples={"deepfool": 10}']
    attacks = ['clean', 'pgd', 'shaping', 'adaptive_pgd', 'deepfool']
    status, stdout, stderr = program('eval.py', '--model_dir', folder, '--attack',
                                     ','.join(attacks), '--num_draws', '2', settings=settings)
    assert status == 0, stderr
    with open(f'{folder}/eval/results.json') as f:
        results = json.load(f)
    assert results['step'] == 7 and results['checkpoint'].endswith('checkpoint-7')
    assert results['config'] == {
        **read_json(f'{folder}/config.json'), 'model_dir': folder, 'num_recordings': 5,
        'recorded_samples': 20, 'num_eval_examples': 40, 'eval_batch_size': 20,
        'shaping_batch_size': 20, 'num_attack_examples': {'deepfool': 10}}
    worst = ['worst in ball', 'worst in ball, direct', 'worst in ball, transferred',
             'worst in ball, slow too', 'worst case']
    assert len(results['results']) == (len(attacks) + len(worst)) * len(INFERENCE_MODES)
    assert results['architecture'] == 'w8-1' and results['eps'] == '8/255'
    for r in results['results']:
        assert r['num_examples'] == (40 if r['attack'] in attacks[:-1] + worst[:3] else 10)
        assert f'{100 * r["accuracy"]:.2f} [' in stdout
        assert ('accuracy_all_draws' in r) == (r['inference'] in ('bn_shaping', 'bn_recorded'))
    for name in (*INFERENCE_MODES, *attacks, *worst, 'median L2', 'Under 2 draws',
                 'Flag, random answer: '):
        assert name in stdout


def test_watch_evaluates_every_checkpoint_in_order_and_ends_with_the_last(trained, tmp_path):
    """4 is there when it starts, 6 and 7 come together while it waits; 7 is the training's last."""
    def put(*steps):
        for step in steps:
            for name in ('checkpoint-{}.data-00000-of-00001', 'checkpoint-{}.index'):
                shutil.copy(os.path.join(trained[0], name.format(step)), tmp_path / 'new')
                os.rename(tmp_path / 'new', tmp_path / name.format(step))
    put(4)
    shutil.copy(os.path.join(trained[0], 'config.json'), tmp_path)
    (tmp_path / 'checkpoint-9.index').write_bytes(b'cut short')  # named, and skipped
    process = subprocess.Popen(
        [sys.executable, os.path.join(ROOT, 'eval.py'), '--watch', '--model_dir', str(tmp_path),
         '--attack', 'clean', '--inference', 'pn'], stdout=subprocess.PIPE, text=True,
        stderr=subprocess.PIPE, env={**os.environ, 'PYTHONUNBUFFERED': '1'})
    for line in process.stdout:
        if line.startswith('Waiting for'):
            break
    assert line == (f'Waiting for the next checkpoint in {tmp_path}, after step 4, until step 7\n')
    put(7, 6)
    stdout, stderr = process.communicate(timeout=100)
    assert process.returncode == 0, stderr
    assert [line.split()[1] for line in stdout.splitlines() if line.startswith('Checkpoint')] == [
        f'{tmp_path}/checkpoint-{step},' for step in (6, 7)]
    assert stdout.endswith('Step 7 is the last of this training\n')
    assert stderr.count('checkpoint-9 is damaged and skipped') == 1
    assert 'retracing' not in stderr
    rows = read_json(tmp_path / 'eval' / 'results.json')['results']
    assert [row['step'] for row in rows] == [4, 6, 7]


def test_watch_is_stopped_quietly(tmp_path):
    process = subprocess.Popen(
        [sys.executable, os.path.join(ROOT, 'eval.py'), '--watch', '--set=dataset=synthetic',
         '--set=num_eval_examples=100', '--set=width_factor=1', f'--set=model_dir={tmp_path}/a'],
        stdout=subprocess.PIPE, text=True, stderr=subprocess.PIPE,
        env={**os.environ, 'PYTHONUNBUFFERED': '1'},
        # a shell's background job, which these tests may be, ignores SIGINT, and so would its child
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    assert process.stdout.readline() == (f'Waiting for the first checkpoint in {tmp_path}/a, until '
                                         'its config.json says which step is the last\n')
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130 and 'Traceback' not in stderr
    assert 'eval.py: stopped' in stderr and os.listdir(tmp_path) == []


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
    program('eval.py', '--model_dir', folder, '--attack', 'pgd', '--inference', 'pn,bn_shaping')
    with open(f'{folder}/eval/results.json') as f:
        found = {r['inference']: r['accuracy'] for r in json.load(f)['results']
                 if r['attack'] == 'pgd' and r['num_examples'] == 150}
    assert f'Accuracy: {100 * found["pn"]:.2f}%' in stdout
    status, stdout, _ = program('run_attack.py', '--model_dir', folder,
                                '--inference', 'bn_shaping', cwd=tmp_path)
    assert status == 0 and f'Accuracy: {100 * found["bn_shaping"]:.2f}%' in stdout
    assert found['pn'] != found['bn_shaping']


@pytest.mark.parametrize('name, setting, named', [
    ('pgd_attack.py', 'store_adv_path=nowhere/attack.npy', 'store_adv_path is nowhere'),
    ('train.py', 'num_eval_examples=2001', 'num_eval_examples is 2001')])
def test_what_would_fail_after_hours_is_told_at_once(tmp_path, name, setting, named):
    status, _, stderr = program(name, settings=['dataset=synthetic', setting], cwd=tmp_path)
    assert status != 0 and len(stderr) == 1 and named in stderr[0]
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize('arguments, named', [
    ([], 'model_dir models/a_very_robust_model holds no checkpoint'),  # nor downloads anything
    (['--set=model_dir=nowhere', '--set=dataset=synthetic', '--set=num_eval_examples=9'],
     'model_dir nowhere holds no checkpoint'),
    (['--checkpoint', CHECKPOINT, '--set=dataset=synthetic', '--set=width_factor=1'],
     'num_eval_examples'),
    (['--checkpoint', CHECKPOINT, '--set=dataset=synthetic', '--set=num_eval_examples=9',
      '--set=width_factor=2'], '--model_dir DIR takes the configuration'),
    (['--num_draws', '10', '--inference', 'pn,bn'], '--num_draws is 10, but --inference bn,pn'),
    (['--compare', '--attack', 'pgd'], '--attack'),
    (['pgd'], "'pgd' is not an option"),
    (['--pictures', 'samples.gif'], 'expected the path of a .png file'),
    (['--output', 'file/results.json'], 'file/results.json cannot be written: Not a directory'),
    (['--set=model_dir=file'], 'file/eval/results.json cannot be written: Not a directory')])
def test_evals_mistakes_are_told_in_one_line(tmp_path, arguments, named):
    (tmp_path / 'file').touch()
    status, _, stderr = program('eval.py', *arguments, cwd=tmp_path)
    assert status != 0 and len(stderr) == 1 and named in stderr[0]
    assert os.listdir(tmp_path) == ['file']  # a mistake leaves nothing behind


def test_a_model_in_a_folder_that_cannot_be_written_is_evaluated_with_output(trained, tmp_path):
    folder, _ = trained
    shutil.copytree(folder, tmp_path / 'model', ignore=shutil.ignore_patterns('eval'))
    (tmp_path / 'model' / 'eval').touch()  # in the way, also of root
    before = sorted(os.listdir(tmp_path / 'model'))
    arguments = ['--model_dir', str(tmp_path / 'model'), '--attack', 'clean', '--inference', 'pn']
    status, stdout, stderr = program('eval.py', *arguments)
    assert status == 2 and len(stderr) == 1 and stdout == ''
    assert 'eval/results.json cannot be written' in stderr[0] and '--output PATH' in stderr[0]
    output = tmp_path / 'new' / 'results.json'
    status, _, stderr = program('eval.py', *arguments, '--output', str(output))
    assert status == 0, stderr
    assert len(read_json(output)['results']) == 1 and os.listdir(tmp_path / 'new') == [output.name]
    assert sorted(os.listdir(tmp_path / 'model')) == before


def test_two_results_side_by_side(trained, tmp_path):
    """eval.py --compare, with results of two settings of one training."""
    folder, _ = trained
    for steps in (1, 2):
        status, _, stderr = program(
            'eval.py', '--model_dir', folder, '--attack', 'pgd', '--inference', 'pn', '--output',
            str(tmp_path / f'{steps}.json'), '--pictures', str(tmp_path / 'samples.png'),
            settings=[f'num_steps={steps}', 'num_eval_examples=20', 'fgsm_epsilon=4'])
        assert status == 0 and (tmp_path / 'samples.png').read_bytes()[:4] == b'\x89PNG'
        assert stderr == []  # what has no effect is told, but is no error
    status, stdout, stderr = program('eval.py', '--compare', str(tmp_path / '1.json'),
                                     str(tmp_path / '2.json'))
    assert status == 0, stderr
    assert [line.split()[:3] for line in stdout.splitlines() if line.startswith('pgd')] == [
        ['pgd,', 'pn,', 'num_steps=1'], ['pgd,', 'pn,', 'num_steps=2']]


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
