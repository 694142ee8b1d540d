"""Square Attack (Andriushchenko et al. 2020), L-infinity: random search by the model's scores.

It needs no gradient. Where it leaves less accuracy than attacks by gradients, these are masked.
"""
import numpy as np
import tensorflow as tf

from cifar10_input import eval_examples
from pgd_attack import margin, project, random_bits
from shaping import form_of

P_INIT = 0.8  # the share of the image that the first squares cover; AutoAttack's
# The share is halved after so many of 10,000 queries, stretched to the number of queries
HALVED_AT = np.array([10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000])


def square_sizes(num_queries, image_size=32):
    """Returns the side of the square of each query, int32 [num_queries]."""
    at = np.arange(num_queries) * 10000 // num_queries
    halvings = (at[:, None] > HALVED_AT).sum(1)
    sides = np.rint(np.sqrt(P_INIT / 2. ** halvings * image_size ** 2))
    return np.clip(sides, 1, image_size - 1).astype(np.int32)


class SquareAttack:
    """Square Attack through logits under draws, all its queries in one graph.

    Args:
        logits: f(x [b, 32, 32, 3], drawn) -> logits [b, classes].
        epsilon: radius of the ball in pixels. num_queries: squares an image, the first of stripes.
        asks_again: the image without the square is asked for, too, each time: see below.

    What the paper leaves open:
    - For a defence that draws, a loss changes by more from draw to draw than by one square. The
      lowest loss so far is then that of a lucky draw, which no square beats: the search stops. So
      each square is compared with the image without it under one draw, a fresh one for each square.
      That is more than a service grants that draws for each query. No image is given up after a
      lucky draw.
    - Where images share norms, a square's loss is measured beside the squares of the other images,
      some of which are then taken back. So the images as they are kept are asked again, together.
    """

    def __init__(self, logits, epsilon, num_queries, asks_again=False):
        self.logits, self.epsilon, self.num_queries = logits, epsilon, num_queries
        self.asks_again = asks_again
        self._graph = tf.function(self._perturb)

    def perturb(self, x_nat, y, seed, drawn):
        """Returns adversarial examples, float32 [b, 32, 32, 3].

        Args:
            x_nat: [b, 32, 32, 3] in [0, 255]. y: labels [b]. seed: two ints.
            drawn: [queries, ...], what `logits` takes beside x; fewer take turns.
        """
        return self._graph(tf.cast(x_nat, tf.float32), tf.cast(y, tf.int64),
                           tf.cast(seed, tf.int64), tf.convert_to_tensor(drawn))

    def _perturb(self, x_nat, y, seed, drawn):
        b, size = x_nat.shape[0], x_nat.shape[1]
        sides, places = tf.constant(square_sizes(self.num_queries, size)), tf.range(size)

        def signs(shape, seed):  # -1 or 1
            return 2. * tf.cast(random_bits(tf.zeros(shape), seed) >= 0, tf.float32) - 1

        def inside(corner, side):  # bool [b, size]
            return (places >= corner[:, None]) & (places < corner[:, None] + side)

        # Vertical stripes
        x = project(x_nat + self.epsilon * signs([b, 1, size, 3], seed), x_nat, self.epsilon)
        loss = margin(self.logits(x, drawn[0]), y)
        for query in tf.range(1, self.num_queries):
            # A square of one colour, for each image at its own place
            side = sides[query]
            of_square = tf.random.fold_in(seed, query, alg='philox')
            top, left = tf.unstack(tf.random.stateless_uniform(
                [2, b], of_square, 0, size - side + 1, tf.int32, alg='philox'))
            square = inside(top, side)[:, :, None] & inside(left, side)[:, None, :]
            colour = signs([b, 1, 1, 3], tf.random.fold_in(of_square, 1, alg='philox'))
            x_new = tf.where(square[..., None], x + 2 * self.epsilon * colour, x)
            x_new = project(x_new, x_nat, self.epsilon)
            # It stays where it lowers the margin
            of_query = drawn[query % len(drawn)]
            if self.asks_again:
                loss = margin(self.logits(x, of_query), y)
            loss_new = margin(self.logits(x_new, of_query), y)
            better = loss_new < loss
            x = tf.where(better[:, None, None, None], x_new, x)
            loss = tf.where(better, loss_new, loss)
        return x


def square(inference, data, config, num_draws):
    """Returns Square Attack through the inference that answers; see attacks.make_attack.

    Every square meets a fresh draw, under which the image is asked with and without it. Under `pn`
    nothing is drawn and no norms are shared: there, its last loss is still known.
    """
    images, labels = eval_examples(data, config)
    queries, asks_again = config['square_queries'], inference.coupled or inference.is_random
    attack = SquareAttack(inference.logits, config['epsilon'], queries, asks_again)

    def perturb(start, end):
        rng = np.random.default_rng([config['np_random_seed'], start, 0, 0, 3])
        examples = []
        for part in inference.parts(end - start):
            a, b = start + part.start, start + part.end
            drawn = np.stack([inference.drawn(part, inference.fresh(rng))
                              for _ in range(queries if inference.is_random else 1)])
            examples.append(attack.perturb(images[a:b], labels[a:b],
                                           (config['np_random_seed'], a), drawn))
        return tf.concat(examples, axis=0)

    return perturb, {'epsilon': config['epsilon'], 'square_queries': queries,
                     'norms': inference.mode, **form_of(inference.mode, config),
                     'queries': 2 * queries - 1 if asks_again else queries}
