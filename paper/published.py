"""The paper's figures and claims, as data; reproduce.py puts ours beside them.

A claim is a difference between two accuracies of the paper's, each named by what it is of:
    (adversary, training mode, attack, inference mode)     Tables I to III
    (n of n:1 in training, n of n:1 in inference)          Table IV, under PGD
    (n of n:1 in training, 'clean')                        section VI, for 2:1
    ('natural', 'clean')                                   section IV: "over 0.93"
"""
from shaping import INFERENCE_MODES

ADV, TRAINING, MAIN = 'adv_only', 'shaping_in_training', 'shaping_in_attack_and_training'

# Tables I and II: {training mode: {attack: accuracy under bn, pn, bn_shaping}}
PAPER_TABLES = {
    'pgd': {
        ADV: {
            'clean': (0.877, 0.869, 0.873), 'pgd': (0.501, 0.47, 0.504),
            'cw': (0.865, 0.821, 0.864), 'fgsm': (0.391, 0.376, 0.395),
            'deepfool': (0.503, 0.071, 0.515), 'shaping': (0.606, 0.614, 0.600)},
        TRAINING: {
            'clean': (0.932, 0.922, 0.932), 'pgd': (0.142, 0.0, 0.384),
            'cw': (0.92, 0.0, 0.896), 'fgsm': (0.263, 0.502, 0.544),
            'deepfool': (0.929, 0.051, 0.903), 'shaping': (0.696, 0.727, 0.447)},
        MAIN: {
            'clean': (0.941, 0.944, 0.942), 'pgd': (0.281, 0.030, 0.816),
            'cw': (0.905, 0.069, 0.904), 'fgsm': (0.552, 0.597, 0.740),
            'deepfool': (0.914, 0.037, 0.911), 'shaping': (0.481, 0.494, 0.533)}},
    'trades': {
        ADV: {
            'clean': (0.890, 0.888, 0.889), 'pgd': (0.476, 0.462, 0.481),
            'cw': (0.880, 0.845, 0.880), 'fgsm': (0.351, 0.347, 0.359),
            'deepfool': (0.521, 0.066, 0.521), 'shaping': (0.522, 0.533, 0.539)},
        TRAINING: {
            'clean': (0.937, 0.925, 0.938), 'pgd': (0.298, 0.028, 0.529),
            'cw': (0.933, 0.053, 0.925), 'fgsm': (0.348, 0.467, 0.489),
            'deepfool': (0.941, 0.052, 0.924), 'shaping': (0.729, 0.851, 0.472)},
        MAIN: {
            'clean': (0.945, 0.945, 0.944), 'pgd': (0.202, 0.004, 0.817),
            'cw': (0.899, 0.026, 0.899), 'fgsm': (0.510, 0.546, 0.737),
            'deepfool': (0.908, 0.037, 0.914), 'shaping': (0.499, 0.521, 0.542)}}}
# Table III, under bn_shaping
PAPER_ADAPTIVE = {'adaptive_weak': {'pgd': 0.518, 'trades': 0.514},
                  'adaptive': {'pgd': 0.508, 'trades': 0.505}}
# Table IV: {n of n:1 in training: accuracy under PGD for each n of n:1 in inference}
INFERENCE_RATIOS = (0, 1, 3, 9, 19, 49)
PAPER_RATIOS = {1: (0.477, 0.478, 0.476, 0.476, 0.477, 0.476),
                2: (0.385, 0.837, 0.835, 0.753, 0.668, 0.573),
                3: (0.281, 0.692, 0.820, 0.817, 0.813, 0.815),
                7: (0.039, 0.138, 0.706, 0.781, 0.776, 0.779)}
PAPER_CONFOUNDINGS = (0.63, 0.17, 0.41)  # sections IV, IV and V

PAPER_CLEAN = {'natural': 0.93, 2: 0.92}  # sections IV, VI: beside the tables

# (where, what is claimed, the accuracy that is the higher one, the other; SAME in between where
# they are claimed to be equal). "Norm shaping" is MAIN by bn_shaping, "the default" ADV by pn. What
# is of the 'tables' is no sentence of the paper's, but what its figures say.
SAME = 'same'
CLAIMS = [
    claim for adversary, name in (('pgd', 'PGD'), ('trades', 'TRADES')) for claim in [
        ('abstract', f'{name}: norm shaping is more accurate than the default',
         (adversary, MAIN, 'clean', 'bn_shaping'), (adversary, ADV, 'clean', 'pn')),
        *(('abstract' if attack == 'pgd' else 'VI',
           f'{name}, under `{attack}`: norm shaping is more robust than the default',
           (adversary, MAIN, attack, 'bn_shaping'), (adversary, ADV, attack, 'pn'))
          for attack in ('pgd', 'cw', 'fgsm', 'deepfool')),
        *(('tables', f'{name}, under `{attack}`: likewise where both answer by `bn_shaping`',
           (adversary, MAIN, attack, 'bn_shaping'), (adversary, ADV, attack, 'bn_shaping'))
          for attack in ('pgd', 'cw', 'fgsm', 'deepfool')),
        ('tables', f'{name}: norm shaping under `adaptive` is more robust than the default under '
         '`pgd`', (adversary, MAIN, 'adaptive', 'bn_shaping'), (adversary, ADV, 'pgd', 'pn')),
        ('VI', f'{name}, under `shaping`: the default is more robust than norm shaping',
         (adversary, ADV, 'shaping', 'pn'), (adversary, MAIN, 'shaping', 'bn_shaping')),
        ('VI', f'{name}, under `shaping`: shaping in training alone, by `pn`, is more robust',
         (adversary, TRAINING, 'shaping', 'pn'), (adversary, MAIN, 'shaping', 'bn_shaping')),
        *(('VI', f'{name}, under `pgd`: the norm-shaped model is more robust by `bn_shaping` than '
           f'by `{inference}`',
           (adversary, MAIN, 'pgd', 'bn_shaping'), (adversary, MAIN, 'pgd', inference))
          for inference in ('pn', 'bn')),
        *(('VI', f'{name}, under `{attack}`: norm shaping is better than shaping in training alone',
           (adversary, MAIN, attack, 'bn_shaping'), (adversary, TRAINING, attack, 'bn_shaping'))
          for attack in ('clean', 'pgd', 'cw', 'fgsm', 'deepfool')),
        ('VI', f'{name}: norm shaping is a little more robust where the attacker does not know the '
         'clean samples', (adversary, MAIN, 'adaptive_weak', 'bn_shaping'),
         (adversary, MAIN, 'adaptive', 'bn_shaping'))]
] + [
    ('IV', 'natural training is more accurate than the default',
     ('natural', 'clean'), ('pgd', ADV, 'clean', 'pn')),
    ('I, VI', 'norm shaping is as accurate as natural training',
     ('pgd', MAIN, 'clean', 'bn_shaping'), SAME, ('natural', 'clean')),
    ('IV', 'the default model is more accurate by `bn` than by `pn` (confounding I)',
     ('pgd', ADV, 'clean', 'bn'), ('pgd', ADV, 'clean', 'pn')),
    ('VI', 'training 1:1: inference 1:9 is no better than 1:0', (1, 9), SAME, (1, 0)),
    ('VI', 'training 1:1, inference 1:9, is no better than the default',
     (1, 9), SAME, ('pgd', ADV, 'pgd', 'pn')),
    ('VI', 'training 1:3 is more robust than 1:1, inference 1:9', (3, 9), (1, 9)),
    ('VI', 'training 1:3 is more robust than 1:2, inference 1:9', (3, 9), (2, 9)),
    ('VI', 'training 1:3 is more robust than 1:7, inference 1:9', (3, 9), (7, 9)),
    ('VI', 'training 1:2 is more robust than 1:3, inference 1:1', (2, 1), (3, 1)),
    ('VI', 'training 1:2 is more robust than 1:3, inference 1:3', (2, 3), (3, 3)),
    ('VI', 'training 1:2: inference 1:1 is more robust than 1:49', (2, 1), (2, 49)),
    ('VI', 'training 1:3 is more accurate than 1:2',
     ('pgd', MAIN, 'clean', 'bn_shaping'), (2, 'clean')),
    ('VI', 'training 1:3: inference 1:3 is more robust than 1:1', (3, 3), (3, 1)),
    ('VI', 'training 1:3: inference 1:49 is no better than 1:3', (3, 49), SAME, (3, 3)),
    ('VI', 'training 1:7: inference 1:9 is more robust than 1:3', (7, 9), (7, 3))]


def paper_accuracy(of):
    """Returns the paper's accuracy of what `of` names, as this file's head says.

    Raises:
        KeyError: the paper has none.
    """
    if of[-1] == 'clean':
        return PAPER_CLEAN[of[0]]
    if len(of) == 2:
        return PAPER_RATIOS[of[0]][INFERENCE_RATIOS.index(of[1])]
    adversary, mode, attack, inference = of
    if mode == MAIN and inference == 'bn_shaping' and attack in PAPER_ADAPTIVE:
        return PAPER_ADAPTIVE[attack][adversary]
    return PAPER_TABLES[adversary][mode][attack][INFERENCE_MODES.index(inference)]
