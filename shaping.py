"""Norm shaping, the paper's contribution: n:1 batches, the tail mask, the inference modes."""
from typing import NamedTuple

import numpy as np

from config import INFERENCE_MODES, check_ratio
import tensorflow as tf

from running import UserError

MAX_IMAGES = 1000  # in one forward pass of shaped batches: a bound on memory, not on a call
MAX_GRADIENT_IMAGES = 100  # in one gradient of them, which keeps all activations
DRAW = 10 ** 6  # offset between the query numbers of successive draws of clean samples
# The modes that draw, and the keys that say how: their form. Validation images are not drawn
FORMS = {'bn_shaping': ('inference_shaping_ratio', 'shaping_batch_size', 'num_validation_examples'),
         'bn_recorded': ('inference_shaping_ratio', 'num_recordings', 'recorded_samples',
                         'num_validation_examples')}
OTHERS, RECORDINGS, DRAWN_RECORDING = 1, 1, 2  # beside the seed: each has random numbers of its own


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


# ---- the inference modes


class Unfit(UserError):
    """An attack was given an inference that it cannot go through."""


class Part(NamedTuple):
    """Some images of a call, [start:end], that pass through the network together."""
    start: int
    end: int
    first: int = 0   # the first of the groups that they form,
    groups: int = 1  # how many there are,
    size: int = 0    # and how much is drawn for each


class Inference:
    """Classifies by the batch norms of the batch itself, 'bn', or by population norms, 'pn'.

    Also what all inference modes have in common: **logits under a draw**. A draw is all that an
    inference leaves to chance, a function of (group, size) -> integers [size]. These two leave
    nothing. An attack through an inference takes the draw that answers (`known`), one that shares
    nothing with it (`other`), or one that follows the same rule (`fresh`); fills in the parts of a
    batch by it (`drawn`), and differentiates through `logits`.

    Args:
        model: a model.Model. mode: 'bn' or 'pn'.
    """

    def __init__(self, model, mode):
        self.model, self.mode = model, mode
        self._graph = tf.function(self.logits)

    def __call__(self, images, query):
        """Returns the logits [b, num_classes] of images [b, 32, 32, 3], pixels in [0, 255].

        Args:
            query: a number; the same one draws the same, whatever else was asked.
        """
        images, draw = tf.cast(images, tf.float32), self.known(query)
        logits = [self._graph(images[part.start:part.end], self.drawn(part, draw))
                  for part in self.parts(len(images))]
        return tf.concat(logits, axis=0)

    def logits(self, images, drawn):
        """Returns the logits [b, num_classes] of a part's images under what was drawn for them.

        TensorFlow ops alone, so that an attack can differentiate through it.

        Args:
            drawn: what `drawn` returns, int32 [groups, size].
        """
        return self.model(images, training=self.mode == 'bn', update_population_norms=False)

    def parts(self, num_images, max_images=MAX_IMAGES):
        """Returns the Parts of a call with so many images.

        Args:
            max_images: in bn_shaping, the most images at once, clean ones included, unless one
                batch is larger; elsewhere unused: the call is one part.
        """
        return [Part(0, num_images)]

    def drawn(self, part, draw):
        """Returns what a draw gives a part, int32 [groups, size]."""
        return np.stack([draw(group, part.size)
                         for group in range(part.first, part.first + part.groups)]).astype(np.int32)

    def attacked_parts(self, start, end, draws):
        """Yields (first, last, drawn [draws, groups, size]) of what an attack takes at once.

        Args:
            start, end: of the images that are classified together. draws: that it goes through.
        """
        for part in self.parts(end - start, MAX_GRADIENT_IMAGES):
            yield (start + part.start, start + part.end,
                   np.stack([self.drawn(part, draw) for draw in draws]))

    def known(self, query):
        """Returns the draw that answers a query."""
        return self.fresh(None)

    def other(self, queries, query):
        """Returns a draw for `query` that shares nothing with those that answer `queries`.

        Raises:
            UserError: too little is left.
        """
        return self.known(query)

    def fresh(self, rng):
        """Returns a draw by the same rule, of random numbers of one's own."""
        return lambda group, size: self._choose(rng, size)

    def _choose(self, seed, size):
        """Returns what a group draws, integers [size], by a seed or a generator: here nothing."""
        return np.zeros(size)

    def drawn_for(self, drawn, chosen):
        """Returns drawn [draws, groups, size] for the chosen images of a part alone.

        Only where the images are not coupled.
        """
        return drawn

    @property
    def coupled(self):
        """Whether the images of a part share norms, so that each depends on others."""
        return self.mode == 'bn'

    def group_size(self, num_images):
        """Returns how many consecutive images of a part share norms, where they are coupled."""
        return num_images

    @property
    def is_random(self):
        """Whether anything is drawn."""
        return self.mode in FORMS

    @property
    def number_forward_passes(self):
        """How many images pass through the network for each query (RobustBench's name)."""
        return 1


class ShapedInference(Inference):
    """Classifies test samples by the batch norms of n:1 batches of clean and test samples (Eq. 6).

    Each batch holds num_clean clean training samples, drawn afresh, then test samples; only the
    latter's logits come back. Many batches are one forward pass, each normalized by its own
    statistics. A batch of n + 1 samples is Eq. 6 to the letter, one test sample in each; larger
    ones, as in the paper's evaluation, hold several test samples that share their norms.

    A draw gives each batch the numbers of its clean samples.

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
        super().__init__(model, 'bn_shaping')
        self.num_images, self.ratio, self.seed = len(clean_images), ratio, seed
        self.num_clean = num_clean(batch_size, ratio)
        self.num_test = batch_size - self.num_clean
        if self.num_clean > self.num_images:
            raise UserError(f'{self.num_clean} clean samples a batch, but only '
                            f'{self.num_images} to draw from')
        self.clean_images = tf.constant(clean_images)

    @classmethod
    def from_config(cls, model, data, config):
        """Returns the bn_shaping inference that a configuration describes."""
        return cls(model, data.train_data.xs, config['inference_shaping_ratio'],
                   config['shaping_batch_size'], config['np_random_seed'])

    def logits(self, images, drawn):
        groups, k = drawn.shape
        shape = images.shape[1:]
        clean = tf.cast(tf.gather(self.clean_images, drawn), tf.float32)
        tests = tf.reshape(images, [groups, -1, *shape])
        batch = tf.concat([clean, tests], axis=1)
        logits = self.model(tf.reshape(batch, [-1, *shape]), training=True, num_groups=groups,
                            update_population_norms=False)
        logits = tf.reshape(logits, [groups, -1, logits.shape[-1]])[:, k:]
        return tf.reshape(logits, [-1, logits.shape[-1]])

    def parts(self, num_images, max_images=MAX_IMAGES):
        """Returns the Parts of a call: first the batches that are full, then the smaller one.

        At most max_images make one part, unless a single batch is larger.
        """
        full, rest = divmod(num_images, self.num_test)
        at_once = max(1, max_images // (self.num_clean + self.num_test))
        parts = []
        for first in range(0, full, at_once):
            groups = min(at_once, full - first)
            parts.append(Part(first * self.num_test, (first + groups) * self.num_test,
                              first, groups, self.num_clean))
        if rest:
            parts.append(Part(full * self.num_test, num_images, full, 1, self.ratio * rest))
        return parts

    def drawn_for(self, drawn, chosen):
        return drawn if self.coupled else drawn[:, chosen]

    @property
    def coupled(self):
        return self.num_test > 1

    def group_size(self, num_images):
        return min(self.num_test, num_images)

    @property
    def number_forward_passes(self):
        return self.ratio + 1

    def known(self, query):
        return lambda group, size: self._choose([self.seed, query, group], size)

    def other(self, queries, query):
        most = len(queries) * self.num_clean
        if most + self.num_clean > self.num_images:
            raise UserError(f'{len(queries)} draws of {self.num_clean} clean samples could leave '
                            f'too few others of {self.num_images} training images; expected at '
                            f'most {self.num_images // self.num_clean - 1} draws')

        def draw(group, size):
            taken = [self.known(q)(group, size) for q in queries]
            others = np.setdiff1d(np.arange(self.num_images), np.concatenate(taken))
            rng = np.random.default_rng([self.seed, query, group, OTHERS])
            return rng.choice(others, size, replace=False)
        return draw

    def _choose(self, seed, size):
        return np.random.default_rng(seed).choice(self.num_images, size, replace=False)


class RecordedInference(Inference):
    """Classifies each query by the mixture of recorded norms and its own, n:1.

    A recording is the mean and the variance at every normalization of clean training images that
    pass once through the network under their own batch norms. Each query draws a recording: its
    answer depends on no other query, and costs about a forward pass by population norms. It is Eq.
    6 but for one thing: there, the clean samples' deeper activations are computed under the norms
    of the mixture, here under their own.

    A draw gives each image the number of its recording.

    Args:
        model: a model.Model with its weights loaded.
        recordings: {name of a normalization: (means, variances)}, float32 [num_recordings,
            channels] each: what record_norms returns.
        ratio: n of n:1. seed: of the draws.
    """

    def __init__(self, model, recordings, ratio, seed):
        super().__init__(model, 'bn_recorded')
        self.recordings, self.ratio, self.seed = recordings, ratio, seed
        self.num_recordings = len(next(iter(recordings.values()))[0])

    @classmethod
    def from_config(cls, model, data, config):
        """Returns the bn_recorded inference that a configuration describes, recorded now."""
        seed = config['np_random_seed']
        recordings = record_norms(model, data.train_data.xs, config['num_recordings'],
                                  config['recorded_samples'], seed)
        return cls(model, recordings, config['inference_shaping_ratio'], seed)

    def logits(self, images, drawn):
        drawn = tf.reshape(drawn, [-1])
        recorded = {name: [tf.gather(values, drawn) for values in pair]
                    for name, pair in self.recordings.items()}
        return self.model(images, recorded=recorded, ratio=self.ratio)

    def parts(self, num_images, max_images=MAX_IMAGES):
        return [Part(0, num_images, size=num_images)]

    def drawn_for(self, drawn, chosen):
        return drawn[:, :, chosen]

    def known(self, query):
        return lambda group, size: self._choose([self.seed, query, group, DRAWN_RECORDING], size)

    def other(self, queries, query):
        if len(queries) >= self.num_recordings:
            raise UserError(f'num_recordings is {self.num_recordings}, and {len(queries)} draws '
                            f'may use them all; expected at least {len(queries) + 1}')

        def draw(group, size):
            taken = np.stack([self.known(q)(group, size) for q in queries], axis=1)
            chosen = []
            for i in range(size):
                others = np.setdiff1d(np.arange(self.num_recordings), taken[i])
                rng = np.random.default_rng([self.seed, query, group, DRAWN_RECORDING, OTHERS, i])
                chosen.append(rng.choice(others))
            return np.array(chosen)
        return draw

    def _choose(self, seed, size):
        return np.random.default_rng(seed).integers(0, self.num_recordings, size, np.int32)


def record_norms(model, clean_images, num_recordings, num_samples, seed):
    """Returns recordings of clean images, as RecordedInference takes them.

    Args:
        clean_images: the training images, uint8 [N, 32, 32, 3], unaugmented.
        num_recordings: how many recordings there are. num_samples: clean images in each.
        seed: of the choice of images.

    Raises:
        UserError: too few clean images.
    """
    if num_samples > len(clean_images):
        raise UserError(f'recorded_samples must be at most {len(clean_images)}, the number of '
                        f'training images, got {num_samples}')
    record = tf.function(lambda images: model.record(tf.cast(images, tf.float32)))
    recordings = []
    for number in range(num_recordings):
        rng = np.random.default_rng([seed, number, 0, RECORDINGS])
        recordings.append(record(clean_images[rng.choice(len(clean_images), num_samples,
                                                         replace=False)]))
    return {name: tuple(tf.stack(values) for values in zip(*(one[name] for one in recordings)))
            for name in recordings[0]}


def make_inference(model, mode, data, config):
    """Returns f(images [b, 32, 32, 3], query) -> logits [b, num_classes] for an inference mode.

    'bn' normalizes by the given batch itself, 'pn' by the population norms, 'bn_shaping' by n:1
    batches (ShapedInference; paper, section VI), 'bn_recorded' by recorded norms and each image's
    own (RecordedInference). None of them changes the model.

    Raises:
        ValueError: an unknown mode.
    """
    if mode not in INFERENCE_MODES:
        raise ValueError(f'mode must be one of {", ".join(INFERENCE_MODES)}, got {mode!r}')
    if mode == 'bn_shaping':
        return ShapedInference.from_config(model, data, config)
    if mode == 'bn_recorded':
        return RecordedInference.from_config(model, data, config)
    return Inference(model, mode)


def queries_of(batch, num_draws):
    """Returns the query numbers under which evaluation batch `batch` is classified, one a draw."""
    return [batch + draw * DRAW for draw in range(num_draws)]


def form_of(mode, config):
    """Returns how a mode draws, as it stands in a configuration; {} where nothing is drawn."""
    return {key: config[key] for key in FORMS.get(mode, ())}
