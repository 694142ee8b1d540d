"""In-text experiments: what batch norms do to an attack, and how far an attack moves them.

The paper's three (sections IV and V) report how much larger one size is than another, on
average. Whether it averages ratios is left open; ours is the ratio of the two means. A fourth, of
our own, measures how far an attack moves the batch norms, which is where the paper's confoundings
come from. All are over the same training images in batches of training_batch_size, unaugmented.
"""
from functools import partial

import numpy as np

from config import relevant
import tensorflow as tf

from paper.claims import verdict
from paper.intervals import bootstrap, excess
from paper.population_norms import batch_statistics, population_norms
from paper.published import DEFAULT, PAPER_EXCESS, SHAPED
from paper.trainings import name_of
from pgd_attack import LinfPGDAttack
from running import UserError
from running.unfinished import batches
from shaping import tail_mask

HEADER = ['how much larger on average', 'model', 'ours', 'the two means', 'paper', 'at this scale']
SHIFTS_HEADER = ['training', 'attack', 'the means move by', 'the deviations by']

# Which two of an experiment's sizes are compared: {name: (the larger one, the other)}
LOGIT_ERRORS = {'the same norms': ('clean norms', 'adversarial norms'),
                "its own batch's norms": ('clean norms', 'adversarial norms, clean logits')}
PERTURBATION_SIZES = {'pn': ('pn', 'bn'), 'shaping': ('shaping', 'bn')}


# ---- what is measured


def num_measured(data, config):
    """Returns how many training images are measured: num_eval_examples, in whole batches."""
    m = config['training_batch_size']
    return min(config['num_eval_examples'], data.train_data.n) // m * m


def logit_errors(model, data, config, kept=None):
    """Returns the logit errors of FGSM examples under clean and under adversarial batch norms.

    Section IV, confounding II (63%). The examples are one step of PGD, step_size long, without a
    random start, through the batch norms of the clean batch. The error is the mean absolute
    difference of the logits between an example and its clean version.

    The paper leaves open what the clean version is normalized by, so both are computed.

    Args:
        kept: path of a file for this experiment alone, in which finished batches are kept; its name
            must say what the sizes depend on (unfinished.path_of). None: nothing is kept.

    Returns:
        dict of arrays [n]. 'clean norms': example and clean version under the clean batch's norms.
        'adversarial norms': both under the adversarial batch's norms. 'adversarial norms, clean
        logits': the example under the adversarial batch's norms, its clean version under the clean
        batch's.
    """
    step = config['step_size']
    fgsm = LinfPGDAttack(model, epsilon=step, num_steps=1, step_size=step, random_start=False,
                         loss_func='xent', update_population_norms=False)

    @tf.function
    def by_norms_of(x, other):
        """Returns the logits of two batches by the batch norms of the first."""
        return tf.split(model(tf.concat([x, other], 0), norms_from=len(x)), 2)

    def error(a, b):
        return tf.reduce_mean(tf.abs(a - b), axis=1).numpy()

    n, subset = num_measured(data, config), data.train_data
    errors = {name: np.zeros(n, np.float32) for name in (
        'clean norms', 'adversarial norms', 'adversarial norms, clean logits')}
    for start, end in batches(kept, [*errors.values()], n, config['training_batch_size'],
                              'logit_errors'):
        x, y = subset.xs[start:end].astype(np.float32), subset.ys[start:end]
        x_adv = fgsm.perturb(x, y, 0)
        clean, adv_by_clean = by_norms_of(x, x_adv)
        adv, clean_by_adv = by_norms_of(x_adv, x)
        errors['clean norms'][start:end] = error(adv_by_clean, clean)
        errors['adversarial norms'][start:end] = error(adv, clean_by_adv)
        errors['adversarial norms, clean logits'][start:end] = error(adv, clean)
    return errors


def perturbation_sizes(model, data, config, kept=None):
    """Returns the mean absolute perturbations, in pixels, that PGD makes with three kinds of norms.

    PGD as configured. Section IV, confounding III: 17% more with population norms than with batch
    norms. Section V: 41% more with norm shaping.

    Args:
        kept: as in logit_errors.

    Returns:
        dict of arrays [n]. 'pn', 'bn': all samples of a batch are attacked, with population norms
        and with batch norms. 'shaping': with batch norms, the tail alone is attacked beside the
        clean head. Each share of a batch is the tail once, so that all samples are attacked.
    """
    def attack(training):
        return LinfPGDAttack.from_config(model, config, training=training,
                                         update_population_norms=False)

    by_bn, by_pn = attack(True), attack(False)
    m, n, subset = config['training_batch_size'], num_measured(data, config), data.train_data
    tail = tail_mask(m, config['shaping_ratio'])
    sizes = {name: np.zeros(n, np.float32) for name in ('pn', 'bn', 'shaping')}
    for start, end in batches(kept, [*sizes.values()], n, m, 'perturbation_sizes'):
        x, y = subset.xs[start:end].astype(np.float32), subset.ys[start:end]
        seed = (config['np_random_seed'], start // m)
        shaped = np.empty_like(x)
        for share in range(config['shaping_ratio'] + 1):
            order = np.roll(np.arange(len(x)), share * tail.sum())
            shaped[order[tail]] = by_bn.perturb(x[order], y[order], seed, tail).numpy()[tail]
        for name, x_adv in (('pn', by_pn.perturb(x, y, seed)), ('bn', by_bn.perturb(x, y, seed)),
                            ('shaping', shaped)):
            sizes[name][start:end] = np.abs(np.asarray(x_adv) - x).mean(axis=(1, 2, 3))
    return sizes


def norm_shifts(model, data, config, kept=None):
    """Returns how far the batch norms of another batch are from those of a clean training batch.

    Args:
        kept: as in logit_errors.

    Returns:
        dict of arrays [batches], for three other batches. 'all': the same batch after PGD, as
        configured, on every sample. 'tail': after PGD on the tail alone, beside the clean head
        (section V: shaping keeps the norms stable). 'another': the next clean batch, which shows
        how far batch norms differ by chance. Under these names, the distance of the means, in
        standard deviations of the clean batch, averaged over all channels of all norms. Under
        '... deviations', the relative distance of the standard deviations.
    """
    attack = LinfPGDAttack.from_config(model, config, update_population_norms=False)
    m, n, subset = config['training_batch_size'], num_measured(data, config), data.train_data
    statistics, tail = batch_statistics(model), tail_mask(m, config['shaping_ratio'])
    shifts = {name + what: np.zeros(n // m, np.float32) for name in ('all', 'tail', 'another')
              for what in ('', ' deviations')}
    is_mean = np.array([v.name.endswith('moving_mean') for v in population_norms(model)])

    def parts(x):
        found = statistics(x)
        return np.concatenate(found[is_mean]), np.concatenate(found[~is_mean]) ** 0.5

    for start, end in batches(kept, [*shifts.values()], n // m, 1, 'norm_shifts'):
        x, y = (values[start * m:end * m] for values in (subset.xs, subset.ys))
        x = x.astype(np.float32)
        seed = (config['np_random_seed'], start)
        next_start = (start + 1) * m % (subset.n // m * m)
        means, deviations = parts(x)
        for name, other in (('all', attack.perturb(x, y, seed)),
                            ('tail', attack.perturb(x, y, seed, tail)),
                            ('another', subset.xs[next_start:next_start + m])):
            other_means, other_deviations = parts(other)
            shifts[name][start] = (np.abs(other_means - means) / deviations).mean()
            shifts[f'{name} deviations'][start] = np.abs(other_deviations / deviations - 1).mean()
    return shifts


# ---- what is shown


def excesses_of(sizes, pairs, batch_size):
    """Returns {name: what is kept of a pair of sizes}: how many, and the means of each batch.

    Args:
        sizes: {name: array [n], in whole batches}. pairs: {name: (a name in sizes, another)}.
    """
    return {name: {'n': len(sizes[a]), 'batch_means': [
        sizes[each].reshape(-1, batch_size).mean(axis=1).tolist() for each in (a, b)]}
        for name, (a, b) in pairs.items()}


def excess_rows(config, evaluations):
    """Returns the paper's three in-text experiments, beside the paper's numbers."""
    default, shaped = name_of(DEFAULT, config), name_of(SHAPED, config)

    def found(name, measure, pairs):
        of_training = evaluations[name]
        identity = {**relevant(config), 'kept': 'batch means'}  # of what the trainings vary
        return of_training.experiment(measure, identity, partial(
            excesses_of, pairs=pairs, batch_size=of_training.config['training_batch_size']))

    errors = found(default, logit_errors, LOGIT_ERRORS)
    rows = [excess_row(f'logit errors of FGSM examples, clean over adversarial batch norms; the '
                       f'clean version under {norms}', default, errors[norms],
                       PAPER_EXCESS['logit_errors']) for norms in LOGIT_ERRORS]
    for name in (default, shaped):
        sizes = found(name, perturbation_sizes, PERTURBATION_SIZES)
        rows += [excess_row("size of PGD's perturbations, population norms over batch norms", name,
                            sizes['pn'], PAPER_EXCESS['pn'] if name == default else None),
                 excess_row("size of PGD's perturbations, norm shaping over batch norms", name,
                            sizes['shaping'], PAPER_EXCESS['shaping'])]
    return rows


def excess_row(what, name, kept, paper):
    """Returns a row: how much larger one size is than another, on average.

    Args:
        what: the two sizes, in words. name: of the training. kept: as excesses_of returns it.
        paper: the paper's number, or None.
    """
    a, b = map(np.array, kept['batch_means'])
    value, (low, high) = excess(a, b)
    return [what, f'`{name}`', f'{100 * value:+.1f}% [{100 * low:+.1f}, {100 * high:+.1f}]',
            f'{a.mean():.4f} / {b.mean():.4f}', f'{100 * paper:+.0f}%' if paper else '',
            verdict((paper, paper), (low, high)) if paper else '']


def mean_shifts(shifts):
    """Returns {name: (mean, [low, high])} of what norm_shifts measured."""
    return {name: bootstrap(lambda chosen, values=values: values[chosen].mean(), len(values))
            for name, values in shifts.items()}


def shift_rows(config, evaluations):
    """Returns how far an attack moves the batch norms; see norm_shifts."""
    rows = []
    for training in (DEFAULT, SHAPED):
        name = name_of(training, config)
        found = evaluations[name].experiment(norm_shifts, relevant(config), mean_shifts)
        for other, label in (('all', 'PGD on all samples'), ('tail', 'PGD on the tail'),
                             ('another', 'none, but another clean batch')):
            row = [f'`{name}`', label]
            for part in ('', ' deviations'):
                value, (low, high) = found[other + part]
                row.append(f'{value:.4f} [{low:.4f}, {high:.4f}]')
            rows.append(row)
    return rows


# ---- what would fail after hours


def check_perturbations(config, data):
    """Raises UserError where there would be no perturbation, or no whole batch, to measure."""
    for key in ('epsilon', 'step_size'):
        if config[key] == 0:
            raise UserError(f'{key} must be above 0, or there is no perturbation to compare, got 0')
    size = config['training_batch_size']
    if config['num_eval_examples'] < size:
        raise UserError(f'num_eval_examples must be at least training_batch_size, {size}, got '
                        f'{config["num_eval_examples"]}')


def check_shifts(config, data):
    """Raises UserError where there is no other clean batch to compare with."""
    if data.train_data.n < 2 * config['training_batch_size']:
        raise UserError('training_batch_size must be at most half the number of training images, '
                        f'{data.train_data.n // 2}, got {config["training_batch_size"]}')
