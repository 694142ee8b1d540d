"""When does the paper's gap between `pn` and `bn_shaping` open? One thing varied at a time.

The paper has 3.0 under `pn` and 81.6 under `bn_shaping` for the same examples, made with `pn`. Each
row here goes one step from our training towards the paper's, or towards a mistake that would make
such numbers. A row of the second kind is conjecture: it says what a mistake would look like, not
that it was made.
"""
from typing import NamedTuple

from attacks import make_attack, num_examples
from config import relevant
from eval import evaluate_attack, make_judges
from model import network_name
from paper import formats
from paper.cells import kept_of, result_of, right_of
from paper.experiments import mean_shifts, norm_shifts
from paper.intervals import paired_difference
from paper.published import (INFERENCES, NATURAL, NORM_SHAPING, PAPER_ATTACKS, PAPER_TABLES, SHAPED,
                             Training)
from paper.trainings import changes_nothing, config_of, name_of
from running import UserError
from train import make_optimizer

MAX_EXAMPLES = 1000
NETWORK = '{network}'
HEADER = ['varied', 'value', 'learning rate', 'clean, `pn`', 'clean, `bn_shaping`',
          '`pgd` made with `pn`, judged by `pn`', 'the same examples, `bn_shaping`', 'difference',
          '`adaptive_pgd`, `bn_shaping`', 'norms moved by the tail / by chance']
NOTE = ('Learning rate: the one at which the checkpoint is judged. Norms moved: how far PGD on the '
        'tail moves the means of the batch norms, in standard deviations, beside how far another '
        'clean batch does. Empty: that of an earlier row, or not stored. Attacks are those of the '
        'first row in all rows. `bn_shaping` is one draw here, the mean of five in Table I and in '
        'the table `gap`. Conjecture: what a mistake of this kind would look like; nothing says '
        'that the paper made it.')


class Variation(NamedTuple):
    """A row: what is varied, from norm shaping as configured."""
    varied: str
    value: str                       # NETWORK stands for the network's name
    training: Training
    norms: str = 'trained'           # how the population norms are made; see population_norms.py
    source: Training | None = None   # makes the examples, and `pn` is that of its model


def _shaped(variant, seed=0):
    return SHAPED._replace(variant=variant, seed=seed)


VARIATIONS = (
    Variation('nothing', 'seed 1', SHAPED),
    Variation('nothing', 'seed 2', SHAPED._replace(seed=1)),
    Variation('learning rate', 'before the first cut, seed 1', _shaped('half')),
    Variation('learning rate', 'before the first cut, seed 2', _shaped('half', 1)),
    Variation('learning rate', 'before the second cut', _shaped('three_quarters')),
    *(Variation('decay of the moving averages', f'{decay}, before the first cut, seed {seed + 1}',
                _shaped('half', seed), f'decay {decay}') for decay in (0.5, 0.99)
      for seed in (0, 1)),
    *(Variation('population norms of older weights',
                f'{steps} steps, before the first cut, seed {seed + 1}', _shaped('half', seed),
                f'stale {steps}') for steps in (10, 100, 1000) for seed in (0, 1)),
    Variation("the training's `attack_norms`", '`fixed` for `batch`, or the reverse',
              _shaped('other_norms')),
    Variation('depth', NETWORK, _shaped('w32')),
    Variation('width', NETWORK, _shaped('width2')),
    Variation('width', NETWORK, _shaped('width4')),
    Variation('precision', 'mixed_bfloat16', _shaped('bfloat16')),
    Variation('training time', 'a third', _shaped('third')),
    Variation('training time', '8 times', _shaped('longer')),
    Variation('training time', '8 times, no augmentation', _shaped('fitted')),
    Variation('conjecture: the attack in training', 'one step of epsilon', _shaped('one_step')),
    Variation('conjecture: the attack in training', f'one step of epsilon, {NETWORK}',
              _shaped('width4_one_step')),
    Variation('conjecture: examples and `pn` of another model', 'natural training', SHAPED,
              source=Training('pgd', NATURAL)),
    Variation('conjecture: examples and `pn` of another model', 'half of the training', SHAPED,
              source=_shaped('half')),
)
CROSSED = Training('pgd', NATURAL), SHAPED  # makes the examples; is held for it
CROSSED_HEADER = ['attack', '`bn`, norm shaping', 'paper', '`pn`, natural training', 'paper',
                  '`bn_shaping`, norm shaping', 'paper']
CROSSED_NOTE = (
    'Conjecture: as if the examples had been made on a naturally trained model, and the column of '
    "`pn` were of that model. The paper's numbers are those of its norm-shaped model in Table I. "
    'Nothing says that it made this mistake.')
TRAININGS = tuple(dict.fromkeys(training for each in VARIATIONS
                                for training in (each.training, each.source) if training))


def variation_rows(config, evaluations):
    """Returns a row for each variation; of stored evaluations, for those that are there."""
    rows = [row for row in (_row(each, config, evaluations) for each in varied_by(config)) if row]
    if not rows:
        raise UserError('nothing is stored of norm shaping and what varies it')
    paper = PAPER_TABLES['pgd'][NORM_SHAPING]
    pn, shaped = map(INFERENCES.index, ('pn', 'bn_shaping'))
    # Its last learning rate is that of the original's config.json, which it uses
    return [*rows, ['all of it', 'the paper: w32-10, ten classes, 80,000 steps', '0.001', *(
        formats.percent(paper[attack][i]) for attack in ('clean', 'pgd') for i in (pn, shaped)),
        f'{100 * (paper["pgd"][shaped] - paper["pgd"][pn]):+.1f}', '', '']]


def varied_by(config):
    """Yields those of VARIATIONS that change something, with the network's name filled in."""
    for each in VARIATIONS:
        if not changes_nothing(each.training, config):
            network = network_name(config_of(each.training, config))
            yield each._replace(value=each.value.replace(NETWORK, network))


def is_shown(of_training):
    """Returns whether a training has a row. What natural training makes is kept with its target."""
    return of_training.has() or of_training.config['training_mode'] == NATURAL


def differences(config, evaluations):
    """Returns {what is varied, to which value: (difference, interval)} of the rows, for a plot."""
    found = {}
    for each in varied_by(config):
        judged = _judged(each, config, evaluations)
        if judged:
            found[each.varied, each.value] = paired_difference(
                *(right_of(judged[1], inference) for inference in ('bn_shaping', 'pn')))
    return found


def _row(each, config, evaluations):
    judged = _judged(each, config, evaluations)
    if judged is None:
        return None
    of_training, n = evaluations[name_of(each.training, config)], _number(config)
    clean, pgd = judged
    row = [each.varied, each.value, f'{_learning_rate(of_training.config):g}',
           *(formats.accuracy(result_of(clean, by), n) for by in ('pn', 'bn_shaping')),
           *formats.pn_and_shaping(pgd, n)]
    if each.norms != 'trained' or each.source:  # the rest is that of an earlier row
        return [*row, '', '']
    settings = _attack(config, of_training)
    adaptive = of_training.if_kept(of_training.attack, 'adaptive_pgd', ('bn_shaping',), **settings)
    shifts = of_training.if_kept(of_training.experiment, norm_shifts,
                                 relevant({**of_training.config, **settings}), mean_shifts,
                                 **settings)
    return [*row, formats.accuracy(result_of(adaptive, 'bn_shaping'), n) if adaptive else '',
            f'{shifts["tail"][0]:.3f} / {shifts["another"][0]:.3f}' if shifts else '']


def _judged(each, config, evaluations):
    """Returns the evaluations of clean images and of PGD's examples; None where one is lacking."""
    of_training = evaluations[name_of(each.training, config)]
    source = each.source and evaluations[name_of(each.source, config)]
    found = []
    for attack in ('clean', 'pgd'):
        if source:
            found.append(of_training.if_kept(crossed, attack, source, of_training, config))
        else:
            found.append(of_training.if_kept(
                of_training.attack, attack, ('pn', 'bn_shaping'), norms=each.norms,
                **_attack(config, of_training)))
    return None if None in found else found


def crossed(attack, source, target, config):
    """Returns the evaluation of one model's examples, judged by its `pn` and another's batch norms.

    Args:
        attack: 'clean', or one that is not direct.
        source, target: Evaluations of the training that makes the examples, and of the other, which
            judges them by bn and bn_shaping.
    """
    settings = {**target.config, **_attack(config, target)}

    def compute(unfinished):
        data, model = target.data, target.load()
        other = source.twin()
        judges = (make_judges(other, data, settings, ['pn'])
                  | make_judges(model, data, settings, ['bn', 'bn_shaping']))
        results, found = evaluate_attack(
            attack, make_attack(attack, other, data, settings), data, settings, judges, 1,
            unfinished, shard=target.shard)
        return kept_of(results, found.in_ball)

    identity = {**relevant(settings, attack), 'num_examples': num_examples(attack, settings)}
    return target.get(f'{attack}-crossed-{source.name}', identity, compute, source.digests[:1])


def crossed_rows(config, evaluations):
    """Returns the paper's attacks as if its `pn` column were that of another model."""
    source, target = (evaluations[name_of(each, config)] for each in CROSSED)
    found = {attack: crossed(attack, source, target, config) for attack in PAPER_ATTACKS}
    return [[attack, *(cell for i, inference in enumerate(INFERENCES) for cell in (
        formats.accuracy(result_of(evaluation, inference), _number(config)),
        formats.percent(PAPER_TABLES['pgd'][NORM_SHAPING][attack][i])))]
        for attack, evaluation in found.items()]


def _number(config):
    return min(MAX_EXAMPLES, config['num_eval_examples'])


def _attack(config, of_training):
    """Returns the changed keys under which an attack is that of the first row."""
    changed = {key: config[key] for key in ('num_steps', 'step_size', 'random_start')
               if of_training.config[key] != config[key]}
    return {'num_eval_examples': _number(config), **changed}


def _learning_rate(config):
    """Returns the learning rate of a training's last step."""
    optimizer = make_optimizer(config)
    optimizer.iterations.assign(config['max_num_training_steps'] - 1)
    return float(optimizer.learning_rate)


def check_steps(config, data):
    """Raises UserError where half of the training would be nothing."""
    if config['max_num_training_steps'] < 2:
        raise UserError('max_num_training_steps must be at least 2, as the training is judged at '
                        'half of it, too, got 1')
