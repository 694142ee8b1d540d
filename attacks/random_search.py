"""The strongest of many random perturbations: a check, which attacks by gradients must beat."""
import numpy as np
import tensorflow as tf

from cifar10_input import eval_examples
from pgd_attack import uniform_noise

RANDOM_DRAWS = 1000


def random_search(model, data, config):
    """Returns the strongest of RANDOM_DRAWS uniform perturbations; see attacks.make_attack.

    'Strongest' is the largest cross-entropy with population norms.
    """
    images, labels = eval_examples(data, config)
    epsilon = config['epsilon']

    @tf.function
    def strongest(x_nat, y, seed):
        best, best_loss = x_nat, tf.fill([len(x_nat)], -np.inf)
        for draw in tf.range(RANDOM_DRAWS):
            noise = uniform_noise(x_nat, seed + [0, draw])
            x = tf.clip_by_value(x_nat + epsilon * noise, 0., 255.)
            loss = tf.nn.sparse_softmax_cross_entropy_with_logits(y, model(x, training=False))
            better = loss > best_loss
            best = tf.where(better[:, None, None, None], x, best)
            best_loss = tf.where(better, loss, best_loss)
        return best

    def perturb(start, end):
        seed = tf.constant([config['np_random_seed'], RANDOM_DRAWS * start], tf.int32)
        return strongest(tf.cast(images[start:end], tf.float32), labels[start:end], seed)

    return perturb, {'epsilon': epsilon, 'random_draws': RANDOM_DRAWS, 'norms': 'pn',
                     'queries': RANDOM_DRAWS}
