"""Measures the training step: steps a second, FLOP/s, and the share of this machine's peak.

    python bench.py                                             # config.json: w32-10, norm shaping
    python bench.py --set width_factor=4 --steps 2 --repeats 9
    python bench.py --against --set precision=mixed_bfloat16    # the original's way beside it

What is timed is train.make_train_step's step on images of random pixels (no data set is needed),
from NumPy arrays on the host until its metrics are back there. Peak is the best rate of a large
square matrix product in the same process, in the type the convolutions run in (for float32 on a
GPU, both in TensorFloat-32 unless that is turned off in TensorFlow). It is a yardstick, not a
bound: single convolutions have been seen 13% above it on a CPU. With mixed_bfloat16, float32's is
shown too: not every processor that has bfloat16 instructions is faster with them.

--against also times the original's way of working (MadryLab's cifar10_challenge: train.py,
pgd_attack.py, cifar10_input.py) in the same run, in turns with ours, so that a machine that drifts
affects both: augmentation as a graph call of its own, image by image; the attack as a Python loop
in NumPy's float64, with one graph call, one copy to and one from the graph a step; the update
as one more call. What its number says and does not say:
  - It is around the same network twice over. "Same ops": around our Model as it is, so that the
    ratio is of the way of working alone. "Its own ops": with the leaky ReLU and the standardization
    done as the original's network does them (tf.where, tf.map_fn). Both have our fused
    normalization, which is also the original's kernel.
  - It always runs in float32 and without XLA, as the original does. With mixed_bfloat16 or on a GPU
    the ratio is of our step as configured to the original's way, not of two like settings.
  - It attacks every sample, as the original does. So do as many gradients all our training modes
    but `natural`, which is refused here.
"""
import itertools
import os
import platform
import resource
import sys
from timeit import default_timer as timer

from absl import flags
import numpy as np

from config import begin, config_from_flags
from running.program import run

if __name__ == '__main__':  # before TensorFlow is imported: help and mistakes take no time
    flags.DEFINE_integer('steps', 5, 'Training steps in a block, the unit that is timed.')
    flags.DEFINE_integer('repeats', 5, 'Blocks; the median block is reported.')
    flags.DEFINE_boolean('against', False, "Also time the original's way of working, block by "
                         'block.')
    begin(__doc__)

import running.quiet  # noqa: F401
import keras
import tensorflow as tf

from model import Model, build_model
from pgd_attack import LinfPGDAttack
from running import UserError
from train import make_optimizer, make_train_step, use_xla

IMAGE_SIZE = 32
PAD = 2  # zeros on each side of an image before it is cropped; the original's cifar10_input.py


def forward_flops(model):
    """Returns the FLOP of one image's forward pass: 2 for each multiply-add.

    Of the convolutions and the dense layer only, the zeros around the images counted as pixels;
    normalization, activation and pooling are left out, as is usual.
    """
    size = IMAGE_SIZE
    multiply_adds = size * size * 9 * 3 * model.filters[0]
    for _, in_filters, out_filters, stride in model.units():
        size //= stride  # the first of a unit's two convolutions strides
        multiply_adds += size * size * 9 * (in_filters + out_filters) * out_filters
    multiply_adds += model.filters[-1] * model.num_classes
    return 2 * multiply_adds


def passes_a_step(config):
    """Returns what a training step costs, in forward passes over its batch.

    Back to the activations costs as much as forward, back to the weights as much again: 2 for the
    gradient of an attack step, which needs none of the weights', and 3 for the weight update. The
    TRADES adversary also looks at the natural batch: once before its first step, and once more in
    the weight update where trades_beta puts it into the loss. With fixed norms, one pass records
    them, and only the samples under attack pass in its steps.
    """
    if config['training_mode'] == 'natural':
        return 3
    attacked, passes = 1., 3
    if config['attack_norms'] == 'fixed':
        passes += 1
        if config['training_mode'] == 'shaping_in_attack_and_training':
            attacked = 1 / (config['shaping_ratio'] + 1)
    passes += 2 * config['num_steps'] * attacked
    if config['adversary'] == 'trades':
        passes += attacked + (3 if config['trades_beta'] else 0)
    return passes


class OriginalOps(Model):
    """Model, with the original's ops where ours has one fused or batched op (its model.py)."""

    def standardize(self, images):
        return tf.map_fn(tf.image.per_image_standardization, images)

    def _relu(self, x, leakiness=0.0):
        return tf.where(tf.less(x, 0.), leakiness * x, x)


def make_original_step(model_class, config, num_classes, rng):
    """Returns f(images, labels) -> loss: a training step, done in the original's way.

    See the top of this file. Arguments as of the training step, but NumPy arrays; the loss, a
    float, is that of the weight update, with weight decay.
    """
    keras.utils.set_random_seed(config['tf_random_seed'])
    model = model_class(config['num_residual_units'], config['width_factor'], num_classes)
    optimizer = make_optimizer(config)
    optimizer.build(model.trainable_variables)
    attack = LinfPGDAttack.from_config(model, config, update_population_norms=True)
    epsilon, step_size = config['epsilon'], config['step_size']
    batch = [tf.TensorSpec([None, IMAGE_SIZE, IMAGE_SIZE, 3], tf.float32),
             tf.TensorSpec([None], tf.int64)]

    @tf.function(input_signature=batch[:1])
    def augmented(images):
        padded = IMAGE_SIZE + 2 * PAD
        for one_image in (lambda x: tf.image.resize_with_crop_or_pad(x, padded, padded),
                          lambda x: tf.image.random_crop(x, [IMAGE_SIZE, IMAGE_SIZE, 3]),
                          tf.image.random_flip_left_right):
            images = tf.map_fn(one_image, images)
        return images

    @tf.function(input_signature=batch)
    def gradient(x, y):
        return attack.gradient(x, y)

    @tf.function(input_signature=batch)
    def update(x, y):
        with tf.GradientTape() as tape:
            logits = model(x, update_population_norms=True)
            xent = tf.nn.sparse_softmax_cross_entropy_with_logits(y, logits)
            loss = tf.reduce_mean(xent) + config['weight_decay'] * model.weight_decay_loss()
        optimizer.apply(tape.gradient(loss, model.trainable_variables), model.trainable_variables)
        return loss

    def to_graph(array):
        return tf.constant(array, tf.float32)

    def step(images, labels):
        x_nat = images.astype(np.float32)
        if config['data_augmentation']:
            x_nat = augmented(to_graph(x_nat)).numpy()
        x = x_nat.astype(np.float64)
        if config['random_start']:
            x = np.clip(x + rng.uniform(-epsilon, epsilon, x.shape), 0, 255)
        for _ in range(config['num_steps']):
            direction = np.sign(gradient(to_graph(x), tf.constant(labels)).numpy())
            x = np.clip(x + step_size * direction, x_nat - epsilon, x_nat + epsilon)
            x = np.clip(x, 0, 255)
        return float(update(to_graph(x), tf.constant(labels)))

    return step


def matmul_seconds(a, b, count):
    """Returns the mean wall time, in seconds, of `count` products of a and b."""
    begin = timer()
    for _ in range(count):
        product = tf.matmul(a, b)
    product[0, 0].numpy()  # a GPU has only been asked so far: this waits for it
    return (timer() - begin) / count


def matmul_peak(dtype):
    """Returns the best rate of a square matrix product in dtype, FLOP/s, and its size."""
    best = 0., 0
    for size in (2048, 4096, 8192):
        a, b = (tf.cast(tf.random.stateless_uniform([size, size], [0, i]), dtype) for i in (0, 1))
        matmul_seconds(a, b, 1)  # sets up threads and kernels
        once = matmul_seconds(a, b, 1)
        count = max(1, round(0.1 / once))
        fastest = min(matmul_seconds(a, b, count) for _ in range(5))
        best = max(best, (2 * size ** 3 / fastest, size))
        if once > 0.5:  # eight times this, the next size, is too long to wait for
            break
    return best


def peak_memory():
    """Returns the most host memory that this process has held so far, in bytes."""
    unit = 1 if sys.platform == 'darwin' else 1024  # getrusage(2): bytes on macOS, KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def device_name():
    """Returns what TensorFlow will run on, in words: the first GPU, else the CPU."""
    gpus = tf.config.list_physical_devices('GPU')
    if gpus:
        return 'GPU: ' + tf.config.experimental.get_device_details(gpus[0]).get('device_name', '?')
    name = platform.processor() or platform.machine()
    if os.path.exists('/proc/cpuinfo'):  # Linux, where platform knows the architecture only
        with open('/proc/cpuinfo', encoding='utf-8') as f:
            names = [line.partition(':')[2].strip() for line in f if line.startswith('model name')]
        name = names[0] if names else name
    cores = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()
    return f'CPU: {name}, {cores} logical cores'


def prefixed(value, unit):
    """Returns value with a metric prefix, e.g. '3.12 TFLOP'."""
    prefixes = ((1e15, 'P'), (1e12, 'T'), (1e9, 'G'), (1e6, 'M'))
    factor, prefix = next((pair for pair in prefixes if value >= pair[0]), prefixes[-1])
    return f'{value / factor:.3g} {prefix}{unit}'


def spread(values, digits=3):
    """Returns the median of values, with the least and the greatest."""
    low, median, high = (f'{f(values):.{digits}g}' for f in (np.min, np.median, np.max))
    return f'{median} ({low} to {high})'


def show(label, text):
    print(f'{label:<20}{text}', flush=True)


def main():
    steps, repeats, against = flags.FLAGS.steps, flags.FLAGS.repeats, flags.FLAGS.against
    for name, value in (('steps', steps), ('repeats', repeats)):
        if value < 1:
            raise UserError(f'--{name} must be an integer of 1 or more, got {value}')
    config = config_from_flags()
    if against and config['training_mode'] == 'natural':
        raise UserError('training_mode is "natural", and the original always attacks; expected '
                        'another training_mode with --against')
    keras.utils.set_random_seed(config['tf_random_seed'])
    rng = np.random.default_rng(config['np_random_seed'])
    num_classes = len(config['classes'] or range(10))
    model = build_model(config, num_classes)
    show_what_runs(model, config)

    # The first step of each, which traces and compiles its graphs, is not among the timed ones
    ways = {'ours': make_our_step(model, config)}
    first_step = seconds_a_step(ways['ours'], 1, config, num_classes, rng)
    show('First step', f'{first_step:.1f} s, with tracing and compiling')
    own_memory = peak_memory()
    if against:
        for ops, model_class in (('same ops', Model), ('its own ops', OriginalOps)):
            ways[ops] = make_original_step(model_class, config, num_classes, rng)
            seconds_a_step(ways[ops], 1, config, num_classes, rng)

    # Blocks of ours and of the original's way in turns
    seconds = {way: [] for way in ways}
    for _ in range(repeats):
        for way, step in ways.items():
            seconds[way].append(seconds_a_step(step, steps, config, num_classes, rng))
    memory = peak_memory()  # read before the matrix products, which need much of their own

    # The report
    ours = seconds.pop('ours')
    show('Seconds a step', f'{spread(ours)}, median of {repeats} blocks of {steps} steps')
    show_rates(model, config, np.median(ours))
    show('Peak memory', f'{memory / 2 ** 20:,.0f} MiB of host memory'
         + (f", {own_memory / 2 ** 20:,.0f} MiB before the original's way" if against else ''))
    for ops, times in seconds.items():
        show("Original's way", f'{spread(times)} seconds a step, {ops}, float32')
        show('  over ours', f'{spread(np.divide(times, ours))}, block by block')


def make_our_step(model, config):
    """Returns f(images, labels) -> metrics, floats: our training step, on NumPy arrays."""
    train_step = make_train_step(model, make_optimizer(config), config)
    steps_done = itertools.count()

    def step(images, labels):
        metrics = train_step(tf.constant(images), tf.constant(labels),
                             tf.constant(next(steps_done), tf.int64))
        return {name: float(value) for name, value in metrics.items()}  # waits for the device

    return step


def seconds_a_step(step, count, config, num_classes, rng):
    """Returns the mean wall time, in seconds, of `count` steps on fresh random batches."""
    batch_size = config['training_batch_size']
    shape = [batch_size, IMAGE_SIZE, IMAGE_SIZE, 3]
    batches = [(rng.integers(0, 256, shape, np.uint8),
                rng.integers(0, num_classes, batch_size, np.int64)) for _ in range(count)]
    begin = timer()
    for batch in batches:
        step(*batch)
    return (timer() - begin) / count


def show_what_runs(model, config):
    """Prints the device, the network and the kind of step."""
    num_weights = sum(int(np.prod(v.shape)) for v in model.trainable_variables)
    num_steps = 0 if config['training_mode'] == 'natural' else config['num_steps']
    show('Device', device_name())
    show('TensorFlow', f'{tf.__version__}, XLA {"on" if use_xla(config) else "off"}')
    show('Network', f'w{6 * model.num_residual_units + 2}-{config["width_factor"]}, '
         f'{num_weights:,} weights, {config["precision"]}')
    show('Step', f'batch {config["training_batch_size"]}, {config["training_mode"]}, '
         f'{config["adversary"]}, {num_steps} attack steps by {config["attack_norms"]} norms')


def show_rates(model, config, seconds):
    """Prints how fast a step of so many seconds is, beside this machine's peak."""
    batch_size, passes = config['training_batch_size'], passes_a_step(config)
    flops = forward_flops(model) * batch_size * passes
    peak, size = matmul_peak(model.compute_type)
    show('Speed', f'{1 / seconds:.3g} steps/s, {batch_size / seconds:.4g} images/s')
    show('FLOP a step', f'{prefixed(flops, "FLOP")}, {passes:g} forward passes of '
         f'{prefixed(flops / passes, "FLOP")}')
    show('Rate', prefixed(flops / seconds, 'FLOP/s'))
    show('Peak', f'{prefixed(peak, "FLOP/s")}, {model.compute_type.name} matrix product of {size}'
         + (f' (float32: {prefixed(matmul_peak(tf.float32)[0], "FLOP/s")})'
            if model.compute_type != tf.float32 else ''))
    show('Share of peak', f'{flops / seconds / peak:.1%}')


if __name__ == '__main__':
    run(main)
