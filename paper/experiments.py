"""The paper's three in-text experiments (sections IV and V) on what batch norms do to an attack;
and how far an attack moves the norms, which is what the paper's confoundings come from.

The three compare two sizes, sample by sample, over the same training images in batches of
training_batch_size, unaugmented, and are reported as the paper reports them: how much larger, on
average, the one is than the other. reproduce.py runs them.
"""
import numpy as np
import tensorflow as tf

from pgd_attack import LinfPGDAttack
from paper.population_norms import batch_statistics, population_norms
from running.unfinished import batches
from shaping import tail_mask


def num_measured(data, config):
    """Returns how many training images are measured: num_eval_examples, in whole batches."""
    m = config['training_batch_size']
    return min(config['num_eval_examples'], data.train_data.n) // m * m


def logit_errors(model, data, config, kept=None):
    """Returns the logit errors of FGSM examples under clean and under adversarial batch norms.

    Section IV, confounding II (63%). The examples are one step of PGD, step_size long, without a
    random start, through the batch norms of the clean batch. The error is the mean absolute
    difference of the logits between an example and its clean version.

    What the paper leaves open is what the clean version is normalized by, so both are computed.

    Args:
        kept: path of a file for this experiment alone, in which finished batches are kept; its name
            must say what the figures depend on (unfinished.path_of). None: nothing is kept.

    Returns:
        dict of arrays [n]: 'clean norms', and the same under the norms of the adversarial batch:
        'adversarial norms', with the clean version under those norms, too, and 'adversarial norms,
        clean logits', with the clean version's logits left as the clean batch has them.
    """
    step = config['step_size']
    fgsm = LinfPGDAttack(model, step, 1, step, False, 'xent', update_population_norms=False)

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
    """Returns the mean absolute perturbations, in pixels, that PGD makes by three kinds of norms.

    PGD as configured. 'pn' and 'bn': of all samples of a batch, by population norms and by batch
    norms (section IV, confounding III: 17% more by population norms). 'shaping': by batch norms,
    the tail alone attacked beside the clean head (section V: 41% more than by 'bn'); each share of
    a batch is the tail once, in another order of the batch, so that all samples are attacked.

    Args:
        kept: as in logit_errors.

    Returns:
        dict of arrays [n].
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
    """Returns how far the batch norms of a training batch are from those of its clean version.

    'all': where PGD, as configured, attacks every sample; 'tail': where it attacks the tail alone,
    beside the clean head (section V: shaping keeps the norms stable); 'another': where it is no
    attacked batch but the next clean one, which is how far batch norms differ by chance.

    Args:
        kept: as in logit_errors.

    Returns:
        dict of arrays [batches]: the distance of the means, in standard deviations of the clean
        batch, averaged over all channels of all norms; and, named '... deviations', the relative
        distance of the standard deviations themselves.
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
