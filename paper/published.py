"""The paper's numbers and claims, as data. The rest of this room puts ours beside them."""
import math
from typing import NamedTuple

NATURAL, ADV_ONLY = 'natural', 'adv_only'
IN_TRAINING, NORM_SHAPING = 'shaping_in_training', 'shaping_in_attack_and_training'
# Tables I and II: training modes, attacks and inference modes, in the paper's order
MODES = {ADV_ONLY: 'adv. only', IN_TRAINING: 'shaping in training',
         NORM_SHAPING: 'shaping in attack + training'}
PAPER_ATTACKS = ('clean', 'pgd', 'cw', 'fgsm', 'deepfool', 'shaping')
INFERENCES = ('bn', 'pn', 'bn_shaping')


class Training(NamedTuple):
    """One of the paper's trainings, or the same with another seed, or with a change of ours."""
    adversary: str            # 'pgd' or 'trades'
    mode: str                 # NATURAL, ADV_ONLY, IN_TRAINING or NORM_SHAPING
    ratio: int | None = None  # n of n:1; None: the configuration's shaping_ratio, the paper's 3
    seed: int = 0             # added to the configuration's seeds
    variant: str = ''         # one of trainings.VARIANTS: what else differs; '': nothing


# The paper's default, and its method: what most of our tables show
DEFAULT, SHAPED = Training('pgd', ADV_ONLY), Training('pgd', NORM_SHAPING)


class Accuracy(NamedTuple):
    """Names one accuracy: of which training, under which attack, judged by which inference."""
    training: Training
    attack: str
    inference: str
    inference_ratio: int | None = None  # n of n:1, as Table IV varies it; None: the paper's 9


# What a claim says of the difference, higher - lower; paper/claims.py says how large is small
MORE = 'more'        # it is above zero
SAME = 'same'        # it is small, either way
NO_MORE = 'no more'  # it is small or below zero: "is no better than"
CLOSE = 'close'      # it is above zero, or not far below: "close to the best"


class Claim(NamedTuple):
    """A claim of the paper that compares two accuracies."""
    where: str            # the section; 'tables': no sentence says it, but the tables' numbers do
    words: str
    higher: Accuracy
    lower: Accuracy
    kind: str = MORE
    others: tuple = ()    # more Accuracies beside `lower`: the claim is about the best of them


# Tables I and II, as accuracies; the paper prints "clean" as "Acc", beside "PGD"
PAPER_TABLES = {
    'pgd': {
        ADV_ONLY: {         # BN     PN     BN+shaping
            'clean':       (0.877, 0.869, 0.873),
            'pgd':         (0.501, 0.470, 0.504),
            'cw':          (0.865, 0.821, 0.864),
            'fgsm':        (0.391, 0.376, 0.395),
            'deepfool':    (0.503, 0.071, 0.515),
            'shaping':     (0.606, 0.614, 0.600),
        },
        IN_TRAINING: {      # BN     PN     BN+shaping
            'clean':       (0.932, 0.922, 0.932),
            'pgd':         (0.142, 0.000, 0.384),
            'cw':          (0.920, 0.000, 0.896),
            'fgsm':        (0.263, 0.502, 0.544),
            'deepfool':    (0.929, 0.051, 0.903),
            'shaping':     (0.696, 0.727, 0.447),
        },
        NORM_SHAPING: {     # BN     PN     BN+shaping
            'clean':       (0.941, 0.944, 0.942),
            'pgd':         (0.281, 0.030, 0.816),
            'cw':          (0.905, 0.069, 0.904),
            'fgsm':        (0.552, 0.597, 0.740),
            'deepfool':    (0.914, 0.037, 0.911),
            'shaping':     (0.481, 0.494, 0.533),
        },
    },
    'trades': {
        ADV_ONLY: {         # BN     PN     BN+shaping
            'clean':       (0.890, 0.888, 0.889),
            'pgd':         (0.476, 0.462, 0.481),
            'cw':          (0.880, 0.845, 0.880),
            'fgsm':        (0.351, 0.347, 0.359),
            'deepfool':    (0.521, 0.066, 0.521),
            'shaping':     (0.522, 0.533, 0.539),
        },
        IN_TRAINING: {      # BN     PN     BN+shaping
            'clean':       (0.937, 0.925, 0.938),
            'pgd':         (0.298, 0.028, 0.529),
            'cw':          (0.933, 0.053, 0.925),
            'fgsm':        (0.348, 0.467, 0.489),
            'deepfool':    (0.941, 0.052, 0.924),
            'shaping':     (0.729, 0.851, 0.472),
        },
        NORM_SHAPING: {     # BN     PN     BN+shaping
            'clean':       (0.945, 0.945, 0.944),
            'pgd':         (0.202, 0.004, 0.817),
            'cw':          (0.899, 0.026, 0.899),
            'fgsm':        (0.510, 0.546, 0.737),
            'deepfool':    (0.908, 0.037, 0.914),
            'shaping':     (0.499, 0.521, 0.542),
        },
    },
}
# Attacks under which the paper's numbers and ours do not mean the same, and why
NOT_COMPARABLE = {
    'cw': "made and judged with `pn`, the paper's C&W leaves 82.1 of the default model, ours 0.0: "
          'it seems to have had pixels of [0, 255], on which its settings give up (table `scales`)'}
# Table III, judged by bn_shaping
PAPER_ADAPTIVE = {
    'adaptive_weak': {'pgd': 0.518, 'trades': 0.514},
    'adaptive_pgd':  {'pgd': 0.508, 'trades': 0.505},
}
# Table IV: norm shaping (PGD) under PGD. Rows: n of n:1 in training; columns: in inference
INFERENCE_RATIOS = (0, 1, 3, 9, 19, 49)
PAPER_RATIOS = {
    1: (0.477, 0.478, 0.476, 0.476, 0.477, 0.476),
    2: (0.385, 0.837, 0.835, 0.753, 0.668, 0.573),
    3: (0.281, 0.692, 0.820, 0.817, 0.813, 0.815),
    7: (0.039, 0.138, 0.706, 0.781, 0.776, 0.779),
}
# In the text: how much larger one size is than another, on average
PAPER_EXCESS = {
    'logit_errors': 0.63,  # section IV: logit errors, clean over adversarial batch norms
    'pn': 0.17,            # section IV: PGD's perturbations, population norms over batch norms
    'shaping': 0.41,       # section V: PGD's perturbations, norm shaping over batch norms
}
# In the text: accuracy on clean images, beside the tables
PAPER_CLEAN = {Training('pgd', NORM_SHAPING, 2): 0.92}  # section VI
PAPER_CLEAN_OVER = {Training('pgd', NATURAL): 0.93}     # section IV: "over 0.93", a lower bound


def _claims_of(adversary, name):
    """Returns the claims that the paper makes of PGD and of TRADES alike.

    "Norm shaping" is NORM_SHAPING judged by bn_shaping, "the default" ADV_ONLY judged by pn.
    """
    default, training_alone, shaping = (
        Training(adversary, mode) for mode in (ADV_ONLY, IN_TRAINING, NORM_SHAPING))

    def shaped(attack):
        return Accuracy(shaping, attack, 'bn_shaping')

    return [
        Claim('abstract', f'{name}: norm shaping is more accurate than the default',
              shaped('clean'), Accuracy(default, 'clean', 'pn')),
        *(Claim('abstract' if attack == 'pgd' else 'VI',
                f'{name}, under `{attack}`: norm shaping is more robust than the default',
                shaped(attack), Accuracy(default, attack, 'pn'))
          for attack in ('pgd', 'cw', 'fgsm', 'deepfool')),
        *(Claim('tables', f'{name}, under `{attack}`: norm shaping is more robust than the '
                'default, both judged by `bn_shaping`',
                shaped(attack), Accuracy(default, attack, 'bn_shaping'))
          for attack in ('pgd', 'cw', 'fgsm', 'deepfool')),
        Claim('tables', f'{name}: norm shaping under `adaptive_pgd` is more robust than the '
              'default under `pgd`',
              shaped('adaptive_pgd'), Accuracy(default, 'pgd', 'pn')),
        Claim('VI', f'{name}, under `shaping`: the default is more robust than norm shaping',
              Accuracy(default, 'shaping', 'pn'), shaped('shaping')),
        Claim('VI', f'{name}, under `shaping`: shaping in training alone, judged by `pn`, is more '
              'robust than norm shaping',
              Accuracy(training_alone, 'shaping', 'pn'), shaped('shaping')),
        Claim('VI', f'{name}, under `pgd`: the norm-shaped model is more robust by `bn_shaping` '
              'than by `pn`',
              shaped('pgd'), Accuracy(shaping, 'pgd', 'pn')),
        *(Claim('VI', f'{name}, under `{attack}`: the norm-shaped model is better by `bn_shaping` '
                'than by `bn`',
                shaped(attack), Accuracy(shaping, attack, 'bn'))
          for attack in ('clean', 'pgd', 'cw', 'fgsm', 'deepfool')),
        *(Claim('VI', f'{name}, under `{attack}`: norm shaping is better than shaping in training '
                'alone',
                shaped(attack), Accuracy(training_alone, attack, 'bn_shaping'))
          for attack in ('clean', 'pgd', 'cw', 'fgsm', 'deepfool')),
        *(Claim('VI', f'{name}, under `{attack}`: norm shaping is better than a simple mix',
                shaped(attack), Accuracy(training_alone, attack, 'pn'))
          for attack in ('clean', 'pgd')),
        *(_close_to_the_best(adversary, name, attack)
          for attack in ('pgd', 'cw', 'fgsm', 'deepfool')),
        Claim('VI', f'{name}: norm shaping is a little more robust where the attacker does not '
              'know the clean samples',
              shaped('adaptive_weak'), shaped('adaptive_pgd'))]


def _close_to_the_best(adversary, name, attack):
    """Returns the claim that norm shaping is close to the best of a table's other numbers."""
    ours = Accuracy(Training(adversary, NORM_SHAPING), attack, 'bn_shaping')
    all_of_them = [Accuracy(Training(adversary, mode), attack, inference)
                   for mode in MODES for inference in INFERENCES]
    first, *others = [of for of in all_of_them if of != ours]
    return Claim('VI', f'{name}, under `{attack}`: norm shaping is close to the best of the other '
                 'trainings and inferences', ours, first, CLOSE, tuple(others))


def _table4(in_training, in_inference):
    """Names an accuracy of Table IV: n of n:1 in training, and in inference."""
    return Accuracy(Training('pgd', NORM_SHAPING, in_training), 'pgd', 'bn_shaping', in_inference)


_NATURAL = Accuracy(Training('pgd', NATURAL), 'clean', 'pn')
# Section VI compares 0.92 with 0.944, which is `pn` in Table I; so by `pn` they are compared
_CLEAN_3_TO_1, _CLEAN_2_TO_1 = (Accuracy(Training('pgd', NORM_SHAPING, ratio), 'clean', 'pn')
                                for ratio in (None, 2))

CLAIMS = [
    *_claims_of('pgd', 'PGD'),
    *_claims_of('trades', 'TRADES'),
    Claim('IV', 'natural training is more accurate than the default',
          _NATURAL, Accuracy(DEFAULT, 'clean', 'pn')),
    Claim('I, VI', 'norm shaping is as accurate as natural training',
          Accuracy(SHAPED, 'clean', 'bn_shaping'), _NATURAL, SAME),
    Claim('IV', 'the default model is more accurate by `bn` than by `pn` (confounding I)',
          Accuracy(DEFAULT, 'clean', 'bn'), Accuracy(DEFAULT, 'clean', 'pn')),
    Claim('VI', 'training 1:1: inference 9:1 makes no difference to 0:1',
          _table4(1, 9), _table4(1, 0), SAME),
    Claim('VI', 'training 1:1, inference 9:1, is no better than the default',
          _table4(1, 9), Accuracy(DEFAULT, 'pgd', 'pn'), NO_MORE),
    Claim('VI', 'training 3:1 is more robust than 1:1, inference 9:1',
          _table4(3, 9), _table4(1, 9)),
    Claim('VI', 'training 3:1 is more robust than 2:1, inference 9:1',
          _table4(3, 9), _table4(2, 9)),
    Claim('VI', 'training 3:1 is more robust than 7:1, inference 9:1',
          _table4(3, 9), _table4(7, 9)),
    Claim('VI', 'training 2:1 is more robust than 3:1, inference 1:1',
          _table4(2, 1), _table4(3, 1)),
    Claim('VI', 'training 2:1 is more robust than 3:1, inference 3:1',
          _table4(2, 3), _table4(3, 3)),
    Claim('VI', 'training 2:1: inference 1:1 is more robust than 49:1',
          _table4(2, 1), _table4(2, 49)),
    Claim('VI', 'training 3:1 is more accurate than 2:1, both judged by `pn`',
          _CLEAN_3_TO_1, _CLEAN_2_TO_1),
    Claim('VI', 'training 3:1: inference 3:1 is more robust than 1:1',
          _table4(3, 3), _table4(3, 1)),
    Claim('VI', 'training 3:1: inference 49:1 is no better than 3:1',
          _table4(3, 49), _table4(3, 3), NO_MORE),
    Claim('VI', 'training 3:1: inference 49:1 is no worse than 3:1',
          _table4(3, 3), _table4(3, 49), NO_MORE),
    Claim('VI', 'training 7:1: inference 9:1 is more robust than 3:1',
          _table4(7, 9), _table4(7, 3))]


def paper_accuracy(of):
    """Returns the paper's number of an Accuracy.

    Raises:
        KeyError: the paper has none.
    """
    adversary, mode, ratio, *_ = of.training
    if of.inference_ratio is not None:
        return PAPER_RATIOS[ratio][INFERENCE_RATIOS.index(of.inference_ratio)]
    if of.attack == 'clean' and of.training in PAPER_CLEAN | PAPER_CLEAN_OVER:
        return (PAPER_CLEAN | PAPER_CLEAN_OVER)[of.training]
    if ratio is not None:
        raise KeyError(of)
    if mode == NORM_SHAPING and of.inference == 'bn_shaping' and of.attack in PAPER_ADAPTIVE:
        return PAPER_ADAPTIVE[of.attack][adversary]
    return PAPER_TABLES[adversary][mode][of.attack][INFERENCES.index(of.inference)]


def paper_difference(claim):
    """Returns the paper's difference of a claim, (least, most): the same, unless one is a bound."""
    lower = max(map(paper_accuracy, (claim.lower, *claim.others)))
    difference = paper_accuracy(claim.higher) - lower
    return (-math.inf if claim.lower.training in PAPER_CLEAN_OVER else difference,
            math.inf if claim.higher.training in PAPER_CLEAN_OVER else difference)
