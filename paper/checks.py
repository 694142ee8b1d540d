"""Sweeps over PGD's steps and epsilon, and what they and the attacks must show if sound."""
import itertools
from typing import NamedTuple

import numpy as np

from attacks import DIRECT
from attacks.random_search import RANDOM_DRAWS
from cifar10_input import eval_examples
from config import relevant
from doubts import Probe, chance, doubled, fewer, first_of_all
from eval import lost_iterates, make_judges, run_direct
from paper import formats
from paper.cells import JUDGES, SLOW_ATTACKS, result_of, right_of
from paper.intervals import paired_difference
from paper.published import DEFAULT, MODES, PAPER_TABLES, SHAPED, Training
from paper.trainings import name_of
from shaping import FORMS

SWEPT = DEFAULT, SHAPED
CHECKED = tuple(Training(adversary, mode) for adversary in PAPER_TABLES for mode in MODES)
SWEEPS = {'num_steps': (1, 2, 5, 10, 20, 50, 100),
          'epsilon': (0, 1, 2, 4, 8, 16, 32, 64)}
MAX_EXAMPLES = 500  # the sweeps are a check of the attacks, not a result
FEW_EXAMPLES = 50   # of what is run again with twice the steps, restarts and draws
LEVEL = 0.025       # one-sided: half of that of the flags, as there are many checks
EPSILONS = SWEEPS['epsilon'][1:]

SWEEPS_HEADER = ['training', 'pgd with', 'under `pn`', 'under `bn_shaping`',
                 'adaptive_pgd, under `bn_shaping`']
CHECKS_HEADER = ['training', 'what must hold', 'accuracy', 'difference', '']


# ---- the sweeps


class SweepPoint(NamedTuple):
    """Where a sweep measures: a training, what is varied, and its value there."""
    training: str  # its name
    key: str       # a key of SWEEPS, or 'random perturbations'
    value: int


class SweepResults(NamedTuple):
    """The results of one SweepPoint; None: not measured there."""
    pn: dict                 # PGD made with population norms, judged by them
    bn_shaping: dict         # the same examples, judged by bn_shaping
    adaptive: dict | None = None  # the adaptive attack, judged by bn_shaping


def sweep_results(config, evaluations):
    """Returns {SweepPoint: SweepResults}.

    Over epsilon, the step is a quarter of it. Last for each training, in PGD's place, the strongest
    of many random perturbations.
    """
    found = {}
    for training in SWEPT:
        name = name_of(training, config)
        for key, values in SWEEPS.items():
            for value in values:
                pgd, adaptive = swept(evaluations[name], 'pgd', config, key, value), None
                if key == 'epsilon':
                    adaptive = result_of(
                        swept(evaluations[name], 'adaptive_pgd', config, key, value), 'bn_shaping')
                found[SweepPoint(name, key, value)] = SweepResults(
                    result_of(pgd, 'pn'), result_of(pgd, 'bn_shaping'), adaptive)
        random = swept(evaluations[name], 'random', config)
        draws = result_of(random, 'pn')['random_draws']
        found[SweepPoint(name, 'random perturbations', draws)] = SweepResults(
            result_of(random, 'pn'), result_of(random, 'bn_shaping'))
    return found


def swept(of_training, attack, config, key=None, value=None):
    """Returns the evaluation under an attack at one value of `key`, on the sweeps' samples."""
    settings = {'num_eval_examples': min(MAX_EXAMPLES, config['num_eval_examples'])}
    if key is not None:
        settings |= at_epsilon(value) if key == 'epsilon' else {key: value}
    inferences = ('bn_shaping',) if attack in DIRECT else ('pn', 'bn_shaping')
    return of_training.attack(attack, inferences, **settings)


def at_epsilon(epsilon):
    """Returns the changed keys for an attack within epsilon, in steps of a quarter of it."""
    return {'epsilon': float(epsilon), 'step_size': epsilon / 4}


def sweep_rows(config, evaluations):
    """Returns accuracy against PGD's steps and against epsilon."""
    n = min(MAX_EXAMPLES, config['num_eval_examples'])
    return [[f'`{point.training}`', f'{point.key} {point.value}',
             *(formats.accuracy(r, n) if r else '' for r in results)]
            for point, results in sweep_results(config, evaluations).items()]


# ---- the checks


def check_rows(config, evaluations):
    """Returns what must hold if the attacks are sound: the numbers, and whether it does.

    A stronger attack must leave no more accuracy than a weaker one. It fails where the weaker one
    leaves less on the same samples, by the exact McNemar test at LEVEL.
    """
    rows = []
    for training in SWEPT:
        name = name_of(training, config)
        for attack, inference in (('pgd', 'pn'), ('pgd', 'bn_shaping'),
                                  ('adaptive_pgd', 'bn_shaping')):
            rows += sweep_checks(name, evaluations[name], attack, inference, config)
        rows.append(compared(
            name, f'`pgd` is stronger than {RANDOM_DRAWS:,} random perturbations, `pn`',
            swept(evaluations[name], 'pgd', config, 'num_steps', config['num_steps']),
            swept(evaluations[name], 'random', config), 'pn', strictly=True))
    for training in CHECKED:
        name = name_of(training, config)
        for inference in JUDGES:
            rows += direct_checks(name, evaluations[name], inference)
    for training in SWEPT:
        name = name_of(training, config)
        for inference in JUDGES:
            rows += flag_rows(name, evaluations[name], inference, config)
    return rows


def direct_checks(name, of_training, inference):
    """Returns the check that PGD through the norms that judge is as strong as PGD through pn."""
    if inference == 'pn':  # there, they are the same
        return []
    direct = of_training.if_kept(of_training.attack, 'adaptive_pgd', (inference,))
    if direct is None:
        return []
    return [compared(name, f'`adaptive_pgd` under `{inference}` is as strong as `pgd`, transferred',
                     direct, of_training.attack('pgd'), inference)]


def flag_rows(name, of_training, inference, config):
    """Returns the checks by the flags of doubts.py, of an inference's direct attacks.

    Of `adaptive` at every epsilon of EPSILONS; of these, the one that is closest to failing is
    shown. Of `apgd_eot` and `square`, which take hours through bn_shaping, at the configured one.
    """
    n = min(FEW_EXAMPLES, config['num_eval_examples'])

    def run(attack, epsilon, **changed):
        settings = at_epsilon(epsilon) | changed | {'num_eval_examples': n}
        if attack in SLOW_ATTACKS and not changed:
            settings = {}  # as Table I has it
        return of_training.if_kept(of_training.attack, attack, (inference,), **settings)

    def closest(what, pairs):
        """Returns the row of the pair (epsilon, strong, weak) that is closest to failing."""
        pairs = [pair for pair in pairs if None not in pair]
        if not pairs:
            return []
        epsilon, strong, weak = min(
            pairs, key=lambda pair: closeness(*right_in(pair[1:], inference)))
        return [compared(name, f'{what}; closest: epsilon {epsilon:g}', strong, weak, inference)]

    rows = []
    for attack in ('adaptive', *(['apgd_eot'] if inference in FORMS else [])):
        for flag, changed in doubled(attack, config):
            rows += closest(f'`{attack}` under `{inference}`: {flag} (twice) leave no less', [
                (epsilon, run(attack, epsilon), run(attack, epsilon, **changed))
                for epsilon in epsilons_of(attack, config)])
    for weak in ('square', 'adaptive_pgd'):
        rows += closest(f'`adaptive` under `{inference}` is as strong as `{weak}`', [
            (epsilon, run('adaptive', epsilon), run(weak, epsilon))
            for epsilon in epsilons_of(weak, config)])
    found = of_training.if_kept(
        of_training.get, f'indicators-{inference}', [relevant(config), inference, n],
        lambda _: indicators(of_training.load(), of_training.data, config, inference, n))
    if found:
        most = max(found['lost_iterates'].values())
        rows += [
            check_row(name, f'`{inference}`: no gradient vanishes on {n} images',
                      formats.percent(found['zero_gradients']), '', not found['zero_gradients']),
            check_row(name, f'`adaptive_pgd` under `{inference}`: what was fooled at a step stays '
                      'so to the last, at every epsilon', formats.percent(most), '', not most)]
    return rows


def epsilons_of(attack, config):
    """Returns at which epsilons flag_rows holds an attack: the slow ones at one."""
    return [config['epsilon']] if attack in SLOW_ATTACKS else EPSILONS


def indicators(model, data, config, inference, n):
    """Returns what is kept of the indicators that need no comparison of two attacks, a dict.

    'zero_gradients': a share of n images, see doubts.Probe.
    'lost_iterates': {epsilon: share of the images that adaptive_pgd fooled, but not at its end}.
    """
    (judge, of_mode), = make_judges(model, data, config, [inference]).items()
    config = {**config, 'num_eval_examples': n, 'num_attack_examples': {}}
    probe, lost = Probe(of_mode, *eval_examples(data, config)), {}
    for epsilon in EPSILONS:
        of_epsilon = {**config, **at_epsilon(epsilon)}

        def again(changed, of_epsilon=of_epsilon):
            return run_direct('adaptive_pgd', model, data, {**of_epsilon, **changed}, judge,
                              of_mode)

        lost[str(epsilon)] = float(np.mean(lost_iterates(again, again({}), of_epsilon)))
    return {'zero_gradients': probe.zero_gradients, 'lost_iterates': lost}


def sweep_checks(name, of_training, attack, inference, config):
    """Returns the checks of one attack's sweeps: no gain by more steps or epsilon, 0 at the end.

    Of the pairs of a sweep's values, the one that is closest to failing is shown.
    """
    rows, label = [], f'`{attack}` under `{inference}`'
    for key, values in SWEEPS.items():
        if (attack, key) == ('adaptive_pgd', 'num_steps'):  # not measured
            continue
        evaluations = {value: swept(of_training, attack, config, key, value) for value in values}

        def gain(pair, evaluations=evaluations):
            return closeness(*(right_of(evaluations[value], inference) for value in pair[::-1]))

        less, more = min(itertools.combinations(values, 2), key=gain)
        rows.append(compared(
            name, f'{label}: accuracy does not rise with {key}; closest: {more} against {less}',
            evaluations[more], evaluations[less], inference))
        if key == 'epsilon':
            left = right_of(evaluations[values[-1]], inference).mean()
            rows.append(check_row(name, f'{label}: accuracy is 0 at {key} {values[-1]}',
                                  formats.percent(left), '', left == 0))
    return rows


def compared(name, what, strong, weak, inference, strictly=False):
    """Returns the check that an attack leaves no more accuracy than a weaker one.

    Args:
        strong, weak: evaluations. strictly: it must leave less.
    """
    a, b = right_in((strong, weak), inference)
    value, interval = paired_difference(a, b)
    holds = fewer(a, b, LEVEL) if strictly else not fewer(b, a, LEVEL)
    return check_row(name, what, f'{formats.percent(a.mean())} / {formats.percent(b.mean())}',
                     formats.difference(value, interval), holds)


def closeness(strong, weak):
    """Returns what is the least for the pair of attacks that is closest to failing."""
    return chance(weak, strong), np.mean(weak) - np.mean(strong)


def right_in(evaluations, inference):
    """Returns who was right in several evaluations, on the images that all of them have."""
    return first_of_all(*(right_of(evaluation, inference) for evaluation in evaluations))


def check_row(name, what, accuracy, difference, holds):
    return [f'`{name}`', what, accuracy, difference, 'holds' if holds else '**fails**']
