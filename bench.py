"""Times the training step, and queries, on this machine: seconds, share of its peak, memory.

    python bench.py                                 # config.json: w32-10, norm shaping
    python bench.py --set width_factor=4 --steps 2 --repeats 9
    python bench.py --set attack_norms=fixed        # recorded norms in the attack, beside batch
    python bench.py --against original --set precision=mixed_bfloat16   # other ways beside it
    python bench.py --against torch                 # needs PyTorch: pip install torch
    python bench.py --query --set width_factor=1    # a query, and a gradient through one

What is timed is train.make_train_step's step on images of random pixels (no data set is needed),
from NumPy arrays on the host until its metrics are back there. Peak is the best rate of a large
square matrix product in the same process, in the type the convolutions run in (for float32 on a
GPU, both in TensorFloat-32 unless that is turned off in TensorFlow). It is a yardstick, not a
bound: single convolutions have been seen 13% above it on a CPU. With mixed_bfloat16, float32's is
shown too: not every processor that has bfloat16 instructions is faster with them.

With attack_norms `fixed`, our step with `batch` is timed in the same run, too.

--against also times other ways of working, in the same run and in turns with ours, so that a
machine that drifts affects all. All of them attack through batch norms, as `batch` does.

original: MadryLab's cifar10_challenge (train.py, pgd_attack.py, cifar10_input.py). Augmentation as
a graph call of its own, image by image; the attack as a Python loop in NumPy's float64, with one
graph call, one copy to and one from the graph a step; the update as one more call. What its number
says and does not say:
  - It is around the same network twice over. "Same ops": around our Model as it is, so that the
    ratio is of the way of working alone. "Its own ops": with the leaky ReLU and the standardization
    done as the original's network does them (tf.where, tf.map_fn). Both have our fused
    normalization, which is also the original's kernel.
  - It always runs in float32 and without XLA, as the original does. With mixed_bfloat16 or on a GPU
    the ratio is of our step as configured to the original's way, not of two like settings.
  - It attacks every sample, as the original does. With attack_norms `batch`, all our training modes
    compute as many gradients, but `natural`, which is refused here; with `fixed`, shaping in attack
    and training computes fewer.

torch: the same network, batch and step in PyTorch, eager, channels_last, as a PyTorch user would
write it; with mixed_bfloat16, by autocast. (torch.compile was no faster on two CPU cores.)

--query times one image's answer in a batch of eval_batch_size, under each inference mode and under
bn_shaping with a batch for each query (Eq. 6 to the letter), and the gradient of its cross-entropy
with respect to the image. In turns, too.
"""
import itertools
import os
import platform
import resource
import sys
from timeit import default_timer as timer

from absl import flags
import numpy as np

from config import INFERENCE_MODES, begin, choice, config_from_flags
from running.program import run

if __name__ == '__main__':  # before TensorFlow is imported: help and mistakes take no time
    flags.DEFINE_integer('steps', 5, 'Training steps in a block, the unit that is timed.')
    flags.DEFINE_integer('repeats', 5, 'Blocks; the median block is reported.')
    flags.DEFINE_string('against', None, 'Also time other ways of working, block by block, '
                        'comma-separated: original, torch, or all.')
    flags.DEFINE_boolean('query', False, 'Time queries under each inference mode, and gradients '
                         'through them, in place of a training step.')
    begin(__doc__)

import running.quiet  # noqa: F401
import keras
import tensorflow as tf

from cifar10_input import CIFAR10Data
from model import BN_DECAY, BN_EPSILON, LEAKINESS, Model, build_model, network_name
from pgd_attack import LinfPGDAttack
from running import UserError, optional
from shaping import MAX_GRADIENT_IMAGES, make_inference
from train import adversarial_tail, make_optimizer, make_train_step, use_xla

WAYS = ('original', 'torch')
IMAGE_SIZE = 32
CLEAN_IMAGES = 1000  # from which the inferences draw
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


# ---- PyTorch


def import_torch():
    """Returns PyTorch. Raises UserError: it is not installed."""
    return optional('torch', '--against torch needs PyTorch')


def make_torch_network(model, num_classes):
    """Returns model's network as a torch.nn.Module of images [b, 3, 32, 32] in [0, 255]."""
    torch = import_torch()
    nn, functional = torch.nn, torch.nn.functional

    def conv(in_filters, out_filters, stride):
        return nn.Conv2d(in_filters, out_filters, 3, stride, padding=1, bias=False)

    def batch_norm(filters):
        return nn.BatchNorm2d(filters, eps=BN_EPSILON, momentum=1 - BN_DECAY)

    class Unit(nn.Module):
        def __init__(self, in_filters, out_filters, stride, first):
            super().__init__()
            self.norm1, self.norm2 = batch_norm(in_filters), batch_norm(out_filters)
            self.conv1 = conv(in_filters, out_filters, stride)
            self.conv2 = conv(out_filters, out_filters, 1)
            self.stride, self.pad, self.first = stride, (out_filters - in_filters) // 2, first

        def forward(self, x):
            y = functional.leaky_relu(self.norm1(x), LEAKINESS)
            shortcut = y if self.first else x
            y = self.conv2(functional.leaky_relu(self.norm2(self.conv1(y)), LEAKINESS))
            if self.stride > 1:
                shortcut = functional.avg_pool2d(shortcut, self.stride)
            if self.pad:
                shortcut = functional.pad(shortcut, (0, 0, 0, 0, self.pad, self.pad))
            return y + shortcut

    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = conv(3, model.filters[0], 1)
            self.units = nn.Sequential(*(
                Unit(in_filters, out_filters, stride, name == 'unit_1_0')
                for name, in_filters, out_filters, stride in model.units()))
            self.norm = batch_norm(model.filters[-1])
            self.dense = nn.Linear(model.filters[-1], num_classes)

        def forward(self, x):
            mean = x.mean((1, 2, 3), keepdim=True)
            deviation = x.std((1, 2, 3), keepdim=True, unbiased=False)
            x = (x - mean) / deviation.clamp_min(x[0].numel() ** -0.5)
            x = functional.leaky_relu(self.norm(self.units(self.conv(x))), LEAKINESS)
            return self.dense(x.float().mean((2, 3)))

    return Network()


def make_torch_step(model, config, num_classes, rng):
    """Returns f(images, labels) -> loss: our training step in PyTorch. See the top of this file.

    Cross-entropy, with attack_norms `batch`: the TRADES adversary has no counterpart here.
    """
    torch = import_torch()
    functional = torch.nn.functional
    device = 'cuda' if torch.cuda.is_available() else 'cpu'
    network = make_torch_network(model, num_classes).to(device, memory_format=torch.channels_last)
    kernels = [p for p in network.parameters() if p.ndim > 1]
    others = [p for p in network.parameters() if p.ndim == 1]
    optimizer = torch.optim.SGD(
        [{'params': kernels, 'weight_decay': config['weight_decay']}, {'params': others}],
        lr=config['step_size_schedule'][0][1], momentum=config['momentum'])
    epsilon, step_size = config['epsilon'], config['step_size']
    all_attacked = config['training_mode'] in ('adv_only', 'shaping_in_training')
    tail = torch.tensor(adversarial_tail(config), device=device)[:, None, None, None]
    autocast = torch.autocast(device, torch.bfloat16, config['precision'] == 'mixed_bfloat16')

    def augmented(images):
        padded = np.pad(images, ((0, 0), (PAD, PAD), (PAD, PAD), (0, 0)))
        batch = np.empty_like(images)
        for i, (top, left) in enumerate(rng.integers(0, 2 * PAD + 1, (len(images), 2))):
            one = padded[i, top:top + IMAGE_SIZE, left:left + IMAGE_SIZE]
            batch[i] = one[:, ::-1] if rng.random() < 0.5 else one
        return batch

    def step(images, labels):
        images = augmented(images) if config['data_augmentation'] else images
        x_nat = torch.from_numpy(images).to(device).permute(0, 3, 1, 2).float()  # channels_last
        y = torch.from_numpy(labels).to(device)
        x = x_nat
        if config['training_mode'] != 'natural':
            if config['random_start']:
                x = (x + torch.empty_like(x).uniform_(-epsilon, epsilon)).clamp(0, 255)
            for _ in range(config['num_steps']):
                x = x if all_attacked else torch.where(tail, x, x_nat)
                x = x.detach().requires_grad_()
                with autocast:
                    loss = functional.cross_entropy(network(x), y, reduction='sum')
                x = x.detach() + step_size * torch.autograd.grad(loss, x)[0].sign()
                x = torch.minimum(torch.maximum(x, x_nat - epsilon), x_nat + epsilon).clamp(0, 255)
            x = torch.where(tail, x, x_nat)
        optimizer.zero_grad()
        with autocast:
            loss = functional.cross_entropy(network(x), y)
        loss.backward()
        optimizer.step()
        return loss.item()

    return step


# ---- queries


def time_queries(model, config, num_classes, rng, repeats):
    """Prints seconds a query, and an image gradient, under each inference mode."""
    size, n = config['eval_batch_size'], config['inference_shaping_ratio']
    images, labels = random_batch(size, num_classes, rng)
    n_clean = max(CLEAN_IMAGES, config['recorded_samples'], config['shaping_batch_size'])
    train = random_batch(n_clean, num_classes, rng)
    data = CIFAR10Data(train, (images, labels), [str(i) for i in range(num_classes)])
    forms = {mode: (mode, config) for mode in INFERENCE_MODES}
    if config['shaping_batch_size'] != n + 1:
        forms[f'bn_shaping, {n + 1}'] = 'bn_shaping', {**config, 'shaping_batch_size': n + 1}
    ways = {}
    for name, (mode, of_form) in forms.items():
        begin = timer()
        inference = make_inference(model, mode, data, of_form)
        if mode == 'bn_recorded':
            show('Recording', f'{timer() - begin:.3g} s: {config["num_recordings"]} times '
                 f'{config["recorded_samples"]} images, with tracing')
        ways[name] = inference, make_gradient(inference, images, labels)
    seconds = {}
    for query in range(repeats + 1):
        for name, (inference, gradient) in ways.items():
            for what, call in (('query', lambda q, f=inference: f(images, q).numpy()),
                               ('gradient', gradient)):
                begin = timer()
                call(query)
                if query:  # the first one traces
                    seconds.setdefault((what, name), []).append((timer() - begin) / size)
    for what in ('query', 'gradient'):
        for name in ways:
            times, pn = np.array(seconds[what, name]), np.array(seconds[what, 'pn'])
            show(f'{what}, {name}', f'{spread(1000 * times)} ms an image, '
                 f'{spread(times / pn)} times pn')


def make_gradient(inference, images, labels):
    """Returns f(query) that computes the gradient of the cross-entropy of images, part by part."""
    @tf.function
    def gradient(x, y, drawn):
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch(x)
            loss = tf.nn.sparse_softmax_cross_entropy_with_logits(y, inference.logits(x, drawn))
        return tape.gradient(loss, x)

    x, y = tf.constant(images, tf.float32), tf.constant(labels)

    def of_query(query):
        for part in inference.parts(len(images), MAX_GRADIENT_IMAGES):
            some = slice(part.start, part.end)
            gradient(x[some], y[some], inference.drawn(part, inference.known(query))).numpy()
    return of_query


# ---- the machine


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
    print(f'{label:<23} {text}', flush=True)


def main():
    steps, repeats = flags.FLAGS.steps, flags.FLAGS.repeats
    for name, value in (('steps', steps), ('repeats', repeats)):
        if value < 1:
            raise UserError(f'--{name} must be an integer of 1 or more, got {value}')
    config = config_from_flags()
    against = choice('against', flags.FLAGS.against, WAYS) if flags.FLAGS.against else []
    if 'original' in against and config['training_mode'] == 'natural':
        raise UserError('training_mode is "natural", and the original always attacks; expected '
                        'another training_mode with --against original')
    if against and config['adversary'] != 'pgd':
        raise UserError(f'adversary is "{config["adversary"]}", and --against times PGD; expected '
                        'pgd')
    if 'torch' in against and config['loss_func'] != 'xent':
        raise UserError(f'loss_func is "{config["loss_func"]}", and PyTorch\'s step attacks '
                        'cross-entropy; expected xent with --against torch')
    if 'torch' in against:
        import_torch()
    if flags.FLAGS['steps'].present and flags.FLAGS.query:
        raise UserError('--query times no training steps; expected it without --steps')
    if against and flags.FLAGS.query:
        raise UserError('--query times our inference modes, --against other ways to train; '
                        'expected one of them')
    keras.utils.set_random_seed(config['tf_random_seed'])
    rng = np.random.default_rng(config['np_random_seed'])
    num_classes = len(config['classes'] or range(10))
    model = build_model(config, num_classes)
    show_what_runs(model, config)
    if flags.FLAGS.query:
        return time_queries(model, config, num_classes, rng, repeats)

    # The first step of each, which traces and compiles its graphs, is not among the timed ones
    ways = {'ours': make_our_step(model, config)}
    first_step = seconds_a_step(ways['ours'], 1, config, num_classes, rng)
    show('First step', f'{first_step:.1f} s, with tracing and compiling')
    own_memory = peak_memory()
    ways |= other_ways(against, model, config, num_classes, rng)
    for step in list(ways.values())[1:]:
        seconds_a_step(step, 1, config, num_classes, rng)

    # Blocks of all ways in turns
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
         + (f', {own_memory / 2 ** 20:,.0f} MiB before the other ways' if ways.keys() > {'ours'}
            else ''))
    for way, times in seconds.items():
        show(way, f'{spread(times)} seconds a step')
        show('  over ours', f'{spread(np.divide(times, ours))}, block by block')


def other_ways(against, model, config, num_classes, rng):
    """Returns {name of a way: f(images, labels)} of what is timed beside our step."""
    ways = {}
    if config['attack_norms'] == 'fixed':
        ways['Ours, batch norms'] = make_our_step(build_model(config, num_classes),
                                                  {**config, 'attack_norms': 'batch'})
    if 'original' in against:
        for ops, model_class in (('same ops', Model), ('its own ops', OriginalOps)):
            ways[f'Original, {ops}'] = make_original_step(model_class, config, num_classes, rng)
    if 'torch' in against:
        ways['PyTorch'] = make_torch_step(model, config, num_classes, rng)
    return ways


def make_our_step(model, config):
    """Returns f(images, labels) -> metrics, floats: our training step, on NumPy arrays."""
    train_step = make_train_step(model, make_optimizer(config), config)
    steps_done = itertools.count()

    def step(images, labels):
        metrics = train_step(tf.constant(images), tf.constant(labels),
                             tf.constant(next(steps_done), tf.int64))
        return {name: float(value) for name, value in metrics.items()}  # waits for the device

    return step


def random_batch(size, num_classes, rng):
    """Returns images [size, 32, 32, 3] of random pixels, uint8, and random labels."""
    shape = [size, IMAGE_SIZE, IMAGE_SIZE, 3]
    return rng.integers(0, 256, shape, np.uint8), rng.integers(0, num_classes, size, np.int64)


def seconds_a_step(step, count, config, num_classes, rng):
    """Returns the mean wall time, in seconds, of `count` steps on fresh random batches."""
    batches = [random_batch(config['training_batch_size'], num_classes, rng)
               for _ in range(count)]
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
    show('Network', f'{network_name(config)}, {num_weights:,} weights, {config["precision"]}')
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
