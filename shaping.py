"""Norm shaping, the paper's contribution: n:1 batches, the tail mask, the inference modes."""
import numpy as np

from config import INFERENCE_MODES, check_ratio
import tensorflow as tf

from running import UserError

RECORDED = 'bn_recorded'  # no name of --inference yet: no attack goes through it
MAX_IMAGES = 1000  # in one forward pass of shaped batches: a bound on memory, not on a call
MAX_GRADIENT_IMAGES = 100  # in one gradient of them, which keeps all activations
DRAW = 10 ** 6  # offset between the query numbers of successive draws of clean samples


def num_clean(batch_size, ratio):
    """Returns k = n * m / (n + 1), how many of m samples stay clean at ratio n:1 (paper, Eq. 5).

    Raises:
        ValueError: k is not whole; says which sizes are possible.
    """
    check_ratio(batch_size, ratio)
    return ratio * batch_size // (ratio + 1)


def tail_mask(batch_size, ratio):
    """Returns the boolean mask [batch_size] of a batch's adversarial tail, samples [k:m]."""
    return np.arange(batch_size) >= num_clean(batch_size, ratio)


def masked(x, x_nat, tail):
    """Returns x where the mask tail [b] is set and x_nat elsewhere; x where tail is None."""
    return x if tail is None else tf.where(tail[:, None, None, None], x, x_nat)


class ShapedInference:
    """Classifies test samples by the batch norms of n:1 batches of clean and test samples (Eq. 6).

    Each batch holds num_clean clean training samples, drawn afresh, then test samples; only the
    latter's logits come back. Many batches are one forward pass, each normalized by its own
    statistics. A batch of n + 1 samples is Eq. 6 to the letter, one test sample in each; larger
    ones, as in the paper's evaluation, hold several test samples that share their norms.

    Args:
        model: a model.Model.
        clean_images: the training images, uint8 [N, 32, 32, 3], unaugmented.
        ratio: n of n:1.
        batch_size: samples in each batch, a multiple of n + 1.
        seed: of the draws.

    What the paper leaves open: a batch's clean samples are drawn without replacement. Test samples
    that do not fill a last batch make a smaller one, at the same ratio.

    Raises:
        ValueError: a batch size that is impossible at this ratio, or too few clean images for it.
    """

    def __init__(self, model, clean_images, ratio, batch_size, seed):
        self.model = model
        self.clean_images = clean_images
        self.ratio = ratio
        self.num_clean = num_clean(batch_size, ratio)
        self.num_test = batch_size - self.num_clean
        self.seed = seed
        self._graph = tf.function(self.logits)
        if self.num_clean > len(clean_images):
            raise UserError(f'{self.num_clean} clean samples a batch, but only '
                            f'{len(clean_images)} to draw from')

    @classmethod
    def from_config(cls, model, data, config):
        """Returns the bn_shaping inference that a configuration describes."""
        return cls(model, data.train_data.xs, config['inference_shaping_ratio'],
                   config['shaping_batch_size'], config['np_random_seed'])

    def __call__(self, images, query):
        """Returns the logits [b, num_classes] of images [b, 32, 32, 3], pixels in [0, 255].

        Args:
            query: a number; the same one draws the same clean samples, whatever else was asked.
        """
        images = tf.cast(images, tf.float32)
        parts = self.split(len(images), query)
        logits = [self._graph(images[start:end], clean) for start, end, clean in parts]
        return tf.concat(logits, axis=0)

    def split(self, num_images, query, max_images=MAX_IMAGES, draw=None):
        """Returns how one call is made up: a list of (start, end, clean samples).

        images[start:end] are shaped by these clean samples, uint8 [groups, n * test samples in a
        group, 32, 32, 3]: first the batches that are full, then the smaller one, if any. At most
        max_images make one part, unless a single batch is larger. `draw` stands in for self.draw.
        """
        draw, parts = draw or self.draw, []
        for start, end, (groups, k) in self.parts(num_images, max_images):
            first = start // self.num_test
            clean = np.stack([draw(query, group, k) for group in range(first, first + groups)])
            parts.append((start, end, clean))
        return parts

    def parts(self, num_images, max_images):
        """Yields (start, end, (groups, clean samples in each)) of what split returns."""
        full, rest = divmod(num_images, self.num_test)
        at_once = max(1, max_images // (self.num_clean + self.num_test))
        for first in range(0, full, at_once):
            groups = min(at_once, full - first)
            yield first * self.num_test, (first + groups) * self.num_test, (groups, self.num_clean)
        if rest:
            yield full * self.num_test, num_images, (1, self.ratio * rest)

    def draw(self, query, group, size):
        """Returns `size` different clean samples, the same for the same query and group."""
        return self.clean_images[self._indices(query, group, size)]

    def _indices(self, query, group, size):
        rng = np.random.default_rng([self.seed, query, group])
        return rng.choice(len(self.clean_images), size, replace=False)

    def draw_others(self, queries):
        """Returns draw(query, group, size) of samples that no query in `queries` draws for a group.

        Raises:
            ValueError (when draw is called): too few clean images are left.
        """
        def draw(query, group, size):
            taken = [self._indices(q, group, size) for q in queries]
            others = np.setdiff1d(np.arange(len(self.clean_images)), np.concatenate(taken))
            if len(others) < size:
                raise UserError(f'{len(queries)} draws leave {len(others)} other clean samples of '
                                f'{len(self.clean_images)}, but {size} are needed')
            rng = np.random.default_rng([self.seed, query, group, 1])
            return self.clean_images[rng.choice(others, size, replace=False)]
        return draw

    def logits(self, images, clean):
        """Returns the logits [b, num_classes] of images [b, ...] shaped by clean [groups, k, ...].

        TensorFlow ops alone, so that an attack can differentiate through it.
        """
        groups, k = clean.shape[:2]
        shape = images.shape[1:]
        tests = tf.reshape(images, [groups, -1, *shape])
        batch = tf.concat([tf.cast(clean, tf.float32), tests], axis=1)
        logits = self.model(tf.reshape(batch, [-1, *shape]), training=True, num_groups=groups,
                            update_population_norms=False)
        logits = tf.reshape(logits, [groups, -1, logits.shape[-1]])[:, k:]
        return tf.reshape(logits, [-1, logits.shape[-1]])


class RecordedInference:
    """Classifies each query by the mixture of recorded norms and its own, n:1.

    A recording is the mean and the variance at every normalization of clean training images that
    pass once through the network under their own batch norms. Each query draws a recording: its
    answer depends on no other query, and costs about a forward pass by population norms. It is Eq.
    6 but for one thing: there, the clean samples' deeper activations are computed under the norms
    of the mixture, here under their own.

    Args:
        model: a model.Model with its weights loaded: the recordings are made at once.
        clean_images: the training images, uint8 [N, 32, 32, 3], unaugmented.
        ratio: n of n:1. num_recordings: how many recordings there are. num_samples: clean images
            in each. seed: of the recordings' images, and of the draws.

    Raises:
        ValueError: too few clean images.
    """

    def __init__(self, model, clean_images, ratio, num_recordings, num_samples, seed):
        if num_samples > len(clean_images):
            raise UserError(f'recorded_samples must be at most {len(clean_images)}, the number of '
                            f'training images, got {num_samples}')
        self.model, self.ratio, self.seed = model, ratio, seed
        self.num_recordings = num_recordings
        record = tf.function(lambda images: model.record(tf.cast(images, tf.float32)))
        recordings = []
        for number in range(num_recordings):
            rng = np.random.default_rng([seed, number, 0, 1])
            recordings.append(record(clean_images[rng.choice(len(clean_images), num_samples,
                                                             replace=False)]))
        self.recordings = {name: tuple(tf.stack(values) for values in zip(*(
            one[name] for one in recordings))) for name in recordings[0]}
        self._graph = tf.function(self.logits)

    @classmethod
    def from_config(cls, model, data, config):
        """Returns the bn_recorded inference that a configuration describes."""
        return cls(model, data.train_data.xs, config['inference_shaping_ratio'],
                   config['num_recordings'], config['recorded_samples'], config['np_random_seed'])

    def __call__(self, images, query):
        """Returns the logits [b, num_classes] of images [b, 32, 32, 3], pixels in [0, 255].

        Args:
            query: a number; the same one draws the same recordings, one for each image.
        """
        return self._graph(tf.cast(images, tf.float32), self.draw(query, len(images)))

    def draw(self, query, num_images):
        """Returns the number of each image's recording, int32 [num_images]."""
        rng = np.random.default_rng([self.seed, query, 0, 2])
        return rng.integers(0, self.num_recordings, num_images, np.int32)

    def logits(self, images, drawn):
        """Returns the logits [b, num_classes] of images under the recordings `drawn`, [b].

        TensorFlow ops alone, so that an attack can differentiate through it.
        """
        recorded = {name: [tf.gather(values, drawn) for values in pair]
                    for name, pair in self.recordings.items()}
        return self.model(images, recorded=recorded, ratio=self.ratio)


def make_inference(model, mode, data, config):
    """Returns f(images [b, 32, 32, 3], query) -> logits [b, num_classes] for an inference mode.

    'bn' normalizes by the given batch itself, 'pn' by the population norms, 'bn_shaping' by n:1
    batches (ShapedInference; paper, section VI), 'bn_recorded' by recorded norms and each image's
    own (RecordedInference). None of them changes the model.

    Raises:
        ValueError: an unknown mode.
    """
    modes = (*INFERENCE_MODES, RECORDED)
    if mode not in modes:
        raise ValueError(f'mode must be one of {", ".join(modes)}, got {mode!r}')
    if mode == 'bn_shaping':
        return ShapedInference.from_config(model, data, config)
    if mode == RECORDED:
        return RecordedInference.from_config(model, data, config)
    graph = tf.function(lambda x: model(x, training=mode == 'bn', update_population_norms=False))
    return lambda images, query: graph(tf.cast(images, tf.float32))


def queries_of(batch, num_draws):
    """Returns the query numbers under which evaluation batch `batch` is classified, one a draw."""
    return [batch + draw * DRAW for draw in range(num_draws)]


def shaping_settings(config):
    """Returns the form of bn_shaping's batches, as it stands in a configuration."""
    return {key: config[key] for key in ('inference_shaping_ratio', 'shaping_batch_size')}
