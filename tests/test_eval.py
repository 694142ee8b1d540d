"""The evaluation: intervals, attacks, what is verified before it is counted."""
import numpy as np
import pytest
import tensorflow as tf

from pgd_attack import perturbation_fault
from attacks import ATTACKS, DIRECT, hopskipjump, make_attack
from running import UserError
from config import choice
from eval import evaluate, wilson_interval
from paper.intervals import paired_difference
from report import print_table
from shaping import INFERENCE_MODES


@pytest.mark.parametrize('correct, n, low, high', [
    (0, 10, 0.0, 0.2775), (10, 10, 0.7225, 1.0), (81, 263, 0.2553, 0.3662),
    (512, 1000, 0.4810, 0.5429)])
def test_wilson_intervals_are_those_of_the_literature(correct, n, low, high):
    """81 of 263: Newcombe (1998), Table I, method 3; 0 and 10 of 10: standard tables."""
    assert wilson_interval(correct, n) == pytest.approx((low, high), abs=1e-4)


def test_paired_differences_cover_the_truth_and_use_the_pairs():
    """Of 2,000 draws of 200 pairs, the 95% interval holds the true difference in 93 to 98%."""
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(2000):
        kind = rng.choice(4, 200, p=[0.5, 0.12, 0.06, 0.32])  # both right, a, b, none
        value, (low, high) = paired_difference(kind <= 1, (kind == 0) | (kind == 2))
        assert low < value < high
        covered += low <= 0.06 <= high
    assert 0.93 <= covered / 2000 <= 0.98
    a = np.arange(1000) < 600
    value, (low, high) = paired_difference(a, np.roll(a, 5))  # agree but for five and five
    assert value == 0 and high - low < 0.02
    assert paired_difference(a, ~a)[1] == pytest.approx([0.139, 0.260], abs=2e-3)


def test_every_attack_stays_in_its_ball_and_leaves_the_model_alone(small_model, small_config, data):
    config = small_config()
    images = data.eval_data.xs
    before = [v.numpy().copy() for v in small_model.variables]
    for name in ATTACKS:
        if name in ('cw', 'hopskipjump'):
            continue  # a thousand iterations five times over, 25,000 queries: see test_attacks.py
        attack, settings = make_attack(name, small_model, data, config)
        for start, end in ((0, 20), (40, 50)):
            x_adv = np.asarray(attack(start, end))
            assert x_adv.shape == (end - start, 32, 32, 3)
            assert perturbation_fault(images[start:end], x_adv, settings['epsilon']) is None
            changed = (x_adv != images[start:end]).reshape(end - start, -1).mean(axis=1)
            if name in ('apgd', 'adaptive'):  # they leave what is answered wrongly as it is
                assert 0 < (changed > 0.5).sum() < end - start
                continue
            assert (changed > 0.5).all() == (name not in ('clean', 'deepfool'))  # each is attacked
            assert (x_adv == np.asarray(attack(start, end))).all()  # and always in the same way
        assert settings.get('norms') == {
            'clean': None, 'shaping': 'bn', **dict.fromkeys(DIRECT, 'bn_shaping')}.get(name, 'pn')
    assert all((a == b.numpy()).all() for a, b in zip(before, small_model.variables))


def test_the_shaping_attack_changes_one_share_of_a_batch_at_a_time(small_model, small_config, data):
    """3:1 unchanged to attacked: what the samples see of each other is their clean versions."""
    config = small_config(random_start=False)
    images, labels = data.eval_data.xs[:20], data.eval_data.ys[:20]
    attack, _ = make_attack('shaping', small_model, data, {**config, 'num_eval_examples': 20})
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
        make_attack('shaping', small_model, data, small_config(eval_batch_size=18))


def test_results_hold_every_cell_and_the_stated_fields(small_model, small_config, data):
    few = dict.fromkeys([*DIRECT, 'random', 'apgd'], 20)
    config = small_config(num_attack_examples={**few, 'pgd': 1000}, num_recordings=5,
                          apgd_num_steps=2, eot_draws=1, square_queries=3)
    before = [v.numpy().copy() for v in small_model.variables]
    attacks = [name for name in ATTACKS if name not in ('cw', 'hopskipjump')]
    results = evaluate(small_model, data, config, attacks, INFERENCE_MODES)
    assert [(r['attack'], r['inference']) for r in results] == [
        (a, m) for a in [*attacks, 'worst case', 'worst in ball'] for m in INFERENCE_MODES]
    cells = {(r['attack'], r['inference']): r for r in results}
    for r in results:
        on_few = r['attack'] in (*few, 'worst case', 'worst in ball')
        assert r['num_examples'] == (20 if on_few else 50)
        assert r['interval'][0] <= r['accuracy'] <= r['interval'][1]
    assert cells['pgd', 'pn']['epsilon'] == 8 and cells['pgd', 'pn']['norms'] == 'pn'
    assert cells['deepfool', 'bn']['num_fooled'] > 0 and cells['deepfool', 'bn']['median_l2'] > 0
    assert cells['adaptive', 'bn_shaping']['shaping_batch_size'] == 100
    assert cells['pgd', 'bn_recorded']['num_recordings'] == 5
    for mode in INFERENCE_MODES:  # each is judged by the norms that it goes through
        for attack in set(DIRECT) & set(attacks):
            assert cells[attack, mode]['norms'] == mode
        settings = cells['worst in ball', mode]['attack_settings']
        assert settings['adaptive']['norms'] == mode and settings['pgd']['norms'] == 'pn'
    assert all((a == b.numpy()).all() for a, b in zip(before, small_model.variables))


def test_an_attack_is_skipped_where_images_share_norms_and_run_elsewhere(
        small_model, small_config, data, monkeypatch, capsys):
    monkeypatch.setitem(hopskipjump.SETTINGS, 'num_steps', 1)
    config, attacks = small_config(num_eval_examples=10, num_recordings=3), ['clean', 'hopskipjump']
    results = evaluate(small_model, data, config, attacks, INFERENCE_MODES)
    told = capsys.readouterr().err.splitlines()
    for mode, line in zip(('bn', 'bn_shaping'), told, strict=True):
        assert line.startswith(f'hopskipjump through {mode} is skipped: ')
    cells = {(r['attack'], r['inference']): r for r in results}
    made = {mode for attack, mode in cells if attack == 'hopskipjump'}
    assert made == {'pn', 'bn_recorded'}
    assert cells['worst case', 'bn']['attacks'] == ['clean']
    assert cells['worst case', 'pn']['attacks'] == attacks
    assert cells['hopskipjump', 'pn']['num_queries'] > 100
    print_table(results, INFERENCE_MODES)
    shown = capsys.readouterr().out
    row, = (line for line in shown.splitlines() if line.startswith('hopskipjump '))
    assert row[22:46].strip() == row[70:94].strip() == '-' and ' [' in row[46:70]
    with pytest.raises(UserError, match='hopskipjump through bn is skipped: .* expected pn'):
        evaluate(small_model, data, config, ['hopskipjump'], ['bn'])


@pytest.fixture
def judged(monkeypatch, data, small_config):
    """f(...) -> evaluate's cells, where attacks and inference are played by tables.

    A stub attack marks its examples by one pixel, more or less than epsilon; the stub inference
    looks up whether a sample is right under that attack and draw.
    """
    import eval
    def play(right, num_draws=1, **settings):  # {(attack, step): {draw: [right or wrong]}}
        names = [name for name, _ in right]
        config = small_config(num_eval_examples=6, eval_batch_size=4, **settings)
        labels = data.eval_data.ys[:6]
        def make_attack(name, model, data, config, num_draws, inference):
            size = dict(list(right))[name]
            def attack(start, end):
                x_adv = np.full((end - start, 32, 32, 3), 100, np.float32)
                x_adv[:, 0, 0, 0] += size
                x_adv[:, 0, 0, 1] = names.index(name)
                x_adv[:, 0, 0, 2] = np.arange(start, end)
                return x_adv
            return attack, {'epsilon': None}
        def make_inference(model, mode, data, config):
            def classify(x, query):
                name, draw = names[int(x[0, 0, 0, 1])], query // 10 ** 6
                table = right[name, dict(list(right))[name]]
                chosen = x[:, 0, 0, 2].astype(int)
                ok = np.array(table[draw % len(table)])[chosen]
                return tf.one_hot(np.where(ok, labels[chosen], (labels[chosen] + 1) % 10), 10)
            return classify
        monkeypatch.setattr(eval, 'make_attack', make_attack)
        monkeypatch.setattr(eval, 'make_inference', make_inference)
        data.eval_data.xs[:] = 100
        data.eval_data.xs[:, 0, 0, 1:] = np.stack([np.zeros(60), np.arange(60)], 1)
        results = evaluate(None, data, config, names, ['pn', 'bn_shaping'], num_draws)
        return {(r['attack'], r['inference']): r for r in results}
    return play


def test_the_worst_case_counts_who_survives_everything(judged):
    cells = judged({('pgd', 5): [[1, 1, 1, 0, 1, 1]], ('fgsm', 16): [[0, 1, 1, 0, 1, 0]],
                    ('shaping', 8): [[1, 0, 1, 1, 1, 1]]})
    assert cells['pgd', 'pn']['accuracy'] == pytest.approx(5 / 6)
    assert cells['worst case', 'pn']['accuracy'] == pytest.approx(2 / 6)
    assert cells['worst in ball', 'pn']['accuracy'] == pytest.approx(4 / 6)  # not FGSM at 16
    assert cells['worst case', 'pn']['attacks'] == ['pgd', 'fgsm', 'shaping']


def test_attacks_run_on_fewer_examples_bound_the_worst_case(judged):
    cells = judged({('pgd', 5): [[1, 1, 0, 0, 0, 0]], ('cw', 1): [[1, 0, 1, 1, 1, 1]]},
                   num_attack_examples={'cw': 3})
    assert cells['cw', 'pn']['num_examples'] == 3
    assert cells['cw', 'pn']['accuracy'] == pytest.approx(2 / 3)
    assert cells['worst case', 'pn']['num_examples'] == 3
    assert cells['worst case', 'pn']['accuracy'] == pytest.approx(1 / 3)


def test_draws_give_mean_spread_and_what_is_right_under_all(judged):
    cells = judged({('pgd', 5): [[1, 1, 1, 0, 1, 1], [1, 1, 0, 0, 0, 0], [1, 0, 1, 0, 0, 0]],
                    ('shaping', 5): [[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1], [0, 1, 1, 1, 1, 1]]},
                   num_draws=3)
    r = cells['pgd', 'bn_shaping']
    assert r['accuracy'] == pytest.approx(np.mean([5, 2, 2]) / 6)
    assert r['spread'] == pytest.approx(np.std([5 / 6, 2 / 6, 2 / 6], ddof=1))
    assert r['range'] == pytest.approx([2 / 6, 5 / 6]) and r['num_draws'] == 3
    assert r['accuracy_all_draws'] == pytest.approx(1 / 6)
    assert cells['worst case', 'bn_shaping']['accuracy'] == pytest.approx(np.mean([5, 2, 1]) / 6)
    assert cells['worst case', 'bn_shaping']['accuracy_all_draws'] == 0
    assert 'num_draws' not in cells['pgd', 'pn']  # one answer: nothing is drawn


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
    def broken(name, model, data, config, num_draws, inference):
        return lambda start, end: spoil(
            tf.cast(data.eval_data.xs[start:end], tf.float32)), {'epsilon': 8.}
    monkeypatch.setattr(eval, 'make_attack', broken)
    with pytest.raises(RuntimeError, match='pgd, samples 0 to 19'):
        evaluate(small_model, data, small_config(), ['pgd'], ['pn'])


def test_more_examples_than_there_are_is_refused(small_model, small_config, data):
    with pytest.raises(UserError, match='num_eval_examples is 61; expected at most 60'):
        evaluate(small_model, data, small_config(num_eval_examples=61), ['clean'], ['pn'])


def test_choices():
    assert choice('attack', 'pgd,clean', ATTACKS) == ['clean', 'pgd']
    assert choice('inference', 'all', INFERENCE_MODES) == list(INFERENCE_MODES)
    with pytest.raises(UserError, match="'pgdd'.*fgsm"):
        choice('attack', 'pgdd', ATTACKS)
