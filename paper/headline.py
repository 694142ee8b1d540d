"""Clean and robust accuracy on all test images, under the norms that can be deployed."""
import numpy as np

from eval import wilson_interval
from paper import formats
from paper.cells import result_of, right_of, there
from paper.intervals import paired_difference
from paper.published import ADV_ONLY, DEFAULT, MODES, NATURAL, PAPER_TABLES, SHAPED, Training
from paper.trainings import name_of
from running import UserError

SHOWN = (*(Training(adversary, mode) for adversary in PAPER_TABLES for mode in MODES),
         Training('pgd', NATURAL),
         *(training._replace(seed=1) for training in (DEFAULT, SHAPED)))
DEPLOYED = ('pn', 'bn_recorded')
# Auto-PGD's own budget, where it is spent: on the default and on norm shaping as each would be used
FULL_BUDGET = {'apgd_num_steps': 100, 'num_restarts': 5}
FULL_BUDGET_FOR = (DEFAULT, 'pn'), (SHAPED, 'bn_recorded')
HEADER = ['training', 'inference', 'images', 'clean', '`pgd`, made with `pn`', '`adaptive`',
          'robust', '`adaptive`, full budget', 'against the default: clean', 'robust']
CAPTION = ('all test images; accuracy in %, [95% Wilson intervals]; t: transferred; robust: what '
           'both attacks leave; full budget: 100 steps and five starts on each loss, on the first '
           '{n} test images; the default: adversarial-only training by the same adversary, judged '
           'by `pn`; differences in points, [95% intervals of pairs of the same samples]')


def headline_rows(config, evaluations):
    """Returns a row for each training and inference mode; of stored ones, those that are there."""
    kept = [(training, inference, _evaluations(training, inference, config, evaluations))
            for training in there(SHOWN, config, evaluations) for inference in DEPLOYED]
    rows, of_default = [], {}
    for training, inference, (full, *of_attacks) in kept:
        if None in of_attacks:
            continue
        results = [result_of(evaluation, inference) for evaluation in of_attacks]
        right = [right_of(evaluation, inference) for evaluation in of_attacks]
        most, fewest = max(map(len, right)), min(map(len, right))  # num_attack_examples names one
        robust = np.all([of_attack[:fewest] for of_attack in right], axis=0)
        if training == Training(training.adversary, ADV_ONLY) and inference == 'pn':
            of_default[training.adversary] = right[0], robust
        theirs = of_default.get(training.adversary)
        differences = [''] * 2 if theirs is None or theirs[1] is robust else [
            formats.difference(*paired_difference(*both))
            for both in zip((right[0], robust), theirs)]
        rows.append([f'`{name_of(training, config)}`', f'`{inference}`', most,
                     *(formats.accuracy(result, most) for result in results),
                     formats.share(robust.mean(), wilson_interval(robust.sum(), fewest)),
                     formats.accuracy(result_of(full, inference)) if full else '', *differences])
    if not rows:
        raise UserError('no accuracy on all test images is stored')
    return rows


def _evaluations(training, inference, config, evaluations):
    """Returns a row's evaluations: full budget, clean, pgd, adaptive; None where one is lacking."""
    of_training = evaluations[name_of(training, config)]

    def kept(attack, inferences, **settings):
        return of_training.if_kept(of_training.attack, attack, inferences, **settings)

    on_all = {'num_eval_examples': of_training.num_test_images()}
    return [kept('adaptive', (inference,), **FULL_BUDGET)
            if (training, inference) in FULL_BUDGET_FOR else None,
            *(kept(attack, DEPLOYED, **on_all) for attack in ('clean', 'pgd')),
            kept('adaptive', (inference,), **on_all)]
