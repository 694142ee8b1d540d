"""HopSkipJump (Chen, Jordan and Wainwright 2020): minimum L2 perturbations by labels alone."""
import numpy as np
import tensorflow as tf

from attacks.minimum_norm import device
from cifar10_input import eval_examples
from running import optional
from shaping import Unfit, form_of

# 100 sqrt(t) queries for the gradient at step t, as in the paper. It leaves the number of steps to
# the budget: 50, the default of ART, need some 25,000 queries an image (foolbox's 64 need 36,000)
SETTINGS = {'num_steps': 50, 'initial_gradient_queries': 100}
MAX_IMAGES = 50  # at once: foolbox keeps the noise of all queries of a step, 9 MB an image
NUM_STARTS = 100  # images to start from


class HopSkipJump:
    """foolbox's HopSkipJump, L2, through what an inference answers under the known draw.

    It sees labels alone. The draw is fixed, so the same image always gets the same label.

    Args:
        inference: a shaping.Inference that answers each image alone.
        images, labels: of the evaluation. others: images to start from.
        batch_size: of the evaluation. seed: of all noise.

    What differs from foolbox, each on purpose:
    - It starts from the nearest of the first NUM_STARTS test images that gets another label than y.
      (foolbox starts from uniform noise, and gives up a whole batch if noise of any kind gets the
      label of one of its images, as it easily does with few classes.)
    - The direction of each image is normalized by itself. (foolbox divides by the norm over the
      whole batch, so that steps shrink as the batch grows.)

    `num_queries` is how many queries an image the last call needed.

    Raises:
        Unfit: images of a batch share their norms. A label then depends on the other images,
            which are under attack themselves; foolbox asserts that what was adversarial stays so.
        UserError: foolbox is not installed.
    """

    def __init__(self, inference, images, labels, others, batch_size, seed):
        if inference.coupled:
            raise Unfit(f'hopskipjump needs labels that depend on one image alone, and under '
                        f'{inference.mode} the images of a batch share their norms; expected pn, '
                        'bn_recorded, or bn_shaping with one test sample in a batch')
        self.foolbox = optional('foolbox', 'the attack hopskipjump needs foolbox')
        self.inference, self.images, self.labels = inference, images, labels
        self.others = others.astype(np.float32) / 255
        self.batch_size, self.seed, self.num_queries = batch_size, seed, 0
        self.attack = normalized_alone(self.foolbox)(
            steps=SETTINGS['num_steps'], constraint='l2',
            initial_gradient_eval_steps=SETTINGS['initial_gradient_queries'])
        self._graph = tf.function(lambda x, drawn: self.inference.logits(255 * x, drawn))

    def __call__(self, start, end):
        """Returns x_adv of images [start:end]; where nothing is found, the image as it is."""
        inference, query = self.inference, start // self.batch_size
        num_queries, examples = [], []
        for part in inference.parts(end - start):
            drawn = inference.drawn(part, inference.known(query))[None]
            for first in range(0, part.end - part.start, MAX_IMAGES):
                chosen = np.arange(first, min(first + MAX_IMAGES, part.end - part.start))
                examples.append(self.perturb(start + part.start + chosen,
                                             inference.drawn_for(drawn, chosen)[0]))
                num_queries += [self.num_queries] * len(chosen)
        self.num_queries = np.mean(num_queries)
        x_nat, y = tf.cast(self.images[start:end], tf.float32), self.labels[start:end]
        x_adv = tf.concat(examples, axis=0)
        before, after = (tf.argmax(inference(x, query), 1) == y for x in (x_nat, x_adv))
        return tf.where((before & ~after)[:, None, None, None], x_adv, x_nat)

    def perturb(self, numbers, drawn):
        """Returns x_adv of images of a part, by their numbers; counts the queries of each."""
        x_nat, y = self.images[numbers].astype(np.float32) / 255, self.labels[numbers]
        drawn, self.num_queries = tf.constant(drawn), 0

        def logits(x):
            self.num_queries += 1
            return self._graph(x, drawn)

        x, found = starting_points(lambda x: np.argmax(logits(x), 1), x_nat, y, self.others)
        tf.random.set_seed((self.seed + int(numbers[0])) % 2 ** 31)  # foolbox takes no seed
        fmodel = self.foolbox.TensorFlowModel(logits, bounds=(0, 1), device=device())
        # -1: any label will do, so that an image without a start stays, and holds up no other
        y = tf.constant(np.where(found, y, -1))
        return 255 * self.attack.run(fmodel, tf.constant(x_nat), y, starting_points=tf.constant(x))


def normalized_alone(foolbox):
    """Returns foolbox's class, but with the gradient of each image normalized by itself."""
    from eagerpy.norms import l2
    from foolbox.devutils import atleast_kd, flatten

    class NormalizedAlone(foolbox.attacks.HopSkipJumpAttack):
        def approximate_gradients(self, *args):
            gradients = super().approximate_gradients(*args)
            norms = l2(flatten(gradients), axis=-1) + 1e-12
            return gradients / atleast_kd(norms, gradients.ndim)

    return NormalizedAlone


def starting_points(decide, x_nat, y, others):
    """Returns (x, found): what gets another label than y, and for which images there is such.

    x is the image itself where that is wrong already, else the nearest of the others that is, else
    the image. A rank of the others is one query.

    Args:
        decide: f(x [b, 32, 32, 3]) -> labels [b]. x_nat: images [b, 32, 32, 3]. y: labels [b].
        others: images [n, 32, 32, 3].
    """
    x, found = x_nat.copy(), decide(x_nat) != y
    distances = np.stack([np.square(others - one).sum(axis=(1, 2, 3)) for one in x_nat])
    for candidates in np.argsort(distances, axis=1).T:
        if found.all():
            break
        taken = ~found & (decide(others[candidates]) != y)
        x[taken] = others[candidates][taken]
        found |= taken
    return x, found


def hopskipjump(inference, data, config, num_draws):
    """Returns HopSkipJump through the first of the draws that answer; see attacks.make_attack."""
    attack = HopSkipJump(inference, *eval_examples(data, config), data.eval_data.xs[:NUM_STARTS],
                         config['eval_batch_size'], config['np_random_seed'])
    known = {'num_draws_known': 1} if inference.is_random else {}
    return attack, {'epsilon': None, 'norms': inference.mode, **SETTINGS, **known,
                    **form_of(inference.mode, config),
                    'library': f'foolbox {attack.foolbox.__version__}'}
