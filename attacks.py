"""The evaluation's attacks (paper, section VI): each makes its adversarial examples once.

What an attack here knows: the weights, the true labels, and the norms that its function names.
"""
import numpy as np
import tensorflow as tf

from config import UserError
from pgd_attack import LinfPGDAttack
from shaping import num_clean

ATTACKS = ('clean', 'fgsm', 'pgd', 'shaping')


def make_attack(name, model, images, labels, config):
    """Returns (attack, settings): attack(start, end) -> x_adv of images[start:end], float32.

    `settings` says how the examples are made, for the results: epsilon, the radius of the ball that
    every example must lie in, num_steps, step_size, norms and so on. The model is left as it is.

    Args:
        name: one of ATTACKS. 'clean' changes nothing.
            'fgsm': one step of fgsm_epsilon (16, as the paper has it) by the gradient's sign, with
            population norms. 'pgd': LinfPGDAttack as configured, with population norms.
            'shaping': PGD with batch norms; see shaping_attack.
        images, labels: the evaluation set, [n, 32, 32, 3] in [0, 255] and [n].

    What the paper leaves open: its attacks come from CleverHans, whose FGSM and PGD take the
    model's own predictions for labels unless told otherwise. Ours take the true labels, as the
    original's attack does.
    """
    if name == 'clean':
        return lambda start, end: tf.cast(images[start:end], tf.float32), {'epsilon': 0.}
    if name == 'fgsm':
        settings = dict(epsilon=config['fgsm_epsilon'], num_steps=1,
                        step_size=config['fgsm_epsilon'], random_start=False, loss_func='xent')
    else:
        settings = {key: config[key] for key in ('epsilon', 'num_steps', 'step_size',
                                                 'random_start', 'loss_func')}
    attack = LinfPGDAttack(model, **settings, training=name == 'shaping',
                           update_population_norms=False)
    settings['norms'] = 'bn' if name == 'shaping' else 'pn'
    if name == 'shaping':
        settings['shaping_ratio'] = config['shaping_ratio']
        return shaping_attack(attack, images, labels, config), settings
    return lambda start, end: attack.perturb(
        images[start:end], labels[start:end], (config['np_random_seed'], start)), settings


def shaping_attack(attack, images, labels, config):
    """Returns the paper's norm shaping attack: (start, end) -> x_adv of images[start:end].

    PGD with batch norms; in each batch, unchanged : attacked test samples are shaping_ratio : 1. A
    batch of eval_batch_size is attacked in shaping_ratio + 1 passes, another share of it each time,
    so that over the run every sample is attacked once and unchanged in the other passes. A last
    batch that is not full is filled up with the first test samples, which take their turn to keep
    the ratio and are then dropped.

    Raises:
        UserError: eval_batch_size does not fit the ratio.
    """
    m, shares = config['eval_batch_size'], config['shaping_ratio'] + 1
    try:
        num_clean(m, config['shaping_ratio'])
    except ValueError as error:
        raise UserError(f'eval_batch_size is {m}, shaping_ratio {shares - 1}: {error}') from None

    def perturb(start, end):
        chosen = np.arange(start, start + m) % len(images)
        chosen[end - start:] = np.arange(m - (end - start)) % len(images)
        x_nat, y = images[chosen], labels[chosen]
        x_adv = tf.cast(x_nat, tf.float32)
        for share in range(-(-(end - start) * shares // m)):  # all that hold one of ours
            tail = np.arange(m) // (m // shares) == share
            perturbed = attack.perturb(x_nat, y, (config['np_random_seed'], start + share), tail)
            x_adv = tf.where(tail[:, None, None, None], perturbed, x_adv)
        return x_adv[:end - start]

    return perturb


def perturbation_fault(x_nat, x_adv, epsilon, slack=1e-4):
    """Returns what is wrong with adversarial examples, a line, or None when they are as allowed.

    Args:
        x_nat, x_adv: [b, 32, 32, 3]. epsilon: radius of the ball, in pixels. slack: for rounding.
    """
    x_adv = np.asarray(x_adv, np.float64)
    if not np.isfinite(x_adv).all():
        return 'a pixel is NaN or infinite'
    low, high = x_adv.min(), x_adv.max()
    if low < -slack or high > 255 + slack:
        return f'pixels lie in [{low:.6g}, {high:.6g}]; [0, 255] would fit'
    l_inf = np.abs(x_adv - np.asarray(x_nat, np.float64)).max()
    if l_inf > epsilon + slack:
        return f'the largest perturbation is {l_inf:.6g}; at most epsilon, {epsilon:.6g}, would fit'
    return None
