"""The paper's norm shaping attack (section VI): PGD with batch norms, a share of a batch a time."""
import numpy as np
import tensorflow as tf

from cifar10_input import eval_examples
from config import check_ratio
from pgd_attack import LinfPGDAttack, pgd_settings
from running import UserError


def shaping(model, data, config):
    """Returns PGD with batch norms on batches of test samples; see attacks.make_attack.

    In each batch, unchanged : attacked test samples are shaping_ratio : 1. A batch of
    eval_batch_size is attacked in shaping_ratio + 1 passes, another share of it each time, so that
    over the run every sample is attacked once and unchanged in the other passes. A last batch that
    is not full is filled up with the samples that follow, from the first again after the last. They
    take their turn to keep the ratio and are then dropped.

    Raises:
        UserError: eval_batch_size cannot be divided at the ratio.
    """
    images, labels = eval_examples(data, config)
    check_batch(config)
    m, shares = config['eval_batch_size'], config['shaping_ratio'] + 1
    attack = LinfPGDAttack.from_config(model, config, update_population_norms=False)

    def perturb(start, end):
        chosen = np.arange(start, start + m) % len(images)
        x_nat, y = images[chosen], labels[chosen]
        x_adv = tf.cast(x_nat, tf.float32)
        for share in range(-(-(end - start) * shares // m)):  # all that hold one of ours
            tail = np.arange(m) // (m // shares) == share
            perturbed = attack.perturb(x_nat, y, (config['np_random_seed'], start + share), tail)
            x_adv = tf.where(tail[:, None, None, None], perturbed, x_adv)
        return x_adv[:end - start]

    return perturb, {**pgd_settings(config), 'norms': 'bn', 'shaping_ratio': shares - 1,
                     'gradients': shares * config['num_steps']}


def check_batch(config):
    """Raises UserError unless eval_batch_size can be divided at shaping_ratio : 1."""
    try:
        check_ratio(config['eval_batch_size'], config['shaping_ratio'])
    except UserError as error:
        raise UserError(f'eval_batch_size is {config["eval_batch_size"]}, shaping_ratio '
                        f'{config["shaping_ratio"]}: {error}') from None
