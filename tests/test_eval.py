"""The evaluation: intervals, attacks, what is verified before it is counted."""
import json

import numpy as np
import pytest
import tensorflow as tf

from attacks import ATTACKS, make_attack, perturbation_fault
from cifar10_input import CIFAR10Data
from config import UserError
from eval import choice, evaluate, wilson_interval, write_results
from shaping import INFERENCE_MODES


@pytest.fixture
def data():
    rng = np.random.default_rng(3)
    def subset(n):
        return rng.integers(0, 256, (n, 32, 32, 3), np.uint8), rng.integers(0, 10, n)
    return CIFAR10Data(subset(200), subset(60), [str(i) for i in range(10)])


@pytest.mark.parametrize('correct, n, low, high', [
    (0, 10, 0.0, 0.2775), (10, 10, 0.7225, 1.0), (81, 263, 0.2553, 0.3662),
    (512, 1000, 0.4810, 0.5429)])
def test_wilson_intervals_are_those_of_the_literature(correct, n, low, high):
    """81 of 263: Newcombe (1998), Table I, method 3; 0 and 10 of 10: standard tables."""
    assert wilson_interval(correct, n) == pytest.approx((low, high), abs=1e-4)


def test_every_attack_stays_in_its_ball_and_leaves_the_model_alone(small_model, small_config, data):
    config = small_config()
    images, labels = data.eval_data.xs[:50], data.eval_data.ys[:50]
    before = [v.numpy().copy() for v in small_model.variables]
    for name in ATTACKS:
        attack, settings = make_attack(name, small_model, images, labels, config)
        for start, end in ((0, 20), (40, 50)):
            x_adv = attack(start, end).numpy()
            assert x_adv.shape == (end - start, 32, 32, 3)
            assert perturbation_fault(images[start:end], x_adv, settings['epsilon']) is None
            changed = (x_adv != images[start:end]).reshape(end - start, -1).mean(axis=1)
            assert (changed > 0.5).all() == (name != 'clean')  # each sample is attacked
            assert (x_adv == attack(start, end).numpy()).all()  # and always in the same way
    assert settings['norms'] == 'bn'
    assert all((a == b.numpy()).all() for a, b in zip(before, small_model.variables))


def test_the_shaping_attack_changes_one_share_of_a_batch_at_a_time(small_model, small_config, data):
    """3:1 unchanged to attacked: what the samples see of each other is their clean versions."""
    config = small_config(random_start=False)
    images, labels = data.eval_data.xs[:20], data.eval_data.ys[:20]
    attack, _ = make_attack('shaping', small_model, images, labels, config)
    from pgd_attack import LinfPGDAttack
    pgd = LinfPGDAttack(small_model, 8., 2, 2., False, 'xent', update_population_norms=False)
    x_adv = attack(0, 20).numpy()
    for share in range(4):
        tail = np.arange(20) // 5 == share
        expected = pgd.perturb(images, labels, 0, tail).numpy()[tail]
        assert (x_adv[tail] == expected).mean() > 0.99


def test_an_eval_batch_that_does_not_fit_the_shaping_attack_is_named(
        small_model, small_config, data):
    with pytest.raises(UserError, match='eval_batch_size is 18.*20'):
        make_attack('shaping', small_model, data.eval_data.xs, data.eval_data.ys,
                    small_config(eval_batch_size=18))


def test_results_hold_every_cell_and_the_stated_fields(small_model, small_config, data, tmp_path):
    config = small_config()
    before = [v.numpy().copy() for v in small_model.variables]
    results = evaluate(small_model, data, config, ATTACKS, INFERENCE_MODES)
    assert [(r['attack'], r['inference']) for r in results] == [
        (a, m) for a in ATTACKS for m in INFERENCE_MODES]
    for r in results:
        assert r['num_examples'] == 50
        assert r['interval'][0] <= r['accuracy'] <= r['interval'][1]
    assert results[6]['epsilon'] == 8 and results[6]['norms'] == 'pn'
    assert all((a == b.numpy()).all() for a, b in zip(before, small_model.variables))
    write_results(tmp_path / 'results.json', 'checkpoint-7', 7, config, results)
    written = json.loads((tmp_path / 'results.json').read_text())
    assert set(written) == {'checkpoint', 'step', 'config', 'results'}
    assert written['results'][0]['interval'] == list(results[0]['interval'])


def test_accuracy_is_that_of_a_direct_count(small_model, small_config, data):
    results = evaluate(small_model, data, small_config(), ['clean'], ['pn', 'bn'])
    images, labels = data.eval_data.xs[:50], data.eval_data.ys[:50]
    predicted = np.argmax(small_model(images, training=False), 1)
    assert results[0]['accuracy'] == np.mean(predicted == labels)
    by_batch = [np.argmax(small_model(images[s:s + 20], update_population_norms=False), 1)
                for s in (0, 20, 40)]
    assert results[1]['accuracy'] == np.mean(np.concatenate(by_batch) == labels)


@pytest.mark.parametrize('spoil', [lambda x: x + 9, lambda x: x * np.nan, lambda x: x * 0 - 1])
def test_a_batch_that_left_its_ball_is_never_counted(
        small_model, small_config, data, monkeypatch, spoil):
    import eval
    def broken(name, model, images, labels, config):
        return lambda start, end: spoil(tf.cast(images[start:end], tf.float32)), {'epsilon': 8.}
    monkeypatch.setattr(eval, 'make_attack', broken)
    with pytest.raises(RuntimeError, match='pgd, samples 0 to 19'):
        evaluate(small_model, data, small_config(), ['pgd'], ['pn'])


def test_more_examples_than_there_are_is_refused(small_model, small_config, data):
    with pytest.raises(UserError, match='num_eval_examples is 61; at most 60'):
        evaluate(small_model, data, small_config(num_eval_examples=61), ['clean'], ['pn'])


def test_choices():
    assert choice('attack', 'pgd,clean', ATTACKS) == ['clean', 'pgd']
    assert choice('inference', 'all', INFERENCE_MODES) == list(INFERENCE_MODES)
    with pytest.raises(UserError, match="'pgdd'.*fgsm"):
        choice('attack', 'pgdd', ATTACKS)
