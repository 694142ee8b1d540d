"""TRADES (Zhang et al. 2019, yaodongyu/TRADES) as the paper reimplements it inside PGD training.

The adversary is not told the labels: it maximizes the Kullback-Leibler divergence of the model's
distribution on the natural image from that on the perturbed one. The paper trains on cross-entropy
alone, as it found that the divergence in the training loss costs accuracy (section VI, "TRADES");
`trades_beta` puts it back.
"""
import tensorflow as tf

from pgd_attack import LinfPGDAttack, random_bits

START_STDDEV = 0.001 * 255  # of the noise that the attack starts with, in pixels; TRADES, trades.py


def kl_divergence(logits_nat, logits_adv):
    """Returns KL(p(x_nat) || p(x_adv)) of each sample, [b], from two sets of logits [b, classes].

    Differentiable in both, as TRADES has it in its training loss.
    """
    log_p, log_q = tf.nn.log_softmax(logits_nat), tf.nn.log_softmax(logits_adv)
    return tf.reduce_sum(tf.exp(log_p) * (log_p - log_q), axis=1)


class TradesAttack(LinfPGDAttack):
    """PGD on the sum of KL(p(x_nat) || p(x_adv)) over a batch; see LinfPGDAttack for the arguments.

    It starts from x_nat + 0.001 * N(0, 1) on the [0, 1] scale, where the divergence has a gradient;
    random_start and loss_func, which are PGD's, are ignored. So are the labels.

    What the paper leaves open: p(x_nat) is taken once, before the first step, under the norms that
    the attack itself uses. With batch norms those are the whole batch's, its tail still natural:
    X^(0) of Eq. 5, the shaped batch as it stands before the attack. (TRADES itself attacks with
    population norms.) As in Eq. 5, the divergences of all samples are summed, the clean head's
    too: its distributions move with the batch norms.
    """

    def initialize(self, x_nat, seed):
        # A standard normal by its inverse distribution function, from 23 bits: of 24, the kernel of
        # erfinv rounds the largest to 1, where it is infinite.
        bits = tf.bitwise.right_shift(random_bits(x_nat, seed), 9)
        uniform = (tf.cast(bits, tf.float32) + 0.5) * 2. ** -22  # in (-1, 1)
        return x_nat + START_STDDEV * 2. ** 0.5 * tf.math.erfinv(uniform)

    def reference(self, x_nat, y, *given):
        return self.logits(x_nat, *given)

    def loss(self, logits, logits_nat):
        return tf.reduce_sum(kl_divergence(logits_nat, logits))
