"""The paper's adaptive attacks (Table III): PGD by an attacker who goes through what answers."""
import tensorflow as tf

from cifar10_input import eval_examples
from pgd_attack import LinfPGDAttack, added, pgd_settings
from shaping import form_of, queries_of


class AdaptivePGD(LinfPGDAttack):
    """PGD through an inference, under draws that the attacker chooses.

    Args:
        inference: a shaping.Inference.
        epsilon, num_steps, step_size, random_start, loss_func: as in LinfPGDAttack.
    """

    def __init__(self, inference, epsilon, num_steps, step_size, random_start, loss_func):
        super().__init__(inference.model, epsilon, num_steps, step_size, random_start, loss_func)
        self.inference = inference

    def perturb(self, x_nat, y, seed, drawn):
        """Returns adversarial examples, float32 [b, 32, 32, 3]; see LinfPGDAttack.perturb.

        Args:
            seed: two ints.
            drawn: int32 [draws, groups, size], one or more draws for this part. The loss is summed
                over the draws: the attack is against all of them at once.
        """
        return self._graph(tf.cast(x_nat, tf.float32), tf.cast(y, tf.int64),
                           tf.cast(seed, tf.int64), None, tf.convert_to_tensor(drawn))

    def gradient(self, x, y, drawn):
        total = tf.zeros_like(x)
        for one_draw in drawn:  # a loop of the graph's, one draw at a time in memory
            with tf.GradientTape(watch_accessed_variables=False) as tape:
                tape.watch(x)
                loss = self.loss(self.inference.logits(x, one_draw), y)
            total = added(total, tape.gradient(loss, x))
        return total


def adaptive_pgd(inference, data, config, num_draws):
    """Returns PGD through the draws that will answer; see attacks.make_attack.

    Test samples are placed as they will be: all that the inference leaves to chance is known. With
    num_draws above 1, the attack is on the sum of the losses under all those draws. Where nothing
    is drawn, it is PGD through `pn` or through `bn`, the norms of the batch under attack.
    """
    return _through(inference, data, config, num_draws,
                    lambda queries: [inference.known(query) for query in queries], num_draws)


def adaptive_weak(inference, data, config, num_draws):
    """Returns PGD through other draws than those that will answer; see attacks.make_attack.

    Under `bn_shaping`, none of their training images is among those that the inference will use for
    the same batch; there are as many. Under `bn_recorded`, no image gets a recording that it will
    be judged by. (Another recording may share a few training images with it.)
    """
    def others(queries):
        return [inference.other(queries, query) for query in queries]

    others(queries_of(0, num_draws))  # fail now, where too little is left
    return _through(inference, data, config, num_draws, others, 0)


def _through(inference, data, config, num_draws, draws_for, num_draws_known):
    """Returns PGD through an inference; draws_for: f(queries) -> the draws to go through."""
    images, labels = eval_examples(data, config)
    num_draws = num_draws if inference.is_random else 1
    pgd = AdaptivePGD(inference, **pgd_settings(config))

    def perturb(start, end):
        draws = draws_for(queries_of(start // config['eval_batch_size'], num_draws))
        examples = []
        for a, b, drawn in inference.attacked_parts(start, end, draws):
            examples.append(pgd.perturb(images[a:b], labels[a:b], (config['np_random_seed'], a),
                                        drawn))
        return tf.concat(examples, axis=0)

    known = {'num_draws_known': num_draws_known} if inference.is_random else {}
    return perturb, {**pgd_settings(config), 'norms': inference.mode, **known,
                     **form_of(inference.mode, config), 'gradients': (
                         config['num_steps'] * num_draws * inference.number_forward_passes)}
