"""The evaluation: intervals, attacks, what is verified before it is counted, what is flagged."""
from types import SimpleNamespace

import numpy as np
import pytest
import tensorflow as tf

from pgd_attack import perturbation_fault
from attacks import ATTACKS, DIRECT, MINIMUM_NORM, hopskipjump, make_attack, random_search
from running import UserError
from config import choice
from conftest import CHECKPOINT
import doubts
import eval as eval_program
import run_attack
from eval import (WORST_CASE, WORST_DIRECT, WORST_IN_BALL, WORST_OF_SLOW, WORST_TRANSFERRED,
                  check_attack, evaluate, lost_iterates, wilson_interval)
from report import print_table
from shaping import FORMS, INFERENCE_MODES, Inference, make_inference

WORST = [WORST_IN_BALL, WORST_DIRECT, WORST_TRANSFERRED, WORST_OF_SLOW, WORST_CASE]


@pytest.mark.parametrize('correct, n, low, high', [
    (0, 10, 0.0, 0.2775), (10, 10, 0.7225, 1.0), (81, 263, 0.2553, 0.3662),
    (512, 1000, 0.4810, 0.5429)])
def test_wilson_intervals_are_those_of_the_literature(correct, n, low, high):
    """81 of 263: Newcombe (1998), Table I, method 3; 0 and 10 of 10: standard tables."""
    assert wilson_interval(correct, n) == pytest.approx((low, high), abs=1e-4)


def test_every_attack_stays_in_its_ball_and_leaves_the_model_alone(
        small_model, small_config, data, transfer_from, monkeypatch):
    config = small_config(**transfer_from)
    images = data.eval_data.xs
    before = [v.numpy().copy() for v in small_model.variables]
    monkeypatch.setattr(random_search, 'RANDOM_DRAWS', 20)
    for name in ATTACKS:
        if name in ('cw', 'hopskipjump', 'retry'):
            continue  # 1,000 iterations five times over, 25,000 queries, 2 draws: test_attacks.py
        attack, settings = make_attack(name, small_model, data, config)
        for start, end in ((0, 20), (30, 50)):
            x_adv = np.asarray(attack(start, end))
            assert x_adv.shape == (end - start, 32, 32, 3)
            assert perturbation_fault(images[start:end], x_adv, settings['epsilon']) is None
            changed = (x_adv != images[start:end]).reshape(end - start, -1).mean(axis=1)
            if name in ('apgd', 'adaptive'):  # what is answered wrongly stays as it is
                assert 0 < (changed > 0.5).sum() < end - start
                continue
            assert (changed > 0.5).all() == (name not in ('clean', 'deepfool'))  # each is attacked
        assert (x_adv == np.asarray(attack(start, end))).all()  # always in the same way
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


def test_results_hold_every_cell_and_the_stated_fields(
        small_model, small_config, data, transfer_from):
    few = dict.fromkeys([*DIRECT, 'apgd'], 20)
    config = small_config(num_attack_examples={**few, 'pgd': 1000}, apgd_num_steps=2,
                          square_queries=3, num_eval_examples=40, **transfer_from)
    before = [v.numpy().copy() for v in small_model.variables]
    attacks = [name for name in ATTACKS if name not in (
        'cw', 'hopskipjump', 'random', 'adaptive_weak', 'apgd_eot', 'retry')]
    results = evaluate(small_model, data, config, attacks, INFERENCE_MODES)
    cells = {(r['attack'], r['inference']): r for r in results}
    # Of the attacks on all images, the direct ones are PGD and the like, under `pn`
    rows = [*WORST, *attacks]
    assert list(cells) == [(a, m) for a in rows for m in INFERENCE_MODES
                           if m == 'pn' or a not in WORST[1:3]]
    for r in results:
        on_few = r['attack'] in (*few, *WORST[3:])
        assert r['num_examples'] == (20 if on_few else 40)
        assert r['interval'][0] <= r['accuracy'] <= r['interval'][1]
        assert [of_draw.count('1') / len(of_draw) for of_draw in r['right']] == [r['accuracy']]
        assert r['number_forward_passes'] == (4 if r['inference'] == 'bn_shaping' else 1)
    assert cells['pgd', 'pn']['epsilon'] == 8 and cells['pgd', 'pn']['norms'] == 'pn'
    assert cells['deepfool', 'bn']['num_fooled'] > 0 and cells['deepfool', 'bn']['median_l2'] > 0
    assert cells['adaptive', 'bn_shaping']['shaping_batch_size'] == 20
    assert cells['pgd', 'bn_recorded']['num_recordings'] == 5
    for mode in INFERENCE_MODES:  # each is judged by the norms that it goes through
        for attack in set(DIRECT) & set(attacks):
            assert cells[attack, mode]['norms'] == mode
        settings = cells['worst in ball, slow too', mode]['attack_settings']
        assert settings['adaptive']['norms'] == mode and settings['pgd']['norms'] == 'pn'
        for attack in attacks:
            expected = attack == 'transfer' or attack not in (*DIRECT, 'clean') and (
                mode != 'pn' or attack == 'shaping')
            assert ('transferred' in cells[attack, mode]['flags']) == expected
        assert ('random answer' in cells['clean', mode]['flags']) == (mode in FORMS)
        shared = mode in ('bn', 'bn_shaping')  # 20 in its batch, 5 of them queries
        assert ('shared norms' in cells['adaptive', mode]['flags']) == shared
        assert cells['adaptive', mode]['unreliable'] or not shared
    # What an example costs: image gradients, or queries
    assert cells['pgd', 'bn']['gradients'] == 2 and cells['square', 'bn']['queries'] == 5
    assert cells['adaptive_pgd', 'bn_shaping']['gradients'] == 8
    assert cells['adaptive', 'bn_recorded']['gradients'] == 3 * 3
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
    assert ('worst case', 'bn') not in cells  # `clean` alone is none
    assert cells['worst case', 'pn']['attacks'] == attacks
    assert cells['hopskipjump', 'pn']['queries'] > 100
    print_table(results, INFERENCE_MODES)
    shown = capsys.readouterr().out
    row, = (line for line in shown.splitlines() if line.startswith('hopskipjump '))
    assert row[34:58].strip() == row[82:106].strip() == '-' and ' [' in row[58:82]
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
            if name == 'clean':
                return attack, {'epsilon': 0.}
            return attack, {'epsilon': None if name in MINIMUM_NORM else size, 'norms': 'pn'}
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
        monkeypatch.setattr(doubts, 'Probe', lambda *args: SimpleNamespace(
            random_answers=0., zero_gradients=0.))
        data.eval_data.xs[:] = 100
        data.eval_data.xs[:, 0, 0, 1:] = np.stack([np.zeros(60), np.arange(60)], 1)
        results = evaluate(None, data, config, names, ['pn', 'bn_shaping'], num_draws)
        return {(r['attack'], r['inference']): r for r in results}
    return play


def test_logits_that_are_no_numbers_are_no_right_answer(monkeypatch, data, small_config):
    """The largest of NaNs would be class 0. Nor is a model's NaN the attack's fault."""
    config = small_config(num_eval_examples=20)
    def attack(start, end):
        return np.full([end - start, 32, 32, 3], np.nan)
    with pytest.raises(UserError, match='pixels by pgd are NaN or infinite; expected a model'):
        eval_program.evaluate_attack('pgd', (attack, {'epsilon': 8.}), data, config, {})
    monkeypatch.setattr(run_attack, 'make_inference', lambda *args: (
        lambda x, query: np.full([len(x), 10], np.nan)))
    with pytest.raises(UserError, match='logits under pn are NaN or infinite'):
        run_attack.run_attack(CHECKPOINT, np.zeros([20, 32, 32, 3]), data,
                              {**config, 'num_residual_units': 5}, 'pn')
    found = eval_program.Found({('pn', None): None}, 2, 2, 1)
    with pytest.raises(UserError, match='logits under pn are NaN or infinite'):
        found.judge(('pn', None), lambda x, query: np.full([2, 3], np.nan), 0, 0,
                    np.zeros([2, 32, 32, 3]), np.zeros(2, int))


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
    assert cells['worst in ball', 'pn']['num_examples'] == 6  # of those on all images
    assert cells['worst in ball', 'pn']['accuracy'] == pytest.approx(2 / 6)
    assert cells['worst in ball, slow too', 'pn']['accuracy'] == pytest.approx(1 / 3)
    assert cells['worst case', 'pn']['num_examples'] == 3
    assert cells['worst case', 'pn']['accuracy'] == pytest.approx(1 / 3)


def test_clean_images_alone_make_no_worst_case(judged):
    cells = judged({('clean', 0): [[1, 1, 1, 1, 1, 1]], ('apgd_eot', 5): [[0, 0, 0]]},
                   num_attack_examples={'apgd_eot': 3})
    assert ('worst in ball', 'pn') not in cells
    assert cells['worst in ball, slow too', 'pn']['accuracy'] == 0


def test_the_worst_cases_of_direct_and_of_transferred_attacks(judged):
    """Under `pn` PGD is direct and `shaping` is not; under `bn_shaping` neither is: no such row."""
    cells = judged({('clean', 0): [[1, 1, 1, 1, 1, 0]], ('pgd', 5): [[0, 1, 1, 1, 1, 1]],
                    ('shaping', 5): [[1, 1, 1, 0, 0, 1]]})
    of = {name: cells[name, 'pn']['attacks'] for name in WORST if (name, 'pn') in cells}
    assert of == {WORST_IN_BALL: ['clean', 'pgd', 'shaping'], WORST_DIRECT: ['clean', 'pgd'],
                  WORST_TRANSFERRED: ['clean', 'shaping'],
                  WORST_CASE: ['clean', 'pgd', 'shaping']}
    assert cells[WORST_DIRECT, 'pn']['accuracy'] == pytest.approx(4 / 6)
    assert cells[WORST_TRANSFERRED, 'pn']['accuracy'] == pytest.approx(3 / 6)
    assert (WORST_DIRECT, 'bn_shaping') not in cells
    beyond = judged({('deepfool', 20): [[0, 0, 0, 1, 1, 1]], ('shaping', 5): [[1, 1, 1, 0, 0, 1]]})
    assert (WORST_DIRECT, 'pn') not in beyond  # some of its examples may count, none stays within
    assert cells['pgd', 'bn_shaping']['unreliable'] and not cells['pgd', 'pn']['unreliable']


def test_a_worst_case_is_as_doubtful_as_its_strongest_direct_attack(judged):
    """A strong transferred attack does not make it doubtful, nor does a weak direct one help.

    Where nothing is direct, the strongest transferred attack is all that is known.
    """
    cells = judged({('pgd', 5): [[0, 1, 1, 1, 1, 1]], ('shaping', 5): [[1, 1, 0, 0, 0, 1]]})
    assert not cells[WORST_IN_BALL, 'pn']['unreliable'] and not cells[WORST_IN_BALL, 'pn']['flags']
    assert cells[WORST_TRANSFERRED, 'pn']['flags'] == ['transferred']
    assert cells[WORST_IN_BALL, 'bn_shaping']['flags'] == ['transferred']
    assert cells[WORST_IN_BALL, 'bn_shaping']['unreliable']
    flagged = doubts.flagged({'more steps': True})
    trusted = doubts.flagged({'more steps': False})
    attacks = [{'attack': name, 'inference': 'pn', 'norms': 'pn', 'epsilon': 8., 'right': [right],
                **flags}
               for name, right, flags in (('clean', '000', trusted), ('pgd', '111', trusted),
                                          ('apgd', '110', flagged))]
    worst = {'inference': 'pn', 'attacks': ['clean', 'pgd', 'apgd'], 'num_examples': 3}
    assert doubts.of_worst(worst, attacks) == flagged
    assert doubts.of_worst({**worst, 'num_examples': 2}, attacks) == trusted  # of equals, the first
    # Attacks that leave the ball are nearly always the strongest, and their examples do not count
    beyond = [{**attacks[0], 'attack': name, 'epsilon': radius}
              for name, radius in (('fgsm', 16.), ('deepfool', None))]
    of_ball = {**worst, 'attacks': ['pgd', 'apgd', 'fgsm', 'deepfool'], 'epsilon': 8.}
    assert doubts.of_worst(of_ball, attacks + beyond) == flagged
    # `square` is the strongest where gradients are masked: then it is flagged for the others
    attacks[1] |= doubts.flagged({'masked gradients': True})
    attacks[2] = {**attacks[2], 'attack': 'square', **trusted}
    of_square = doubts.of_worst({**worst, 'attacks': ['clean', 'pgd', 'square']}, attacks)
    assert of_square['flags'] == ['masked gradients'] and of_square['unreliable']


def test_fewer_right_answers_are_told_from_chance():
    a = np.arange(100) < 50
    assert doubts.fewer(np.arange(100) < 45, a) and not doubts.fewer(np.arange(100) < 46, a)
    assert not doubts.fewer(np.roll(a, 30), a) and not doubts.fewer(a, a)
    many = np.arange(10000) < 5000  # all of CIFAR-10, any number of which may disagree
    assert doubts.chance(~many, many) == pytest.approx(0.5, abs=0.01)
    none = np.zeros(10000, bool)
    assert doubts.fewer(none, many) and not doubts.fewer(many, none)


class Brightness(Inference):
    """Bright or dark, by the mean of all pixels."""
    rounds = False

    def logits(self, images, drawn):
        z = 20 * (tf.reduce_mean(images, [1, 2, 3]) - 127)
        return tf.stack([0 * z, tf.round(z) + 0 * z if self.rounds else z], axis=1)


def test_masked_gradients_are_flagged(data, small_config):
    """An answer that comes through rounding has no gradient, but its scores lead the way."""
    config = small_config(num_eval_examples=20, square_queries=200, random_start=False)
    inference = Brightness(None, 'pn')
    images, labels = data.eval_data.xs[:20], np.argmax(inference(data.eval_data.xs[:20], 0), 1)
    data.eval_data.ys[:20] = labels
    assert doubts.Probe(inference, images, labels).zero_gradients == 0
    masked, right = Brightness(None, 'pn'), {}
    masked.rounds = True
    for name in ('adaptive_pgd', 'square'):
        attack, _ = make_attack(name, None, data, config, 1, masked)
        right[name] = (np.argmax(masked(attack(0, 20), 0), 1) == labels)[None]
    row = {'attack': 'adaptive_pgd', 'inference': 'pn', 'norms': 'pn'}
    probe = doubts.Probe(masked, images, labels)
    assert doubts.flags_of(row, probe, right) == {
        'transferred': False, 'random answer': False, 'shared norms': False,
        'zero gradients': True, 'masked gradients': True}
    assert probe.random_answers == 0


def test_an_attack_that_transferred_ones_beat_is_flagged(small_model, small_config, data):
    """On the images that both were run on, and by more than chance; clean images are no attack."""
    inference = make_inference(small_model, 'pn', data, small_config())
    probe = doubts.Probe(inference, data.eval_data.xs[:4], data.eval_data.ys[:4])
    row, right = {'attack': 'adaptive', 'inference': 'pn', 'norms': 'pn'}, np.ones([1, 50], bool)
    for left, seen in ((50, False), (46, False), (45, True)):  # 5 of 50: 1 in 32
        other = np.arange(50)[None] < left
        found = doubts.flags_of(row, probe, {'adaptive': right, 'transfer': other}, ['transfer'])
        assert found['beaten by transfer'] == seen
        first = doubts.flags_of(row, probe, {'adaptive': right[:, :40], 'transfer': other},
                                ['transfer'])
        assert not first['beaten by transfer']
    assert 'beaten by transfer' not in doubts.flags_of(row, probe, {'adaptive': right})
    assert 'beaten by transfer' in doubts.UNRELIABLE


@pytest.mark.parametrize('mode, size, shared', [
    ('bn', 20, True), ('pn', 20, False), ('bn_recorded', 20, False), ('bn_shaping', 20, True),
    ('bn_shaping', 4, False)])
def test_queries_that_meet_the_same_norms_are_flagged(
        small_model, small_config, data, mode, size, shared):
    """With n + 1 samples in a batch, a query shares it with clean training images alone."""
    config = small_config(shaping_batch_size=size, inference_shaping_ratio=3)
    inference = make_inference(small_model, mode, data, config)
    assert inference.coupled == shared
    row = {'attack': 'adaptive', 'inference': mode, 'norms': mode,
           'shaping_batch_size': size, 'inference_shaping_ratio': 3}
    assert doubts.shares_norms(row) == shared


def test_an_attack_that_has_not_converged_is_flagged(data, small_config):
    """Steps of a 20th of the ball, from the image: one is too few, forty are not."""
    config = small_config(num_eval_examples=50, eval_batch_size=50, step_size=0.4,
                          random_start=False)
    inference = Brightness(None, 'pn')
    data.eval_data.ys[:] = np.argmax(inference(data.eval_data.xs, 0), 1)
    def seen(**settings):
        of_run = {**config, **settings}
        attack, _ = make_attack('adaptive_pgd', None, data, of_run, 1, inference)
        right = np.argmax(inference(attack(0, 50), 0), 1) == data.eval_data.ys[:50]
        return check_attack('adaptive_pgd', None, data, of_run, ('pn', None), inference,
                            right[None], 1)
    assert seen(num_steps=1) == {'more steps': True, 'lost iterates': False}
    assert seen(num_steps=40) == {'more steps': False, 'lost iterates': False}
    # What draws nothing has no more draws
    assert [flag for flag, _ in doubts.doubled('apgd_eot', config, draws=False)] == ['more steps']
    assert 'more draws' in dict(doubts.doubled('apgd_eot', config))


def test_a_verdict_stays_where_the_row_is_computed_again_without_it():
    """--check once, or `square` beside it once; what is looked for again is judged anew."""
    checked = doubts.flagged({'random answer': True, 'more steps': True, 'lost iterates': False})
    assert checked['unreliable'] and checked['flags'] == ['random answer', 'more steps']
    of_code = {'provenance': {'code': 'abc'}}
    checked |= of_code
    again = {'accuracy': 0.5, **of_code, **doubts.flagged({'random answer': False,
                                                           'masked gradients': False})}
    row = doubts.renewed({'accuracy': 0.5, **checked}, again)
    assert row['flags'] == ['more steps'] and row['unreliable'] and row['accuracy'] == 0.5
    assert set(row['looked_for']) == {'random answer', 'more steps', 'lost iterates',
                                      'masked gradients'}
    assert doubts.renewed(row, {**again, **checked})['flags'] == checked['flags']
    for former in ({}, {'flags': 3, 'looked_for': 'x', **of_code},
                   {'flags': [], 'looked_for': [[], 'more'], **of_code},
                   {**checked, 'provenance': {'code': 'other'}}, {**checked, 'provenance': 1}):
        assert doubts.renewed(former, again) == again
    assert doubts.renewed(checked, {'accuracy': 0.5}) == {'accuracy': 0.5}  # a worst case


def test_an_image_that_pgd_had_fooled_and_then_lost_is_named():
    """Four images in four steps: one never fooled, one lost at once, one lost late, one at last."""
    right_after = {1: [1, 0, 1, 1], 2: [1, 1, 1, 1], 3: [1, 1, 0, 1]}
    last = np.array([[1, 1, 1, 0]], bool)
    lost = lost_iterates(lambda changed: np.array([right_after[changed['num_steps']]], bool), last,
                         {'num_steps': 4})
    assert lost.tolist() == [False, True, True, False]


def test_a_program_with_check_flags_an_attack_that_has_not_converged(
        small_model, small_config, data, monkeypatch):
    """--check asks for it, and is not asked for without it."""
    asked = []
    monkeypatch.setattr(eval_program, 'check_attack',
                        lambda name, *_: asked.append(name) or {'lost iterates': True})
    config = small_config(num_eval_examples=20)
    for check in (False, True):
        row = evaluate(small_model, data, config, ['pgd'], ['pn'], check=check)[-1]
        assert row['attack'] == 'pgd' and asked == ['pgd'] * check
        assert ('lost iterates' in row['flags']) == check == row['unreliable']
        assert ('lost iterates' in row['looked_for']) == check


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


@pytest.mark.parametrize('spoil', [lambda x: x + 9, lambda x: x * 0 - 1])
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
