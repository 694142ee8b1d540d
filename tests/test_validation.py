"""Held-out training images: what is held out, what is logged, which checkpoint is best."""
import json
import os
import re
import shutil

import numpy as np
import pytest
import tensorflow as tf

from attacks import make_attack
from cifar10_input import CIFAR10Data, load_data
from config import load_config
from model import build_model, find_checkpoint
from pgd_attack import LinfPGDAttack
from running import UserError
from running.unfinished import data_digest
from shaping import make_inference
from test_programs import SETTINGS, program, weights
import train

N = 60


def test_the_last_training_images_are_held_out_of_training_and_of_the_clean_samples(
        small_model, small_config):
    rng = np.random.default_rng(0)
    def subset(n):
        return rng.integers(0, 256, (n, 32, 32, 3), np.uint8), rng.integers(0, 10, n)
    sets, names = (subset(200), subset(60)), [str(i) for i in range(10)]
    whole, held = CIFAR10Data(*sets, names), CIFAR10Data(*sets, names, num_validation=N)
    assert (held.train_data.n, held.validation_data.n, whole.validation_data.n) == (140, N, 0)
    assert (held.validation_data.xs == whole.train_data.xs[140:]).all()
    assert (held.train_data.xs == whole.train_data.xs[:140]).all()
    assert data_digest(held) == data_digest(whole)  # they are the same images
    config = small_config(shaping_batch_size=100, num_recordings=2)
    assert make_inference(small_model, 'bn_shaping', held, config).num_images == 140
    with pytest.raises(UserError, match='num_validation_examples is 200; expected less than 200'):
        CIFAR10Data(*sets, names, num_validation=200)


def test_they_are_the_last_of_the_classes_that_are_kept():
    config = load_config(None, ['dataset=synthetic', 'classes=["class_1", "class_7"]',
                                f'num_validation_examples={N}'])
    held, whole = load_data(config), load_data({**config, 'num_validation_examples': 0})
    assert (held.validation_data.xs == whole.train_data.xs[-N:]).all()
    assert set(held.validation_data.ys) == {0, 1}


SETTINGS_HELD = [*(s for s in SETTINGS if not s.startswith('step_size_schedule')),
                 'step_size_schedule=[[0, 0.02]]', f'num_validation_examples={N}',
                 'attack_norms=fixed', 'max_num_training_steps=7']


@pytest.fixture(scope='module')
def held(tmp_path_factory):
    """(folder of a training of seven steps with a checkpoint every second, what it printed)"""
    folder = str(tmp_path_factory.mktemp('held') / 'whole')
    status, stdout, stderr = program('train.py', settings=[*SETTINGS_HELD, f'model_dir={folder}'])
    assert status == 0, stderr
    return folder, stdout


def validations(folder):
    with open(f'{folder}/log.jsonl') as f:
        return [line for line in map(json.loads, f) if 'validation_accuracy' in line]


def test_every_checkpoint_is_validated_and_the_best_is_kept(held):
    folder, stdout = held
    lines = validations(folder)
    assert [line['checkpoint'] for line in lines] == [2, 4, 6, 7]
    best = max(lines, key=lambda line: (line['validation_accuracy_adv'], -line['checkpoint']))
    assert lines[-1]['best_checkpoint'] == best['checkpoint']
    assert int(weights(folder, 'best')['global_step']) == best['checkpoint']
    assert stdout.count('validation nat accuracy') == 4
    if best['checkpoint'] > 2:  # not the one that is gone
        ours, theirs = weights(folder, 'best'), weights(folder, best['checkpoint'])
        assert all((ours[name] == theirs[name]).all() for name in theirs)
    assert sorted(re.findall(r'checkpoint-(\d+)\.index', ' '.join(os.listdir(folder)))) == [
        '4', '6', '7']


def test_the_accuracies_are_those_of_pgd_by_population_norms(held):
    folder, _ = held
    config = load_config(f'{folder}/config.json')
    data = load_data(config)
    model = build_model(config, 10)
    model.load_madry_checkpoint(f'{folder}/checkpoint-7')
    x, y = data.validation_data.xs, data.validation_data.ys
    attack = LinfPGDAttack.from_config(model, config, training=False)
    x_adv = attack.perturb(x, y, (config['np_random_seed'], 0))
    natural, adv = (np.mean(np.argmax(model(tf.cast(images, tf.float32), training=False), 1) == y)
                    for images in (x, x_adv))
    line = validations(folder)[-1]
    assert line['validation_accuracy'] == natural and line['validation_accuracy_adv'] == adv


@pytest.mark.parametrize('stop, copied', [(4, True), (2, False)])
def test_a_training_that_is_killed_keeps_the_same_best(held, tmp_path, stop, copied):
    """At step 2 the best is that very step's: a kill may have come before the copy was made."""
    folder, _ = held
    killed = str(tmp_path / 'killed')
    config = load_config(None, [*SETTINGS_HELD, f'model_dir={killed}'])
    train.train({**config, 'max_num_training_steps': stop})
    if not copied:
        os.remove(f'{killed}/checkpoint-best.index')
    train.train(config)
    assert validations(killed) == validations(folder)
    for step in ('best', 7):
        ours, theirs = weights(killed, step), weights(folder, step)
        assert all((ours[name] == theirs[name]).all() for name in theirs)
    assert not [name for name in os.listdir(killed) if 'tmp' in name]


def test_the_first_of_equals_is_best_and_natural_training_counts_natural_accuracy(
        small_model, small_config, data, monkeypatch):
    data.validation_data = data.eval_data
    for mode, best in (('adv_only', [2, 2, 2, 8]), ('natural', [2, 2, 6, 6])):
        validation = train.Validation(small_model, data, small_config(
            training_mode=mode, eval_batch_size=60))
        monkeypatch.setattr(validation.attack, 'perturb', lambda x, *_: tf.cast(x, tf.float32))
        counts = iter([10, 5, 8, 5, 12, 4, 3, 6])  # right: natural, attacked; natural, ...
        monkeypatch.setattr(validation, '_right', lambda *_, counts=counts: next(counts))
        assert [validation.measure(step)['best_checkpoint'] for step in (2, 4, 6, 8)] == best


def test_without_held_out_images_nothing_is_validated(small_model, small_config, data):
    validation = train.Validation(small_model, data, small_config())
    assert validation.n == 0 and validation.variables == {} and validation.best_step == -1


def test_the_programs_take_the_best_on_request(held, tmp_path):
    folder, best = str(tmp_path / 'copy'), 4  # which the last one cannot stand in for
    shutil.copytree(held[0], folder)
    for end in ('index', 'data-00000-of-00001'):
        shutil.copy(f'{folder}/checkpoint-{best}.{end}', f'{folder}/checkpoint-best.{end}')

    def said(name, *options):
        status, stdout, stderr = program(name, '--model_dir', folder, '--select', 'best', *options,
                                         settings=['num_eval_examples=20'], cwd=tmp_path)
        assert status == 0, stderr
        return stdout
    assert f'checkpoint-best, step {best} ' in said('eval.py', '--attack', 'clean', '--inference',
                                                    'pn')
    said('pgd_attack.py')
    assert 'checkpoint-best, pn' in said('run_attack.py')
    config = {**load_config(f'{folder}/config.json'), 'num_eval_examples': 20}
    data = load_data(config)
    model = build_model(config, 10)
    model.load_madry_checkpoint(f'{folder}/checkpoint-best')
    attack, _ = make_attack('pgd', model, data, config)
    assert (np.load(tmp_path / 'attack.npy') == attack(0, 20).numpy()).mean() > 0.99
    assert f'checkpoint-best, step {best}: written' in said('export.py', '--output', 'exported')
    assert find_checkpoint(load_config(f'{folder}/config.json')).endswith('checkpoint-7')


@pytest.mark.parametrize('options, said', [
    (['--select', 'best', '--checkpoint', 'x'], 'and --select best each name a checkpoint'),
    (['--select', 'best', '--watch'], '--checkpoint and --select best name one'),
    (['--select', 'first'], "--select must be one of best, last, got 'first'"),
    (['--check', '--inference', 'bn_shaping'], '--check runs direct attacks by gradients again, '
     'and --attack clean,pgd --inference bn_shaping has none')])
def test_what_cannot_be_selected_or_checked_is_one_line(held, options, said):
    status, stdout, stderr = program('eval.py', '--model_dir', held[0], *options)
    assert (status, stdout) == (2, '') and len(stderr) == 1 and said in stderr[0]


def test_a_best_checkpoint_that_is_missing_or_damaged_is_named(held, tmp_path):
    folder = str(tmp_path / 'copy')
    shutil.copytree(held[0], folder)
    config = {**load_config(f'{folder}/config.json'), 'model_dir': folder}
    path = f'{folder}/checkpoint-best.data-00000-of-00001'
    with open(path, 'r+b') as f:
        f.seek(-40, 2)
        f.write(b'\xff' * 20)
    with pytest.raises(UserError, match='checkpoint-best is damaged.*expected --select last'):
        find_checkpoint(config, None, 'best')
    os.remove(f'{folder}/checkpoint-best.index')
    with pytest.raises(UserError, match='holds no checkpoint-best; a training with num_valid'):
        find_checkpoint(config, None, 'best')
