"""Attacks by the sign of the gradient, with population norms: FGSM, PGD. And no attack at all."""
import tensorflow as tf

from cifar10_input import eval_examples
from pgd_attack import LinfPGDAttack, pgd_settings


def clean(model, data, config):
    """Returns the attack that leaves the images as they are; see attacks.make_attack."""
    images, _ = eval_examples(data, config)
    return lambda start, end: tf.cast(images[start:end], tf.float32), {'epsilon': 0.}


def fgsm(model, data, config):
    """Returns one step of fgsm_epsilon (Goodfellow et al. 2015); see attacks.make_attack."""
    epsilon = config['fgsm_epsilon']
    return _with_population_norms(model, data, config, dict(
        epsilon=epsilon, num_steps=1, step_size=epsilon, random_start=False, loss_func='xent'))


def pgd(model, data, config):
    """Returns LinfPGDAttack as configured; see attacks.make_attack."""
    return _with_population_norms(model, data, config, pgd_settings(config))


def _with_population_norms(model, data, config, settings):
    images, labels = eval_examples(data, config)
    attack = LinfPGDAttack(model, **settings, training=False)

    def perturb(start, end):
        seed = config['np_random_seed'], start
        return attack.perturb(images[start:end], labels[start:end], seed)

    return perturb, {**settings, 'norms': 'pn', 'gradients': settings['num_steps']}
