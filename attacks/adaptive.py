"""The paper's adaptive attacks (Table III): PGD by an attacker who goes through n:1 batches."""
import numpy as np
import tensorflow as tf

from cifar10_input import eval_examples
from pgd_attack import LinfPGDAttack, pgd_settings
from running import UserError
from shaping import MAX_GRADIENT_IMAGES, ShapedInference, queries_of, shaping_settings


class ShapedPGDAttack(LinfPGDAttack):
    """PGD with batch norms through n:1 batches whose clean samples the attacker chooses.

    Args:
        shaped: a ShapedInference, whose model and way to form batches the attack goes through.
        epsilon, num_steps, step_size, random_start, loss_func: as in LinfPGDAttack.
    """

    def __init__(self, shaped, epsilon, num_steps, step_size, random_start, loss_func):
        super().__init__(shaped.model, epsilon, num_steps, step_size, random_start, loss_func)
        self.shaped = shaped

    def perturb(self, x_nat, y, seed, clean):
        """Returns adversarial examples, float32 [b, 32, 32, 3]; see LinfPGDAttack.perturb.

        Args:
            seed: two ints.
            clean: [draws, groups, k, 32, 32, 3], one or more draws of clean samples as split makes
                them. The loss is summed over the draws: the attack is against all of them at once.
        """
        return self._graph(tf.cast(x_nat, tf.float32), tf.cast(y, tf.int64),
                           tf.cast(seed, tf.int64), None, tf.convert_to_tensor(clean))

    def gradient(self, x, target, clean):
        total = tf.zeros_like(x)
        for one_draw in clean:  # a loop of the graph's, one draw at a time in memory
            with tf.GradientTape(watch_accessed_variables=False) as tape:
                tape.watch(x)
                loss = self.loss(self.shaped.logits(x, one_draw), target)
            total += tape.gradient(loss, x)
        return total


def adaptive(model, data, config, num_draws):
    """Returns PGD through the clean samples that bn_shaping will draw; see attacks.make_attack.

    Test samples are placed as they will be: all that the inference leaves to chance is known. With
    num_draws above 1, the attack is on the sum of the losses under all those draws.
    """
    shaped = ShapedInference.from_config(model, data, config)
    return _through(shaped, data, config, num_draws, lambda queries: shaped.draw, num_draws)


def adaptive_weak(model, data, config, num_draws):
    """Returns PGD through other training samples than bn_shaping's; see attacks.make_attack.

    None of them is among those that the inference will use for the same batch; there are as many.
    """
    shaped = ShapedInference.from_config(model, data, config)
    k, num_images = shaped.num_clean, data.train_data.n
    if (num_draws + 1) * k > num_images:
        raise UserError(f'{num_draws} draws of {k} clean samples could leave adaptive_weak too few '
                        f'of {num_images} training images; expected at most {num_images // k - 1} '
                        'draws')
    return _through(shaped, data, config, num_draws, shaped.draw_others, 0)


def _through(shaped, data, config, num_draws, draw_for, num_draws_known):
    """Returns PGD through n:1 batches; draw_for: f(queries) -> their draw(query, group, size)."""
    images, labels = eval_examples(data, config)
    pgd = ShapedPGDAttack(shaped, **pgd_settings(config))

    def perturb(start, end):
        x_nat, y = images[start:end], labels[start:end]
        queries = queries_of(start // config['eval_batch_size'], num_draws)
        draws = [shaped.split(end - start, query, MAX_GRADIENT_IMAGES, draw_for(queries))
                 for query in queries]
        parts = []
        for one_part in zip(*draws):  # the same images under each draw
            a, b = one_part[0][:2]
            clean = np.stack([part[2] for part in one_part])
            seed = config['np_random_seed'], start + a
            parts.append(pgd.perturb(x_nat[a:b], y[a:b], seed, clean))
        return tf.concat(parts, axis=0)

    return perturb, {**pgd_settings(config), 'norms': 'bn_shaping',
                     'num_draws_known': num_draws_known, **shaping_settings(config)}
