"""The tables: what is trained, what is kept, what stands where; the in-text experiments."""
import json
import os
from pathlib import Path
import re
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import tensorflow as tf

from attacks import ATTACKS, minimum_norm
from config import load_config, store_config
from conftest import ROOT
from eval import WORST_CASE, WORST_IN_BALL, WORST_OF_SLOW
from paper import (cells, checks, claims, curves, experiments, formats, gallery, headline,
                   intervals, population_norms, published, scales, tables)
from paper.cells import NUM_DRAWS, Evaluations, StoredEvaluations, right_in_draws, right_of
from paper.published import (ADV_ONLY, CLOSE, INFERENCE_RATIOS, INFERENCES, MODES, MORE, NO_MORE,
                             NORM_SHAPING, PAPER_ATTACKS, PAPER_RATIOS, PAPER_TABLES, SAME, SHAPED,
                             Accuracy, Training)
from paper.tables import TABLES
from paper.trainings import config_of, train_if_missing
from pgd_attack import LinfPGDAttack
import reproduce
from running import UserError
from running.unfinished import data_digest
from shaping import INFERENCE_MODES
from test_programs import program
import train

TINY = ['dataset=synthetic', 'num_residual_units=1', 'width_factor=1', 'training_batch_size=16',
        'num_steps=1', 'step_size_schedule=[[0, 0.1]]', 'max_num_training_steps=1',
        'num_eval_examples=20', 'eval_batch_size=20', 'apgd_num_steps=1', 'eot_draws=1',
        'num_recordings=5']


def test_the_papers_numbers_are_there_for_every_cell():
    for table in PAPER_TABLES.values():
        assert list(table) == list(MODES)
        for rows in table.values():
            assert sorted(rows) == sorted(PAPER_ATTACKS)
            assert all(len(row) == len(INFERENCES) for row in rows.values())
    assert set(INFERENCES) <= set(INFERENCE_MODES)
    assert all(len(row) == len(INFERENCE_RATIOS) for row in PAPER_RATIOS.values())
    assert set(PAPER_ATTACKS + cells.OWN_ATTACKS + cells.SLOW_ATTACKS) <= set(ATTACKS)


def test_trainings_are_the_papers(small_config):
    config = small_config(training_batch_size=64, model_dir='m')
    trainings = tables.trainings_of([t for t in TABLES.values() if not t.apart], config)
    assert len(trainings) == 12  # three modes twice, three more ratios, two with another seed, and
    assert trainings['pgd_natural']['training_mode'] == 'natural'  # one for the claims
    two = trainings['pgd_shaping_in_attack_and_training_2to1']
    assert (two['training_batch_size'], two['shaping_ratio']) == (63, 2)
    again = trainings['pgd_adv_only_seed1']
    assert {key for key in again if again[key] != trainings['pgd_adv_only'][key]} == {
        'model_dir', 'tf_random_seed', 'np_random_seed'}
    for name, of_training in trainings.items():
        assert of_training['model_dir'] == os.path.join('m', name)
        assert name.startswith(f'{of_training["adversary"]}_{of_training["training_mode"]}')
        if of_training['shaping_ratio'] != 2:
            assert of_training['training_batch_size'] == 64
    fixed = tables.trainings_of([TABLES['table1']], {**config, 'attack_norms': 'fixed'})
    assert [of['attack_norms'] for of in fixed.values()] == ['batch', 'fixed', 'fixed']
    with pytest.raises(UserError, match='training_batch_size must be at least 4 .* got 2'):
        config_of(Training('pgd', NORM_SHAPING, 3), {**config, 'training_batch_size': 2})


def test_a_model_that_is_there_is_not_trained_again(tmp_path, small_model, small_config,
                                                    monkeypatch):
    monkeypatch.setattr('paper.trainings.run_to_its_end', lambda command: pytest.fail('trained'))
    small_model.save_madry_checkpoint(tmp_path / 'checkpoint-7', global_step=7)
    config = small_config(model_dir=str(tmp_path), max_num_training_steps=7)
    store_config(config, str(tmp_path / 'config.json'))
    train_if_missing('it', config, config)
    with pytest.raises(UserError, match='max_num_training_steps must be at least 7, .* got 6; or'):
        train_if_missing('it', {**config, 'max_num_training_steps': 6}, config)
    with pytest.raises(UserError, match=r'holds another training: epsilon \(was 8.0, is 9.0\)'):
        train_if_missing('it', {**config, 'epsilon': 9.}, config)


def test_a_model_that_was_trained_on_other_images_is_told(
        tmp_path, small_model, data):
    digest, prefix = data_digest(data), f'{tmp_path}/checkpoint-7'
    small_model.save_madry_checkpoint(prefix)  # of released weights: it does not say
    assert not train.trained_on_others(prefix, digest)
    for images, others in ((bytes.fromhex(digest), False), (bytes(32), True)):
        tf.raw_ops.SaveV2(prefix=prefix, tensor_names=[train.IMAGES], shape_and_slices=[''],
                          tensors=[np.frombuffer(images, np.uint8)])
        assert train.trained_on_others(prefix, digest) == others


def test_a_finished_training_can_be_evaluated_in_another_precision(
        tmp_path, small_model, small_config, monkeypatch, capsys):
    monkeypatch.setattr('paper.trainings.run_to_its_end', lambda command: pytest.fail('trained'))
    small_model.save_madry_checkpoint(tmp_path / 'checkpoint-7', global_step=7)
    config = small_config(model_dir=str(tmp_path), max_num_training_steps=7,
                          precision='mixed_bfloat16')
    store_config(config, str(tmp_path / 'config.json'))
    train_if_missing('it', config, config)
    assert not capsys.readouterr().out
    train_if_missing('it', {**config, 'precision': 'float32'}, config)
    assert capsys.readouterr().out == ('it was trained in mixed_bfloat16; what is missing is '
                                       'evaluated in float32\n')


def test_train_py_is_told_what_differs_from_the_command_line(tmp_path, small_config, monkeypatch,
                                                             capsys):
    commands = []
    monkeypatch.setattr('paper.trainings.run_to_its_end',
                        lambda command: commands.append(command) or 1)
    config = small_config(model_dir=str(tmp_path), training_batch_size=64)
    of_training = config_of(Training('trades', NORM_SHAPING, 2, 1), config)
    with pytest.raises(UserError, match='the training of it exited with status 1; the same'):
        train_if_missing('it', of_training, config, ['--config', 'a.json', '--set', 'num_steps=2'])
    arguments = commands[0][2:]
    assert arguments[:4] == ['--config', 'a.json', '--set', 'num_steps=2']
    assert dict(setting.split('=') for setting in arguments[5::2]) == {
        'adversary': '"trades"', 'shaping_ratio': '2', 'training_batch_size': '63',
        'tf_random_seed': str(config['tf_random_seed'] + 1),
        'np_random_seed': str(config['np_random_seed'] + 1),
        'model_dir': json.dumps(of_training['model_dir'])}
    assert os.path.samefile(commands[0][1], os.path.join(ROOT, 'train.py'))
    assert '    python train.py --config a.json' in capsys.readouterr().out


@pytest.fixture
def evaluations(tmp_path, small_model, small_config, data):
    """The evaluations of a training whose model is the untrained small one."""
    config = small_config(num_eval_examples=20, model_dir=str(tmp_path), max_num_training_steps=7,
                          inference_shaping_ratio=9, shaping_batch_size=100)  # Table IV has 49:1
    small_model.save_madry_checkpoint(tmp_path / 'checkpoint-7', global_step=7)
    return Evaluations('pgd_adv_only', config, data, data_digest(data), small_model,
                       str(tmp_path / 'cells'))


def test_an_evaluation_is_computed_once_and_again_only_for_other_settings(evaluations,
                                                                          monkeypatch):
    counted = []
    original = cells.evaluate_attack
    monkeypatch.setattr(cells, 'evaluate_attack',
                        lambda *args, **named: counted.append(args[0]) or original(*args, **named))
    first = evaluations.attack('pgd', ('pn',))
    assert evaluations.attack('pgd', ('pn',)) == first and counted == ['pgd']
    evaluations.config = {**evaluations.config, 'model_dir': 'moved', 'num_output_steps': 7,
                          'apgd_num_steps': 9, 'num_attack_examples': {'cw': 3}}  # none is PGD's
    assert evaluations.attack('pgd', ('pn',)) == first and counted == ['pgd']
    assert evaluations.attack('pgd', ('pn',), num_steps=1) != first and len(counted) == 2
    evaluations.config = {**evaluations.config, 'num_attack_examples': {'pgd': 3}}
    few = evaluations.attack('pgd', ('pn',))
    assert few['results'][0]['num_examples'] == 3 and len(counted) == 3
    right = first['right'][0]
    assert right.count('1') / 20 == first['results'][0]['accuracy'] and len(right) == 20
    assert len(os.listdir(evaluations.folder)) == 3


def test_stored_evaluations_give_the_same_numbers_without_weights_or_images(evaluations):
    clean = evaluations.attack('clean', ('pn',))
    pgd = evaluations.attack('pgd', ('pn',), num_steps=1)
    stored = StoredEvaluations(evaluations.name, evaluations.config, evaluations.folder)
    assert stored.attack('clean', ('pn',)) == clean
    assert stored.attack('pgd', ('pn',), num_steps=1) == pgd
    with pytest.raises(UserError, match='holds no pgd-num_steps-3 of pgd_adv_only'):
        stored.attack('pgd', ('pn',), num_steps=3)
    other = StoredEvaluations('pgd_shaping', evaluations.config, evaluations.folder)
    with pytest.raises(UserError, match='holds no clean of pgd_shaping'):
        other.attack('clean', ('pn',))


def test_transferred_examples_are_judged_under_several_draws(evaluations):
    """Not those of direct attacks, nor in sweeps."""
    alone = evaluations.attack('clean', num_draws=1)
    assert 'num_draws' not in alone['identity'][-1] and 'right_in_other_draws' not in alone
    clean = evaluations.attack('clean')
    stored = StoredEvaluations(evaluations.name, evaluations.config, evaluations.folder)
    assert stored.attack('clean') == clean and stored.attack('clean', num_draws=1) == alone
    assert [right_in_draws(clean, inference).shape for inference in INFERENCES] == [
        (1, 20), (1, 20), (NUM_DRAWS, 20)]
    right = right_in_draws(clean, 'bn_shaping')
    assert right.mean() == pytest.approx(clean['results'][2]['accuracy'])
    assert (right[0] == right_in_draws(alone, 'bn_shaping')).all()
    assert (right[0] == right_of(clean, 'bn_shaping')).all()
    assert clean['results'][2]['xent'] != alone['results'][2]['xent']  # other clean samples
    for evaluation in (evaluations.attack('adaptive_pgd', ('bn_shaping',)),
                       evaluations.attack('clean', num_eval_examples=10),
                       evaluations.attack('clean', ('pn',))):
        assert 'right_in_other_draws' not in evaluation


def test_the_papers_claims_are_its_numbers():
    """The paper's own numbers show its claims, but for those that are named here."""
    not_shown = [claim.words for claim in published.CLAIMS if not claims.paper_shows(
        published.paper_difference(claim), claim.kind)]
    by_bn = 'the norm-shaped model is better by `bn_shaping` than by `bn`'
    alone = 'norm shaping is better than shaping in training alone'
    assert sorted(not_shown) == sorted([
        *(f'PGD, under `{attack}`: {by_bn}' for attack in ('cw', 'deepfool')),
        *(f'TRADES, under `{attack}`: {by_bn}' for attack in ('clean', 'cw')),
        *(f'TRADES, under `{attack}`: {alone}' for attack in ('cw', 'deepfool')),
        'TRADES, under `shaping`: the default is more robust than norm shaping'])
    assert len({claim.words for claim in published.CLAIMS}) == len(published.CLAIMS)
    ratio_7 = Training('pgd', NORM_SHAPING, 7)
    assert published.paper_accuracy(Accuracy(ratio_7, 'pgd', 'bn_shaping', 9)) == 0.781
    for training, attack in ((Training('pgd', ADV_ONLY), 'adaptive_pgd'), (ratio_7, 'pgd')):
        with pytest.raises(KeyError):
            published.paper_accuracy(Accuracy(training, attack, 'bn_shaping'))


def test_the_papers_bounds_are_no_numbers():
    """Section IV says "over 0.93", so natural training may be better than the default by more."""
    by_words = {claim.words: published.paper_difference(claim) for claim in published.CLAIMS}
    least, most = by_words['natural training is more accurate than the default']
    assert (round(least, 3), most) == (0.061, np.inf)
    assert claims.paper_words((least, most)) == '> +6.1'
    assert claims.verdict((least, most), (0.2, 0.3)) == 'seen'
    assert claims.verdict((least, most), (0.01, 0.02)) == 'seen, smaller'
    least, most = by_words['norm shaping is as accurate as natural training']
    assert (least, round(most, 3)) == (-np.inf, 0.012)
    assert claims.paper_words((least, most)) == '< +1.2'
    # Section VI compares 0.944, Table I's number by `pn`, with 0.92
    difference = by_words['training 3:1 is more accurate than 2:1, both judged by `pn`']
    assert difference == pytest.approx((0.944 - 0.92,) * 2)
    # The best of the others under C&W is 0.920; ours is 0.904
    close = 'norm shaping is close to the best of the other trainings and inferences'
    assert by_words[f'PGD, under `cw`: {close}'] == pytest.approx((-0.016,) * 2)


@pytest.mark.parametrize('paper_says, interval, kind, word', [
    (0.3, (0.2, 0.4), MORE, 'seen'), (0.3, (0.31, 0.4), MORE, 'seen, larger'),
    (0.3, (0.1, 0.2), MORE, 'seen, smaller'), (0.3, (-0.1, 0.2), MORE, 'not seen'),
    (0.3, (-0.1, 0.4), MORE, 'open'), (0.3, (-0.2, -0.1), MORE, 'contradicted'),
    (0., (-0.01, 0.02), SAME, 'seen'), (0., (-0.03, 0.01), SAME, 'open'),
    (0., (-0.2, -0.1), SAME, 'contradicted'), (0., (0.03, 0.1), SAME, 'contradicted'),
    (0., (-0.2, 0.02), NO_MORE, 'seen'), (0., (-0.2, 0.03), NO_MORE, 'open'),
    (0., (0.03, 0.1), NO_MORE, 'contradicted'), (0., (-0.05, 0.3), CLOSE, 'seen'),
    (0., (-0.06, 0.3), CLOSE, 'open'), (0., (-0.2, -0.06), CLOSE, 'contradicted')])
def test_a_verdict_is_the_place_of_the_interval(paper_says, interval, kind, word):
    assert claims.verdict((paper_says, paper_says), interval, kind) == word


def test_claims_compare_the_same_samples(evaluations):
    """On one model in all places, each claim's difference is that of the same samples."""
    names = tables.trainings_of([TABLES['claims']], evaluations.config)
    rows = claims.claim_rows(evaluations.config, dict.fromkeys(names, FewAttacks(evaluations)))
    assert len(rows) == len(published.CLAIMS) and {len(row) for row in rows} == {5}
    rows = {row[1]: row for row in rows}
    a, b = (right_in_draws(evaluations.attack('pgd'), inference)
            for inference in ('bn_shaping', 'pn'))
    row = rows['PGD, under `pgd`: the norm-shaped model is more robust by `bn_shaping` than by '
               '`pn`']
    assert row[2] == '+78.6' and row[3].startswith(f'{100 * (a.mean() - b.mean()):+.1f} [')
    row = rows['PGD, under `cw`: norm shaping is more robust than the default']
    assert row[3].endswith('(n = 10, 5 draws)') and row[4] == 'not comparable'
    row = rows['TRADES, under `shaping`: the default is more robust than norm shaping']
    assert row[2] == '-0.9' and row[4].endswith("the paper's own numbers do not show it")
    row = rows['PGD, under `fgsm`: norm shaping is close to the best of the other trainings and '
               'inferences']  # here one model, so the best is the best inference
    fgsm = [right_in_draws(evaluations.attack('fgsm'), inference) for inference in INFERENCES]
    best = max(right.mean() for right in fgsm)
    assert row[3].startswith(f'{100 * (fgsm[2].mean() - best):+.1f} [')


class FewAttacks:
    """Evaluations in which the slow attacks are short ones under another name."""

    def __init__(self, evaluations):
        self.evaluations = evaluations

    def if_kept(self, get, *args):
        return get(*args)

    def attack(self, name, *args):
        if name in ('cw', 'deepfool'):
            found = self.evaluations.attack('fgsm', *args)
            n = 10 if name == 'cw' else 20
            return {**found, 'right': [right[:n] for right in found['right']],
                    'right_in_other_draws': [[right[:n] for right in others]
                                             for others in found['right_in_other_draws']]}
        return self.evaluations.attack('pgd' if name.startswith('adaptive') else name, *args)


def stored_of(target, config, folder):
    """Returns {name: StoredEvaluations} of the trainings that a table needs."""
    return {name: StoredEvaluations(name, of_training, folder) for name, of_training in
            tables.trainings_of([TABLES[target]], config).items()}


@pytest.fixture(scope='module')
def sections():
    """{file in results: (what it holds, what is made of the stored numbers)}"""
    found = {}
    for path in sorted(Path(ROOT, 'results').glob('*/*.md')):
        config = load_config(path.parent / 'config.json')
        table = TABLES[path.stem]
        stored = stored_of(path.stem, config, path.parent / 'cells')
        found[f'{path.parent.name}/{path.name}'] = (
            path.read_text(), tables.section(table, config, stored))
    return found


def test_the_results_are_made_of_the_numbers_that_are_stored(sections):
    assert sections
    for name, (stored, made) in sections.items():
        assert stored == made, name
    lines = {line for stored, _ in sections.values() for line in stored.splitlines()}
    text = Path(ROOT, 'RESULTS.md').read_text()
    shown = [line for line in text.splitlines()
             if line.startswith('| ') or re.match(r'w\d+-\d+, \d+ steps of batch', line)]
    rows = set(shown) - set(rows_by_hand(text))
    assert len(rows) > 400 and rows <= lines
    # The notes below the tables, whose lines may break elsewhere: one that begins alike is the same
    words = ' '.join(text.split())
    notes = {' '.join(note.split()) for stored, _ in sections.values()
             for note in stored.split('\n\n')[3:]}
    shown = [note for note in notes if note[:60] in words]
    assert len(shown) > 10 and all(note in words for note in shown)


BY_HAND = ('## On one page', '### w32-1: asked again',
           '## Adversarial training with half the radius')  # RESULTS.md's sections


def rows_by_hand(text):
    """Returns {row: the heading above it} of the tables that no table of reproduce.py is."""
    found, heading = {}, None
    for line in text.splitlines():
        heading = line if line.startswith('#') else heading
        if line.startswith('| ') and heading in BY_HAND:
            found[line] = heading
    return found


def test_the_tables_that_are_made_by_hand_hold_stored_numbers():
    """What eval.py wrote, or what a table holds; the first page sums up what stands below it."""
    def shown(accuracy, interval):
        return f'{100 * accuracy:.1f} [{100 * interval[0]:.1f}, {100 * interval[1]:.1f}]'
    text, number = Path(ROOT, 'RESULTS.md').read_text(), r'\d+\.\d \[\d+\.\d, \d+\.\d\]'
    by_hand = rows_by_hand(text)
    assert set(by_hand.values()) == set(BY_HAND)
    stored = set()
    for path in Path(ROOT, 'results').glob('*/*'):
        if path.suffix == '.md':
            stored |= set(re.findall(number, path.read_text()))
        elif path.suffix == '.json' and path.name != 'config.json':
            for row in json.loads(path.read_text())['results']:
                stored |= {shown(row[f'accuracy{of}'], row[f'interval{of}'])
                           for of in ('', '_all_draws') if f'accuracy{of}' in row}
    below = set(re.findall(r'\d+\.\d', text.partition('## What holds')[2]))
    for row, heading in by_hand.items():
        if heading == BY_HAND[0]:
            assert set(re.findall(r'\d+\.\d', row)) <= below, row
        else:
            assert set(re.findall(number, row)) <= stored, row


def test_a_table_is_one_record(sections):
    """Each row is as wide as its header, and each file has a name of its own."""
    plots = [plot for table in TABLES.values() for plot in table.plots]
    assert len({*plots, *TABLES}) == len(plots) + len(TABLES)
    assert {Path(name).stem for name in sections} == set(TABLES)
    for name, (_, made) in sections.items():
        widths = {line.count(' | ') for line in made.splitlines() if line.startswith('| ')}
        assert widths == {len(TABLES[Path(name).stem].header) - 1}, name


class MadeUp:
    """Evaluations whose attacks leave as many of 1,000 samples as left(attack, settings) says."""

    name = 'made up'

    def __init__(self, left):
        self.left = left

    def if_kept(self, get, *args, **settings):
        return get(*args, **settings)

    def get(self, what, identity, compute):
        lost = self.left('lost iterates', {})
        return {'zero_gradients': 0., 'lost_iterates': {'8': lost if lost == 0.02 else 0.}}

    def attack(self, name, inferences=cells.JUDGES, **settings):
        n = self.left(name, settings)
        return {'results': [{'inference': inference, 'norms': inference}
                            for inference in inferences],
                'right': ['1' * n + '0' * (1000 - n)] * len(inferences)}


def sound(attack, settings):
    """What a sound attack leaves: less and less."""
    if attack == 'random':
        return 800
    if settings.get('epsilon') == 64:
        return 0
    as_configured = 8 if attack in cells.SLOW_ATTACKS else 0  # Table I's
    return 700 - 5 * settings.get('num_steps', 0) - 5 * int(settings.get('epsilon', as_configured))


@pytest.mark.parametrize('broken, fault', [
    (None, None),
    (lambda attack, s: 850 if s.get('num_steps') == 50 else None,
     'accuracy does not rise with num_steps; closest: 50 against 20'),
    (lambda attack, s: 650 if s.get('epsilon') == 32 and attack == 'adaptive_pgd' else None,
     '`adaptive_pgd` under `bn_shaping`: accuracy does not rise with epsilon; closest: 32 against '
     '16'),
    (lambda attack, s: 1 if s.get('epsilon') == 64 else None, 'accuracy is 0 at epsilon 64'),
    (lambda attack, s: 640 if attack == 'random' else None, 'random perturbations'),
    (lambda attack, s: 720 if attack == 'adaptive_pgd' and not s else None,
     'is as strong as `pgd`, transferred'),
    (lambda attack, s: 600 if 'num_restarts' in s and s['epsilon'] == 4 else None,
     'more restarts (twice) leave no less; closest: epsilon 4'),
    (lambda attack, s: 600 if attack == 'square' else None,
     'is as strong as `square`; closest: epsilon 8'),
    (lambda attack, s: 0.02 if attack == 'lost iterates' else None, 'stays so to the last')])
def test_the_checks_fail_where_an_attack_is_not_sound(broken, fault, small_config):
    def left(attack, settings):
        found = broken(attack, settings) if broken else None
        return sound(attack, settings) if found is None else found
    config = small_config(num_steps=10)
    names = tables.trainings_of([TABLES['checks']], config)
    rows = checks.check_rows(config, dict.fromkeys(names, MadeUp(left)))
    # Two sweeps; the direct attacks of two inference modes, and of two that draw
    assert len(rows) == 2 * 9 + 6 * 3 + 2 * (2 * 6 + 2 * 8)
    assert {row[-1] for row in rows} <= {'holds', '**fails**'}
    failed = [row for row in rows if row[-1] == '**fails**']
    assert (not failed) if fault is None else failed and all(fault in row[1] for row in failed)


def test_each_rule_gives_the_population_norms_that_it_names(small_model, small_config, data,
                                                            monkeypatch):
    monkeypatch.setattr(population_norms, 'NUM_BATCHES', 30)
    config = small_config(training_mode='natural', data_augmentation=False,
                          max_num_training_steps=3)
    norms = population_norms.population_norms(small_model)
    weights = [v.numpy() for v in small_model.trainable_variables]
    x, _ = data.train_data.get_batch(3, 16)
    x = x.astype(np.float32)

    def after(rule, **settings):
        for v in norms:
            v.assign(tf.ones_like(v))
        population_norms.set_population_norms(small_model, data, {**config, **settings}, rule)
        return [v.numpy() for v in norms]

    assert all((v == 1).all() for v in after('trained'))
    after('last batch')  # PN by the last batch's own statistics is BN, but for m / (m - 1)
    np.testing.assert_allclose(small_model(x, training=False),
                               small_model(x, update_population_norms=False), atol=0.02)
    # Without an attack they are the same, with one they are not
    def equal(a, b, tolerance=1e-4):
        return all(np.allclose(u, v, rtol=tolerance, atol=tolerance) for u, v in zip(a, b))
    moved = after('updates')
    assert equal(after('again'), moved) and equal(after('clean images'), after('training batches'))
    attacked = {'training_mode': 'adv_only'}
    assert equal(after('attacked batches'), after('training batches', **attacked))
    assert not equal(after('again', **attacked), after('updates', **attacked))
    assert not equal(after('clean images'), after('training batches', **attacked), 1e-5)
    # Moving averages are of the last batches, a mean of all: close, as the images are random
    assert equal(moved, after('clean images'), 0.2) and not equal(moved, after('clean images'))
    means = [np.asarray(tf.nn.conv2d(
        small_model.standardize(tf.constant(data.train_data.get_batch(step, 16)[0], tf.float32)),
        small_model.variables_by_name['input/init_conv/DW'].value, 1, 'SAME')).mean(axis=(0, 1, 2))
        for step in range(3, 3 + population_norms.NUM_BATCHES)]
    after('clean images')
    name = 'unit_1_0/shared_activation/BatchNorm/moving_mean'
    np.testing.assert_allclose(small_model.variables_by_name[name], np.mean(means, axis=0),
                               atol=1e-4)
    assert all((a == b.numpy()).all() for a, b in zip(weights, small_model.trainable_variables))


def test_other_population_norms_are_another_evaluation_and_leave_the_model(evaluations):
    trained = evaluations.attack('clean', ('pn',))
    other = evaluations.attack('clean', ('pn',), norms='last batch')
    assert other['results'][0]['xent'] != trained['results'][0]['xent']
    again = Evaluations(evaluations.name, evaluations.config, evaluations.data,
                        evaluations.digests[1], evaluations.model, evaluations.folder + '2')
    assert again.attack('clean', ('pn',))['results'][0]['xent'] == trained['results'][0]['xent']


def test_stored_evaluations_of_two_models_are_refused(evaluations):
    """A training that was made anew, say, whose evaluations lie beside the old ones."""
    evaluations.attack('clean', ('pn',))
    evaluations.attack('fgsm', ('pn',))
    folder = Path(evaluations.folder)
    stored = StoredEvaluations(evaluations.name, evaluations.config, str(folder))
    assert stored.attack('clean', ('pn',)) == evaluations.attack('clean', ('pn',))
    path, = folder.glob('*-clean-*.json')
    other = json.loads(path.read_text())
    other['identity'][2] = 'other weights'
    (folder / f'{evaluations.name}-clean-0123456789ab.json').write_text(json.dumps(other))
    with pytest.raises(UserError, match='evaluations of more than one model or data set named'):
        StoredEvaluations(evaluations.name, evaluations.config, str(folder))


def test_a_stop_in_the_middle_of_an_evaluation_leaves_none(evaluations, monkeypatch):
    def stopped(*_, **named):
        raise KeyboardInterrupt
    with monkeypatch.context() as m:
        m.setattr(cells, 'evaluate_attack', stopped)
        with pytest.raises(KeyboardInterrupt):
            evaluations.attack('clean', ('pn',))
    assert not os.path.exists(evaluations.folder) or os.listdir(evaluations.folder) == []
    assert evaluations.attack('clean', ('pn',))['results']


def test_ratios_are_judged_one_by_one_and_none_at_all_is_the_batch_itself(evaluations):
    evaluation = evaluations.attack('pgd', ('bn_shaping',), INFERENCE_RATIOS)
    results = evaluation['results']
    assert [r['inference_shaping_ratio'] for r in results] == list(INFERENCE_RATIOS)
    alone = evaluations.attack('pgd', ('bn',))['results'][0]
    assert results[0]['xent'] == pytest.approx(alone['xent'])  # 1:0, 20 test samples in one batch
    assert len({r['xent'] for r in results}) == len(results)
    for ratio, result in zip(INFERENCE_RATIOS, results):
        assert cells.result_of(evaluation, 'bn_shaping', ratio) is result
        right = right_in_draws(evaluation, 'bn_shaping', ratio)
        assert right.mean() == pytest.approx(result['accuracy'])
    for missing in (('bn_shaping', 2), ('pn', None)):
        with pytest.raises(KeyError):
            cells.result_of(evaluation, *missing)


def test_other_weights_or_images_are_other_evaluations(evaluations, data, small_model):
    before = evaluations.attack('clean', ('pn',))
    def again():
        return Evaluations(evaluations.name, evaluations.config, data, data_digest(data),
                           small_model, evaluations.folder).attack('clean', ('pn',))
    assert again() == before
    data.eval_data.xs[0, 0, 0, 0] ^= 1
    assert again() != before
    data.eval_data.xs[0, 0, 0, 0] ^= 1
    small_model.variables_by_name['logit/biases'].assign_add(tf.one_hot(3, 10))
    small_model.save_madry_checkpoint(evaluations.checkpoint, global_step=7)
    assert again() != before


def test_in_text_experiments_take_their_intervals_over_batches():
    """The sizes of an image are nearly those of its batch: by images the interval is too narrow."""
    rng = np.random.default_rng(0)
    b = np.repeat(rng.uniform(1, 2, 50), 16)
    sizes = {'clean norms': b * np.repeat(rng.uniform(1.4, 1.8, 50), 16), 'adversarial norms': b,
             'adversarial norms, clean logits': b}
    kept = experiments.excesses_of(sizes, experiments.LOGIT_ERRORS, 16)['the same norms']
    kept = json.loads(json.dumps(kept))
    value, (low, high) = intervals.excess(*map(np.array, kept['batch_means']))
    assert value == pytest.approx(sizes['clean norms'].mean() / b.mean() - 1) and kept['n'] == 800
    by_images = intervals.excess(sizes['clean norms'], b)[1]
    assert low < value < high and high - low > 3 * (by_images[1] - by_images[0])


def test_norms_from_is_how_a_sample_looks_to_another_batchs_norms(small_model, batch):
    """Against a second network whose population norms are set, layer by layer, to that batch's."""
    x = batch[0].astype(np.float32)
    other = 255 - x
    joint = small_model(tf.concat([x, other], 0), norms_from=16).numpy()
    np.testing.assert_allclose(joint[:16], small_model(x, update_population_norms=False),
                               atol=1e-4)
    before = [v.numpy().copy() for v in small_model.variables]
    for _ in range(150):  # 0.9 ** 150: the moving averages become the batch's own, to 1e-7
        small_model(x, update_population_norms=True)
    # Moving variances are unbiased: m / (m - 1) of the batch's, 64 pixels or more a sample
    np.testing.assert_allclose(joint[16:], small_model(other, training=False), atol=0.02)
    small_model.set_weights(before)
    small_model(x, norms_from=8, update_population_norms=True)
    assert all((a == b.numpy()).all() for a, b in zip(before, small_model.variables))


def test_confoundings_measure_every_sample_once(small_model, small_config, data):
    config = small_config(num_eval_examples=40, random_start=False)  # two batches of 16, 8 left
    errors = experiments.logit_errors(small_model, data, config)
    assert {len(v) for v in errors.values()} == {32}
    x, y = data.train_data.xs[:16].astype(np.float32), data.train_data.ys[:16]
    bn = dict(update_population_norms=False)
    x_adv = LinfPGDAttack(small_model, 2., 1, 2., False, 'xent', **bn).perturb(x, y, 0)
    plain = np.abs(small_model(x_adv, **bn) - small_model(x, **bn)).mean(axis=1)
    np.testing.assert_allclose(errors['adversarial norms, clean logits'][:16], plain, rtol=1e-3)
    sizes = experiments.perturbation_sizes(small_model, data, config)
    assert {len(v) for v in sizes.values()} == {32}
    assert all((v > 0.5).all() and (v <= 4).all() for v in sizes.values())  # two steps of 2
    tail = np.arange(16) >= 12
    shaped = LinfPGDAttack(small_model, 8., 2, 2., False, 'xent', **bn).perturb(x, y, 0, tail)
    np.testing.assert_allclose(sizes['shaping'][12:16],
                               np.abs(shaped - x).mean(axis=(1, 2, 3))[12:], rtol=1e-2)


def test_norm_shifts_are_distances_of_batch_statistics(small_model, small_config, data):
    config = small_config(num_eval_examples=40, random_start=False)  # two batches of 16, 8 left
    before = [v.numpy() for v in small_model.variables]
    shifts = experiments.norm_shifts(small_model, data, config)
    assert {len(v) for v in shifts.values()} == {2}
    assert all((a == b.numpy()).all() for a, b in zip(before, small_model.variables))
    # The first norm's, by hand
    x = [data.train_data.xs[i:i + 16].astype(np.float32) for i in (0, 16)]
    kernel = small_model.variables_by_name['input/init_conv/DW'].value
    a = np.asarray(tf.nn.conv2d(small_model.standardize(x[0]), kernel, 1, 'SAME'))
    first = population_norms.batch_statistics(small_model)
    mean, variance = first(x[0])[:2]
    np.testing.assert_allclose(mean, a.mean(axis=(0, 1, 2)), atol=1e-5)
    np.testing.assert_allclose(variance, a.var(axis=(0, 1, 2), ddof=1), rtol=1e-4)
    def distance(p, q):
        pairs = list(zip(first(p)[0::2], first(p)[1::2], first(q)[0::2]))
        return np.mean(np.concatenate([abs(v - u) / s ** 0.5 for u, s, v in pairs]))
    another = data.train_data.xs[32:48].astype(np.float32)
    assert shifts['another'] == pytest.approx([distance(*x), distance(x[1], another)], rel=1e-4)
    pgd = LinfPGDAttack(small_model, 8., 2, 2., False, 'xent', update_population_norms=False)
    x_adv = pgd.perturb(x[0], data.train_data.ys[:16], 0)
    assert shifts['all'][0] == pytest.approx(distance(x[0], x_adv), rel=1e-3)
    tail = np.arange(16) >= 12
    x_adv = pgd.perturb(x[0], data.train_data.ys[:16], 0, tail)
    assert shifts['tail'][0] == pytest.approx(distance(x[0], x_adv), rel=1e-3)


@pytest.mark.slow
def test_the_program_makes_tables_and_plots_and_a_second_run_computes_nothing(tmp_path):
    """Two tables, one of them with a plot, from nothing, by trainings of one step."""
    targets = ['gap', 'curves']
    settings = [*TINY, f'model_dir={tmp_path}/m']
    status, stdout, errors = program('reproduce.py', *targets, settings=settings)
    assert status == 0, errors
    assert len(re.findall(r'^Training \w+:$', stdout, re.MULTILINE)) == 3
    assert 'Computing' in stdout
    for target in targets:
        table = (tmp_path / 'm' / 'tables' / f'{target}.md').read_text()
        assert table in stdout
    gap = (tmp_path / 'm' / 'tables' / 'gap.md').read_text()
    assert len(re.findall(r'\d+\.\d \[\d+\.\d, \d+\.\d\]', gap)) == 3 * 2
    assert '+78.6' in gap and (tmp_path / 'm' / 'tables' / 'curves_plot.png').exists()
    status, again, errors = program('reproduce.py', *targets, settings=settings)
    assert status == 0, errors
    assert 'Training' not in again and 'Computing' not in again
    assert gap in again
    kept = [json.loads(path.read_text()) for path in (tmp_path / 'm' / 'cells').iterdir()]
    assert all('identity' in cell for cell in kept)
    (tmp_path / 's').mkdir()
    shutil.copytree(tmp_path / 'm' / 'cells', tmp_path / 's' / 'cells')
    shutil.copy(tmp_path / 'm' / 'tables' / 'config.json', tmp_path / 's')
    status, _, errors = program('reproduce.py', *targets, '--stored', str(tmp_path / 's'))
    assert status == 0, errors
    assert (tmp_path / 's' / 'gap.md').read_text() == gap
    assert (tmp_path / 's' / 'curves_plot.png').exists()


@pytest.mark.parametrize('target', ['headline', 'table3', 'table4', 'shifts', 'norms'])
def test_a_table_is_made_from_nothing_and_of_what_is_stored(target, evaluations, monkeypatch):
    monkeypatch.setattr(population_norms, 'NUM_BATCHES', 2)
    monkeypatch.setattr(headline, 'FULL_BUDGET', {'apgd_num_steps': 3, 'num_restarts': 2})
    monkeypatch.setattr(Evaluations, 'numbers_of_images', lambda _: [40])  # of 2,000
    evaluations.config['apgd_num_steps'] = 2
    monkeypatch.setattr(tables, 'RULES', {rule: population_norms.RULES[rule]
                                          for rule in ('trained', 'last batch')})
    table, config = TABLES[target], evaluations.config
    names = tables.trainings_of([table], config)
    made = tables.section(table, config, dict.fromkeys(names, evaluations))
    stored = StoredEvaluations(evaluations.name, config, evaluations.folder)
    assert tables.section(table, config, dict.fromkeys(names, stored)) == made
    if target == 'headline':
        rows = [line.split(' | ') for line in made.splitlines() if line.startswith('| `')]
        assert [row[1:3] for row in rows] == [['`pn`', '40'], ['`bn_recorded`', '40']] * 9
        assert [row[7] != '' for row in rows] == [True, False, False, False, False, True] + 12 * [
            False]
    if target == 'table4':
        assert len(re.findall(r'\d+\.\d \[\d+\.\d, \d+\.\d\] t \(\d+\.\d\)', made)) == 24
        assert '(81.7)' in made
    for plot in table.plots.values():
        assert plot(config, dict.fromkeys(names, stored)).axes


@pytest.mark.parametrize('arguments, fault', [
    ([], 'nothing to reproduce; expected one or more of headline, summary'),
    (['table5'], "'table5' is none of headline, summary, table1, table2, table3, table4, "
                 'confoundings, shifts, sweeps, seeds, norms, gap, transfer, neighbours, '
                 'checks, scales, binarization, curves, gallery, variations, crossed, claims, '
                 'all'),
    (['table4', '--set=shaping_batch_size=40'],
     'shaping_batch_size is 40, and Table IV asks for 49:1')])
def test_mistakes_are_told_in_one_line(arguments, fault, tmp_path):
    status, _, errors = program('reproduce.py', *arguments, settings=[
        *TINY, f'model_dir={tmp_path}/m'])
    assert status == 2 and len(errors) == 1 and fault in errors[0]
    assert not (tmp_path / 'm').exists()


@pytest.mark.parametrize('settings, got', [
    ({'training_mode': 'natural'}, 'natural and pgd'),
    ({'adversary': 'trades'}, 'shaping_in_attack_and_training and trades')])
def test_the_tables_vary_norm_shaping_by_pgd(settings, got, small_config, monkeypatch):
    monkeypatch.setattr(reproduce, 'config_from_flags', lambda: small_config(**settings))
    with pytest.raises(UserError, match='training_mode must be shaping_in_attack_and_training and '
                                        f'adversary pgd, as the tables vary them, got {got}'):
        reproduce.read_config(None)


@pytest.mark.parametrize('target, settings, fault', [
    ('gap', {'shaping_batch_size': 160}, 'shaping_batch_size is 160, 120 of them clean samples at '
     '3:1; expected at most 100, half the training images'),
    ('table1', {'num_eval_examples': 61}, 'num_eval_examples is 61; expected at most 60'),
    ('claims', {'shaping_batch_size': 40}, 'shaping_batch_size is 40, and Table IV asks for 49:1'),
    ('table2', {'eval_batch_size': 22}, 'eval_batch_size is 22, shaping_ratio 3: .* 20 or 24'),
    ('confoundings', {'num_eval_examples': 15}, 'num_eval_examples must be at least '
     'training_batch_size, 16, got 15'),
    ('confoundings', {'epsilon': 0.}, 'epsilon must be above 0, or there is no perturbation .*0')])
def test_what_would_fail_after_the_trainings_is_told_before(
        target, settings, fault, small_config, data):
    with pytest.raises(UserError, match=fault):
        reproduce.check({target: TABLES[target]}, small_config(**settings), data)


def test_an_attack_that_is_not_there_is_named(small_config, monkeypatch):
    config = small_config(num_attack_examples={'cww': 5})
    monkeypatch.setattr(reproduce, 'config_from_flags', lambda: config)
    with pytest.raises(UserError, match="num_attack_examples holds 'cww'; expected"):
        reproduce.read_config(None)


def test_scales_show_each_training_and_scale_and_are_kept(evaluations, monkeypatch):
    """C&W and DeepFool played by FGSM, which moves every image."""
    calls = []

    def played(name, model, images, labels, scale=1):
        calls.append((name, scale, len(images)))
        attack = LinfPGDAttack(model, 8 / scale, 1, 8 / scale, False, 'xent', False)
        return lambda start, end: attack.perturb(images[start:end], labels[start:end], 0), {
            'epsilon': None, 'norms': 'pn'}
    for module in (scales, minimum_norm):
        monkeypatch.setattr(module, 'minimum_norm_attack', played)
    monkeypatch.setattr(scales, 'NUM_CW_EXAMPLES', 10)
    names = tables.trainings_of([TABLES['scales']], evaluations.config)
    rows = scales.scale_rows(evaluations.config, dict.fromkeys(names, evaluations))
    assert len(names) == 6 and len(rows) == 6 * 7
    assert {row[0] for row in rows} == {f'`{evaluations.name}`'}
    # Six trainings share this model: kept
    assert sorted(call[:2] for call in calls) == [('cw', 1), ('cw', 255), ('deepfool', 1),
                                                  ('deepfool', 255)]
    assert {call for call in calls if call[1] == 255} == {('cw', 255, 10), ('deepfool', 255, 20)}
    cw, small, deepfool = (dict(zip(scales.HEADER, row)) for row in rows[:3])
    assert cw['pixels in'] == '[0, 1]' and cw['moved'] == cw['images'] > 0
    assert (small['pixels in'], small['images'], small['moved']) == ('[0, 255]', 10, 10)
    median = scales.HEADER[6]
    assert float(cw[median]) > 100 * float(small[median]) > 0
    assert (deepfool['attack'], deepfool['moved']) == ('deepfool', deepfool['images'])
    assert [row[1:3] for row in rows[4:7]] == [
        ['fgsm, epsilon 0.3', '[0, 1]'], ['fgsm, epsilon 0.3', '[0, 255]'],
        ['fgsm, epsilon 16', '[0, 255]']]
    assert [row[-1] for row in rows[:7:2]] == ['82.1', '7.1', '37.6', '37.6']
    assert set(published.NOT_COMPARABLE) <= set(PAPER_ATTACKS)


def test_the_gallery_shows_what_was_answered(evaluations, monkeypatch):
    """From the stored numbers alone: pictures are whole pixels, answers those of the model."""
    monkeypatch.setattr(gallery, 'ATTACKS', ('clean', 'pgd'))
    evaluations.config['num_attack_examples'] = {'pgd': 4}  # which has no say in it
    trained = dict.fromkeys(tables.trainings_of([TABLES['gallery']], evaluations.config),
                            evaluations)
    rows = gallery.gallery_rows(evaluations.config, trained)
    assert len(rows) == 2 * 8 * 2 and {len(row) for row in rows} == {len(gallery.HEADER)}
    images = evaluations.data.eval_data.xs
    sure = tf.nn.softmax(evaluations.model(images[:8].astype(np.float32), training=False)).numpy()
    shown = [row[gallery.HEADER.index('`pn`')] for row in rows if row[3] == 'clean'][:8]
    labels = evaluations.data.eval_data.ys[:8]
    assert shown == [f'{p.argmax()} {100 * p.max():.0f}{"" if p.argmax() == y else " *"}'
                     for p, y in zip(sure, labels)]
    stored = StoredEvaluations(evaluations.name, evaluations.config, evaluations.folder)
    trained = dict.fromkeys(trained, stored)
    assert gallery.gallery_rows(evaluations.config, trained) == rows
    of = gallery.found(SHAPED, evaluations.config, trained)
    assert (gallery.from_text(of['images']) == images[:8]).all()
    x_adv = gallery.from_text(of['examples']['pgd']).astype(float)
    assert 0 < abs(x_adv - images[:8]).max() <= 8
    figure = gallery.draw(SHAPED, evaluations.config, trained)
    assert len(figure.axes) == 8 * 3


def test_curves_are_what_the_log_says(evaluations, tmp_path):
    lines = [{'step': 0, 'accuracy_nat': 0.25, 'mean_of_steps': 1, 'accuracy_adv': 0.125},
             {'step': 5, 'validation_accuracy': 0.5, 'validation_accuracy_adv': 0.375},
             {'step': 6, 'accuracy_nat': 0.75, 'mean_of_steps': 6, 'accuracy_adv': 0.625}]
    log = tmp_path / 'log.jsonl'
    log.write_text(''.join(json.dumps(line) + '\n' for line in lines))
    trained = dict.fromkeys(tables.trainings_of([TABLES['curves']], evaluations.config),
                            evaluations)
    rows = curves.curve_rows(evaluations.config, trained)
    assert rows == [['`pgd_adv_only`', 6, '75.0', '62.5', '50.0', '37.5']]
    log.unlink()  # what is kept stays
    stored = StoredEvaluations(evaluations.name, evaluations.config, evaluations.folder)
    assert curves.curve_rows(evaluations.config, dict.fromkeys(trained, stored)) == rows
    assert curves.read_log(str(tmp_path)) == {key: [] for key in curves.VALUES}
    assert TABLES['curves'].plots['curves_plot'](evaluations.config, dict.fromkeys(trained, stored))
    log.write_text('[]\n')
    with pytest.raises(UserError, match='log.jsonl is damaged; expected a JSON object a line'):
        curves.read_log(str(tmp_path))


def test_tables_show_the_trainings_of_which_something_is_stored():
    """Those of results/three_classes, but for one; and none at all."""
    folder = Path(ROOT, 'results', 'three_classes')
    config = load_config(folder / 'config.json')

    def section(target, lacking):
        stored = stored_of(target, config, folder / 'cells')
        stored |= {name: of for name, of in stored_of(target, config, 'nowhere').items()
                   if name in lacking}
        for plot in TABLES[target].plots.values():
            plot(config, stored)
        return tables.section(TABLES[target], config, stored)
    for target in ('table2', 'summary'):
        whole, part = section(target, []), section(target, ['trades_adv_only'])
        lost = [line for line in whole.splitlines() if line not in part]
        assert 'not stored' not in whole
        assert 'Left out, their numbers are not stored: `trades_adv_only`.\n' in part
        assert len(lost) >= 4 and all(line.startswith(('| adv. only', '| `trades_'))
                                      for line in lost)  # its rows, and differences from it
    with pytest.raises(UserError, match='nothing is stored of trades_adv_only or trades_shaping'):
        section('table2', tables.trainings_of([TABLES['table2']], config))


def test_worst_cases_are_over_the_attacks_that_each_mode_has(tmp_path):
    """A slow attack may be stored under some inference modes alone."""
    cells_of = Path(ROOT, 'results', 'three_classes', 'cells')
    name = 'pgd_shaping_in_attack_and_training_3to1'
    config = load_config(cells_of.parent / 'config.json')
    for path in cells_of.glob(f'{name}-*.json'):
        shutil.copy(path, tmp_path)
    path, = (path for path in tmp_path.glob(f'{name}-adaptive-????????????.json')
             if json.loads(path.read_text())['results'][0]['inference'] == 'bn_shaping')
    path.unlink()
    stored = StoredEvaluations(name, config_of(published.SHAPED, config), tmp_path)
    by_attack = cells.attacks_on(published.SHAPED, config, {name: stored})
    assert [r['inference'] for r in by_attack['adaptive']['results']] == [
        'bn', 'pn', 'bn_recorded']
    worst = {r['inference']: r for r in cells.worst_cases_of(by_attack, config)
             if r['attack'] == WORST_IN_BALL}
    assert set(worst) == {'bn', 'pn', 'bn_recorded'}  # without its strongest attack it is none
    assert 'adaptive' in worst['pn']['attacks'] and 'apgd_eot' not in worst['pn']['attacks']
    del by_attack['adaptive']
    assert {r['inference'] for r in cells.worst_cases_of(by_attack, config)} == set(cells.JUDGES)
    slow = by_attack['apgd_eot']  # now one that `bn` lacks
    kept = [r['inference'] != 'bn' for r in slow['results']]
    by_attack['apgd_eot'] = slow | {key: [each for each, keep in zip(slow[key], kept) if keep]
                                    for key in ('results', 'right')}
    worst = {(r['attack'], r['inference']) for r in cells.worst_cases_of(by_attack, config)}
    assert {inference for attack, inference in worst if attack == WORST_IN_BALL} == set(
        cells.JUDGES)
    assert {inference for attack, inference in worst if attack in (WORST_OF_SLOW, WORST_CASE)} == {
        'pn', 'bn_shaping', 'bn_recorded'}


def test_the_summary_names_the_attacks_that_a_training_lacks(tmp_path):
    """Fewer attacks leave more: without a word, 'robust' would be another training's advantage."""
    folder = Path(ROOT, 'results', 'three_classes')
    config = load_config(folder / 'config.json')
    for path in folder.glob('cells/*.json'):
        if not path.name.startswith('pgd_adv_only-adaptive-'):
            shutil.copy(path, tmp_path)

    def rows(cells_folder):
        return {tuple(row[:2]): row[3] for row in tables.summary_rows(
            config, stored_of('summary', config, cells_folder))}
    whole, part = rows(folder / 'cells'), rows(tmp_path)
    assert not any('without' in robust for robust in whole.values())
    for (name, inference), robust in part.items():
        assert robust.endswith(' (without adaptive)') == (name == '`pgd_adv_only`')
        assert name == '`pgd_adv_only`' or robust == whole[name, inference]


def test_stored_evaluations_of_different_images_are_refused(tmp_path, monkeypatch):
    source = Path(ROOT, 'results', 'cifar10_w32_4')
    shutil.copytree(source / 'cells', tmp_path / 'cells')
    shutil.copy(source / 'config.json', tmp_path)
    for path in tmp_path.glob('cells/pgd_adv_only-*.json'):
        cell = json.loads(path.read_text())
        cell['identity'][3] = 'others'
        path.write_text(json.dumps(cell))
    config = load_config(tmp_path / 'config.json')
    stored = stored_of('headline', config, source / 'cells')  # some trainings have nothing
    reproduce.check_same_images(stored.values(), 'a folder')
    with pytest.raises(UserError, match='pgd_adv_only and pgd_shaping.* on different images'):
        main_of_stored(tmp_path, monkeypatch, ['headline'])


def main_of_stored(folder, monkeypatch, words):
    monkeypatch.setattr(reproduce.flags, 'FLAGS', SimpleNamespace(
        task_cpus=1, task_gpus=0, stored=str(folder), ray=None, config=None, set=[]))
    reproduce.main(words)


def test_a_table_that_is_left_out_leaves_no_doubt_of_an_older_one(tmp_path, monkeypatch, capsys):
    source = Path(ROOT, 'results', 'cifar10_w32_4')
    shutil.copytree(source, tmp_path / 'copy')
    (tmp_path / 'copy' / 'seeds.md').write_text('of before')
    monkeypatch.setattr(reproduce, 'TABLES', {name: TABLES[name] for name in ('gap', 'seeds')})
    main_of_stored(tmp_path / 'copy', monkeypatch, ['all'])
    shown = capsys.readouterr()
    assert 'seeds is left out: ' in shown.err and 'seeds.md in ' in shown.err
    assert 'gap.md' in shown.out and 'gap' not in shown.err


@pytest.mark.parametrize('contents', [
    '{}', '{"identity": ["pgd_adv_only", "clean", 1]}',
    *('{"identity": ["pgd_adv_only", "clean", "w", "i", {}], "in_ball": "1", ' + damage + '}'
      for damage in ('"results": [{}]', '"results": [], "right": 5',
                     '"results": [{}], "right": ["1"]', '"results": [5], "right": ["1"]',
                     '"results": [{"inference": "pn"}], "right": [1]',
                     '"results": [{"attack": "pgd", "inference": "pn", "accuracy": 1, '
                     '"num_examples": 1}], "right": ["1"]'))])  # no interval
def test_what_is_no_evaluation_is_named(tmp_path, contents):
    (tmp_path / 'pgd_adv_only-x.json').write_text(contents)
    with pytest.raises(UserError, match='pgd_adv_only-x.json is not what reproduce.py keeps'):
        StoredEvaluations('pgd_adv_only', {}, tmp_path)


@pytest.mark.parametrize('target', ['binarization', 'variations', 'headline'])
def test_a_table_of_nothing_is_no_table(tmp_path, target, small_config):
    config = small_config()
    with pytest.raises(UserError, match='stored'):
        tables.section(TABLES[target], config, stored_of(target, config, tmp_path))


def test_the_gap_is_shown_without_a_direct_attack_but_not_without_the_others(tmp_path):
    """Of results/cifar10_w32_4, `adaptive_pgd` through `bn_shaping` was too slow."""
    folder = Path(ROOT, 'results', 'cifar10_w32_4')
    config = load_config(folder / 'config.json')

    def rows(cells_folder):
        return tables.gap_rows(config, stored_of('gap', config, cells_folder))
    assert [row[0] for row in rows(folder / 'cells')] == ['clean', 'pgd']
    with pytest.raises(UserError, match='holds no clean of pgd_shaping_in_attack'):
        rows(tmp_path)


@pytest.mark.parametrize('attack, settings, mark', [
    ('adaptive', {'inference': 'bn', 'norms': 'bn'}, ' s'),
    ('square', {'inference': 'bn_shaping', 'norms': 'bn_shaping', 'shaping_batch_size': 20}, ' s'),
    ('adaptive', {'inference': 'bn_shaping', 'norms': 'bn_shaping', 'shaping_batch_size': 10}, ''),
    ('adaptive', {'inference': 'bn_recorded', 'norms': 'bn_recorded'}, ''),
    ('pgd', {'inference': 'bn', 'norms': 'pn'}, ' t'),
    ('pgd', {'inference': 'pn', 'norms': 'pn'}, ''),
    ('clean', {'inference': 'bn'}, '')])
def test_a_number_of_a_direct_attack_on_images_that_share_norms_is_marked(attack, settings, mark):
    """So is a worst case over it. With n + 1 samples in a batch, a query shares it with none."""
    result = {'attack': attack, **settings, 'inference_shaping_ratio': 9, 'accuracy': 0.5,
              'interval': [0.4, 0.6], 'num_examples': 100}
    assert formats.accuracy(result) == f'50.0 [40.0, 60.0]{mark}'
    worst = {**{key: result[key] for key in ('inference', 'accuracy', 'interval', 'num_examples')},
             'attack': 'worst in ball', 'attack_settings': {
                 'clean': {'epsilon': 8.}, attack: result}}
    assert formats.accuracy(worst) == formats.accuracy(result)


def test_accuracies_on_fewer_images_are_compared_on_those():
    rng = np.random.default_rng(0)
    ours, theirs = rng.random((2, 2, 60)) < 0.6  # each: clean and robust accuracy
    alike = formats.against(ours[:, :40], theirs[:, :40])
    assert formats.against(ours[:, :40], theirs) == alike
    assert formats.against(ours, theirs[:, :40]) == alike != formats.against(ours, theirs)


def test_the_headline_takes_what_table_1_has():
    """TRADES of results/three_classes: `clean` and PGD are stored as Tables I and II ask for."""
    folder = Path(ROOT, 'results', 'three_classes')
    config = load_config(folder / 'config.json')
    stored = stored_of('headline', config, folder / 'cells')
    rows = {tuple(row[:2]): row for row in headline.headline_rows(config, stored)}
    summary = {tuple(row[:2]): row for row in tables.summary_rows(config, stored)}
    key = '`trades_adv_only`', '`pn`'
    assert rows[key][2:4] == [1000, summary[key][2]]


def test_the_headline_is_what_both_attacks_leave():
    """Of results/three_classes, by hand; a row that is not stored is left out, and named."""
    folder = Path(ROOT, 'results', 'three_classes')
    config = load_config(folder / 'config.json')
    names = tables.trainings_of([TABLES['headline']], config)
    stored = stored_of('headline', config, folder / 'cells')

    def right(name, attack, inference):
        kept, = (cell for cell in (json.loads(path.read_text()) for path in folder.glob(
            f'cells/{name}-{attack}-num_eval_examples-3000-*.json'))
            if inference in cell['identity'][-1]['modes'])
        return right_of(kept, inference)

    def robust(name, inference):
        return np.all([right(name, attack, inference) for attack in ('clean', 'pgd', 'adaptive')],
                      axis=0)
    default, shaped = names['pgd_adv_only'], names['pgd_shaping_in_attack_and_training_3to1']
    rows = {tuple(row[:2]): row for row in headline.headline_rows(config, stored)}
    for inference in ('pn', 'bn_recorded'):
        name = os.path.basename(shaped['model_dir'])
        ours, theirs = robust(name, inference), robust('pgd_adv_only', 'pn')
        row = rows[f'`{name}`', f'`{inference}`']
        assert row[2] == 3000 and row[6].startswith(f'{100 * ours.mean():.1f} [')
        assert row[9].startswith(f'{100 * (ours.mean() - theirs.mean()):+.1f} [')
    made = tables.section(TABLES['headline'], config, stored)
    assert 'Left out, their numbers are not stored: `pgd_natural`' in made.splitlines()[2]
    assert os.path.basename(default['model_dir']) == 'pgd_adv_only' and rows[
        '`pgd_adv_only`', '`pn`'][8:] == ['', '', '']
    ours, theirs = (robust(name, 'bn_recorded') for name in (
        os.path.basename(shaped['model_dir']), 'pgd_adv_only'))
    alike = 100 * (ours.mean() - theirs.mean())
    assert row[10].startswith(f'{alike:+.1f} [') and row[9][:4] != row[10][:4]
