"""Clean and robust accuracy on all test images, under the norms that can be deployed.

Of stored numbers, on the most images that all three evaluations of a row were run on.
"""
import numpy as np

from attacks import DIRECT
from doubts import first_of_all
from eval import wilson_interval
from paper import formats
from paper.cells import result_of, right_in_draws, right_of
from paper.published import ADV_ONLY, DEFAULT, MODES, NATURAL, PAPER_TABLES, SHAPED, Training
from paper.trainings import name_of
from running import UserError

SHOWN = (*(Training(adversary, mode) for adversary in PAPER_TABLES for mode in MODES),
         Training('pgd', NATURAL),
         *(training._replace(seed=1) for training in (DEFAULT, SHAPED)))
DEPLOYED = ('pn', 'bn_recorded')
# The default and norm shaping are attacked with the full budget, too, under the norms that each
# would be deployed with
FULL_BUDGET = {'apgd_num_steps': 100, 'num_restarts': 5}
FULL_BUDGET_FOR = (DEFAULT, 'pn'), (SHAPED, 'bn_recorded')
HEADER = ['training', 'inference', 'images', 'clean', '`pgd`, made with `pn`', '`adaptive`',
          'robust', '`adaptive`, full budget', 'against the default: clean', 'robust',
          'robust, both by `bn_recorded`']
CAPTION = ('the first test images, as many as `images` says{evaluated}; accuracy in %, [95% Wilson '
           'intervals]; t: transferred; robust: what both attacks leave; full budget: 100 steps '
           'and five starts on each loss, on the first {n} test images; the default: '
           'adversarial-only training by the same adversary and seed, judged by `pn`; differences '
           'in points, [95% intervals of pairs of the same samples]')


def headline_rows(config, evaluations):
    """Returns a row for each training and inference mode; of stored ones, those that are there."""
    all_kept = [(training, inference, of_row(inference, evaluations[name_of(training, config)],
                                             (training, inference) in FULL_BUDGET_FOR))
                for training in SHOWN for inference in DEPLOYED]
    rows, of_default = [], {}
    for training, inference, (full, *of_attacks) in all_kept:
        if None in of_attacks:
            continue
        results = [result_of(evaluation, inference) for evaluation in of_attacks]
        robust = survivors(of_attacks, inference)
        ours = right_in_draws(of_attacks[0], inference), robust
        n = max(result['num_examples'] for result in results)
        of = training.adversary, training.seed
        if training.mode == ADV_ONLY:
            of_default[of, inference] = ours
        few = f' (n = {len(robust)})' if len(robust) < n else ''
        rows.append([f'`{name_of(training, config)}`', f'`{inference}`', n,
                     *(formats.accuracy(result, n) for result in results),
                     formats.share(robust.mean(), wilson_interval(robust.sum(), len(robust))) + few,
                     formats.accuracy(result_of(full, inference)) if full else '',
                     *formats.against(ours, of_default.get((of, 'pn'))),
                     formats.against(ours, of_default.get((of, inference)))[1]
                     if inference == 'bn_recorded' else ''])
    if not rows:
        raise UserError('no row of clean accuracy, pgd and adaptive is stored')
    return rows


def survivors(of_attacks, inference):
    """Returns which images are right under all of some evaluations, bool [fewest of them]."""
    # num_attack_examples may be less for one of them
    return np.all(first_of_all(*(right_of(each, inference) for each in of_attacks)), axis=0)


def of_row(inference, of_training, with_full_budget):
    """Returns a row's evaluations: full budget, clean, pgd, adaptive; None where one is lacking."""
    def kept(attack, inferences, **settings):
        changed = {key: value for key, value in settings.items()
                   if of_training.config[key] != value}
        as_table1 = None
        if attack not in DIRECT and not changed:  # the same as Table I asks for
            as_table1 = of_training.if_kept(of_training.attack, attack)
        return as_table1 if as_table1 is not None else of_training.if_kept(
            of_training.attack, attack, inferences, **changed)

    full = kept('adaptive', (inference,), **FULL_BUDGET) if with_full_budget else None
    row = [None] * 3
    for n in reversed(of_training.numbers_of_images()):  # the most that all three were run on
        row = [*(kept(attack, DEPLOYED, num_eval_examples=n) for attack in ('clean', 'pgd')),
               kept('adaptive', (inference,), num_eval_examples=n)]
        if None not in row:
            break
    return [full, *row]


def is_shown(of_training):
    """Returns whether a training has a row."""
    return any(None not in of_row(inference, of_training, False)[1:] for inference in DEPLOYED)
