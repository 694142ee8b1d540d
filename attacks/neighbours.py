"""Neighbours: who owns other queries of a batch moves the norms that a victim's query meets.

No line of ATTACKS: all of a batch is spent on one image, the victim's, which is changed only where
the attacker owns it, too. What it asks is which inference may serve several people at once, and
what an attack on all images of a batch at once misses. paper/neighbours.py makes its table.
"""
import numpy as np
import tensorflow as tf

from attacks.apgd import APGDAttack, strongest

QUERIES = 10     # in a batch that several share: the victim's, then the helpers', then bystanders'
ANY_IMAGE = 255.  # epsilon of helpers that may be any image


class NeighboursAttack(APGDAttack):
    """Auto-PGD on the loss of a batch's first query, with respect to the pixels of its helpers.

    Each query of a batch is given the victim's logits. So loss, step size and what is kept are the
    victim's in all of them, and its helpers move together.

    Args:
        inference: a shaping.Inference whose batches hold `queries` queries each.
        epsilon: of the helpers' balls in pixels; ANY_IMAGE: no other bound than [0, 255].
        num_steps: steps, one gradient more.
        loss_funcs: keys of LOSSES, each of which has a run.
        own_epsilon: above 0, the victim's own pixels are the attacker's, too, within this ball.
    """

    def __init__(self, inference, epsilon, num_steps, queries=QUERIES, loss_funcs=('xent',),
                 own_epsilon=0.):
        def logits_of_victims(x, drawn):
            return tf.repeat(inference.logits(x, drawn)[::queries], queries, axis=0)

        super().__init__(logits_of_victims, [*loss_funcs], epsilon, num_steps)
        self.inference, self.queries, self.own_epsilon = inference, queries, own_epsilon

    def balls(self, y):
        is_victim = tf.range(len(y)) % self.queries == 0
        return tf.where(is_victim, self.own_epsilon, super().balls(y))

    def move_norms(self, x_nat, y, seed, query, num_helpers, weaker=()):
        """Returns batches with the strongest helpers that were found, float32 [b, 32, 32, 3].

        The attacker is the strongest there is: it has the weights, the victims' images and labels,
        and the draw that answers. Helpers start from noise. For each loss, it costs num_steps + 1
        gradients of a whole batch, its clean samples included, unless all victims are turned.

        Args:
            x_nat: [b, 32, 32, 3] in [0, 255], batches of `queries`, the victim first. y: [b], the
                victim's label in all its batch.
            seed: an int. query: the number under which the inference will answer x_nat.
            num_helpers: the queries 1 to num_helpers of each batch are the attacker's.
            weaker: results of attackers who may do less, one of which is kept where it is stronger.
        """
        x_nat, draw, found = x_nat.astype(np.float32), self.inference.known(query), []
        place = np.arange(len(x_nat)) % self.queries
        owned = (place <= num_helpers) & ((place > 0) | (self.own_epsilon > 0))
        for start, end, drawn in self.inference.attacked_parts(0, len(x_nat), [draw]):
            some = slice(start, end)
            x = strongest([x_nat[some], *(x[some] for x in weaker)], self, y[some], drawn)
            for number, loss_func in enumerate(self.loss_funcs):
                if not np.any(self.judge(x, y[some], drawn)[1]):
                    break  # no victim is answered rightly
                x_adv, = self.perturb(
                    x_nat[some], y[some], (seed, len(self.loss_funcs) * start + number),
                    drawn[None], loss_func, active=owned[some])
                x = strongest([x, x_adv], self, y[some], drawn)
            found.append(x)
        return np.concatenate(found)
