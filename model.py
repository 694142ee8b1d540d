"""The wide ResNet of MadryLab's CIFAR-10 challenge (the original's model.py) as a keras.Model.

What differs from the original's file is the normalization. The paper turns on *which* statistics a
forward pass normalizes by, so that is an argument of every call: the batch ("BN"), each of several
equal groups of the batch (paper, Eq. 6, many queries in one call), or the population, that is the
moving averages ("PN").
"""
import json
import os
import re
import sys
from typing import NamedTuple

import numpy as np

from config import BATCH_NORMS, MAX_INTEGER, PRECISIONS
from running import UserError, brief
from running.untrusted import check_plain, read_json
import keras
import tensorflow as tf

BN_DECAY = 0.9        # of the moving averages; the original's model.py
BN_EPSILON = 0.001    # added to the variance; the default of the original's batch_norm
BEST = 'checkpoint-best'  # in model_dir: the best by validation images
LEAKINESS = 0.1       # slope of the leaky ReLU below zero
ELSEWHERE = '--model_dir DIR takes the configuration stored in DIR'


class Norms(NamedTuple):
    """What one forward pass normalizes by; Model.call says what each of these means."""
    training: bool = True
    num_groups: int = 1
    update_population_norms: bool = False
    norms_from: int | None = None
    recorded: dict | None = None
    ratio: int | None = None
    record: dict | None = None  # filled with {normalization: (mean, variance) of the batch}


@keras.saving.register_keras_serializable('norm_shaping')
class Model(keras.Model):
    """Pre-activation wide ResNet, w32-10 by default (45.9 million weights).

    Args:
        num_residual_units: units in each of the three stages; depth is 6 * units + 2.
        width_factor: channels of the stages are 16, 32 and 64 times this. ("w32-1" is 5 units, 1.)
        num_classes: number of logits.
        precision: 'float32', or 'mixed_bfloat16': convolutions and activations in bfloat16, while
            weights, statistics, the dense layer and the logits stay float32.
        batch_norms: where a tf.distribute strategy runs the model on several replicas, BN is by
            the statistics of each replica's own share of the batch, 'per_replica', or by those of
            the whole batch, 'synchronized'.

    Initial weights are drawn from Keras's global generator: call keras.utils.set_random_seed first.
    Variables carry the original's names, in `variables_by_name`. They are made for the strategy in
    whose scope the model is.
    """

    def __init__(self, num_residual_units=5, width_factor=10, num_classes=10, precision='float32',
                 batch_norms='per_replica'):
        # autocast would turn the pixels into bfloat16 before they are standardized.
        super().__init__(name='model', autocast=False)
        for name, value, known in (('precision', precision, PRECISIONS),
                                   ('batch_norms', batch_norms, BATCH_NORMS)):
            if value not in known:
                raise ValueError(f'{name} must be one of {", ".join(known)}, got {value!r}')
        self.arguments = dict(num_residual_units=num_residual_units, width_factor=width_factor,
                              num_classes=num_classes, precision=precision, batch_norms=batch_norms)
        self.strategy = tf.distribute.get_strategy()
        self.synchronized = batch_norms == 'synchronized'
        self.num_residual_units = num_residual_units
        self.num_classes = num_classes
        self.compute_type = tf.float32 if precision == 'float32' else tf.bfloat16
        self.norm_decay = BN_DECAY  # paper/population_norms.py tries others
        self.filters = [16] + [channels * width_factor for channels in (16, 32, 64)]
        self._by_name = {}
        self._build_model(tf.zeros([1, 32, 32, 3]), Norms(training=False))  # makes the variables
        self.built = True

    def _build_model(self, images, norms, features=False):
        """Computes the logits. A variable is made where it is first used: in the constructor."""
        x = self.standardize(tf.cast(images, tf.float32))
        x = self._conv('input/init_conv', tf.cast(x, self.compute_type), 3, 3, self.filters[0], 1)

        for name, in_filter, out_filter, stride in self.units():
            x = self._residual(name, x, in_filter, out_filter, stride, norms,
                               activate_before_residual=name == 'unit_1_0')

        x = self._batch_norm('unit_last', x, norms)
        x = self._relu(x, LEAKINESS)
        x = self._global_avg_pool(tf.cast(x, tf.float32))
        if features:
            return x
        return self._fully_connected('logit', x, self.num_classes)

    def _batch_norm(self, name, x, norms):
        """Normalizes x [b, h, w, c] by what `norms` says; moves the moving averages if it says."""
        channels = (x.shape[-1],)
        beta = self._variable(f'{name}/BatchNorm/beta', channels, keras.initializers.Zeros)
        gamma = self._variable(f'{name}/BatchNorm/gamma', channels, keras.initializers.Ones)
        moving_mean = self._moving_average(f'{name}/BatchNorm/moving_mean', channels, 'zeros')
        moving_variance = self._moving_average(f'{name}/BatchNorm/moving_variance', channels,
                                               'ones')
        if not norms.training:
            return population_norm(x, gamma, beta, moving_mean, moving_variance)
        if norms.recorded is not None:
            recorded = norms.recorded[name]
            return (population_norm(x, gamma, beta, *recorded) if norms.ratio is None else
                    mixed_norm(x, gamma, beta, *recorded, norms.ratio))
        if norms.norms_from is not None:
            mean, variance = tf.nn.moments(tf.cast(x[:norms.norms_from], tf.float32), [0, 1, 2])
            return population_norm(x, gamma, beta, mean, variance)
        if self.synchronized and num_replicas() > 1:
            y, mean, variance = synchronized_batch_norm(x, gamma, beta)
        else:
            y, mean, variance = batch_norm_by_group(x, gamma, beta, norms.num_groups)
        if norms.update_population_norms and norms.num_groups == 1:
            moving_mean.assign_sub((moving_mean - mean) * (1 - self.norm_decay))
            moving_variance.assign_sub((moving_variance - variance) * (1 - self.norm_decay))
        if norms.record is not None:
            n = tf.cast(tf.size(x) // x.shape[-1], tf.float32)
            if self.synchronized:
                n *= num_replicas()
            norms.record[name] = mean, variance * (n - 1) / n  # what normalizes is not unbiased
        return y

    def _residual(self, name, x, in_filter, out_filter, stride, norms,
                  activate_before_residual=False):
        """Returns the output of one unit, two convolutions beside a shortcut."""
        orig_x = x
        scope = 'shared_activation' if activate_before_residual else 'residual_only_activation'
        x = self._relu(self._batch_norm(f'{name}/{scope}', x, norms), LEAKINESS)
        if activate_before_residual:
            orig_x = x

        x = self._conv(f'{name}/sub1/conv1', x, 3, in_filter, out_filter, stride)

        x = self._relu(self._batch_norm(f'{name}/sub2', x, norms), LEAKINESS)
        x = self._conv(f'{name}/sub2/conv2', x, 3, out_filter, out_filter, 1)

        if in_filter != out_filter:
            if stride > 1:
                orig_x = tf.nn.avg_pool2d(orig_x, stride, stride, 'VALID')
            pad = (out_filter - in_filter) // 2
            orig_x = tf.pad(orig_x, [[0, 0], [0, 0], [0, 0], [pad, pad]])
        return x + orig_x

    def _decay(self):
        """Returns the sum of half the squared norms of the convolution and dense kernels."""
        return tf.add_n([tf.nn.l2_loss(tf.convert_to_tensor(v))
                         for name, v in self._by_name.items() if name.endswith('/DW')])

    def _conv(self, name, x, filter_size, in_filters, out_filters, stride):
        """Returns the convolution of x, zeros around it, in the type of the network's compute."""
        n = filter_size * filter_size * out_filters
        kernel = self._variable(f'{name}/DW', (filter_size, filter_size, in_filters, out_filters),
                                keras.initializers.RandomNormal, stddev=np.sqrt(2.0 / n))
        return tf.nn.conv2d(x, tf.cast(kernel, self.compute_type), stride, padding='SAME')

    def _relu(self, x, leakiness=0.0):
        """Returns the leaky ReLU of x."""
        return tf.nn.leaky_relu(x, leakiness)

    def _fully_connected(self, name, x, out_dim):
        """Returns the dense layer of x [b, c], float32 [b, out_dim]."""
        in_dim = x.shape[-1]
        limit = np.sqrt(3.0 / in_dim)  # TensorFlow 1's uniform_unit_scaling_initializer
        w = self._variable(f'{name}/DW', (in_dim, out_dim), keras.initializers.RandomUniform,
                           minval=-limit, maxval=limit)
        b = self._variable(f'{name}/biases', (out_dim,), keras.initializers.Zeros)
        return tf.matmul(x, w) + b

    def _global_avg_pool(self, x):
        """Returns the mean of x [b, h, w, c] over space, [b, c]."""
        return tf.reduce_mean(x, [1, 2])

    # ---- beyond the original's file: calls, variables, checkpoints

    def call(self, images, training=True, num_groups=1, update_population_norms=False,
             norms_from=None, recorded=None, ratio=None, features=False):
        """Computes the logits of a batch.

        Args:
            images: [b, 32, 32, 3], in [0, 255]; each is standardized here, as in the original.
            training: True normalizes by the batch (BN), False by the moving averages (PN).
            num_groups: with BN, normalizes each of this many equal, consecutive groups of the batch
                by its own statistics. b must be a multiple of it.
            update_population_norms: with BN, moves the moving averages towards this batch, as every
                forward pass of the original's training does. Only a training asks for it: a model
                that is used or judged with BN must not change what PN will answer. They never move
                with num_groups > 1, where there is no one batch to move towards.
            norms_from: with BN, normalizes the whole batch by the statistics of this many first
                samples: how the others look to the batch norms of these. The moving averages are
                left alone.
            recorded: normalizes by these constants, {normalization: (mean, variance)}, as `record`
                returns them, [channels] each. Gradients do not flow through them.
            ratio: with `recorded`, normalizes each image by the mixture of a recording and its own
                statistics, ratio:1; recorded means and variances are then [b, channels], a
                recording for each image.
            features: returns what the last dense layer is given, [b, channels], in place of the
                logits.

        Returns:
            logits [b, num_classes], float32.
        """
        return self._build_model(images, Norms(
            training, num_groups, update_population_norms, norms_from, recorded, ratio), features)

    def record(self, images, update_population_norms=False):
        """Returns the statistics of a batch at every normalization, one forward pass with BN.

        They are constants to what uses them: gradients do not flow back into the images.

        Args:
            images, update_population_norms: as `call` takes them.

        Returns:
            {name of the normalization: (mean, variance)}, [channels] each, float32; the variances
            are those that normalize, not the unbiased ones that move the moving averages.
        """
        found = {}
        self._build_model(images, Norms(update_population_norms=update_population_norms,
                                        record=found))
        return {name: tuple(map(tf.stop_gradient, values)) for name, values in found.items()}

    def units(self):
        """Yields (name, input channels, output channels, stride) of each unit, in order."""
        for stage in (1, 2, 3):
            for i in range(self.num_residual_units):
                in_filters = self.filters[stage - 1 if i == 0 else stage]
                stride = 2 if stage > 1 and i == 0 else 1
                yield f'unit_{stage}_{i}', in_filters, self.filters[stage], stride

    def standardize(self, images):
        """Returns images [b, 32, 32, 3], each of mean 0 and variance 1."""
        return tf.image.per_image_standardization(images)

    def _variable(self, name, shape, initializer, **settings):
        """Returns the variable of that name, made on its first use, as tf.get_variable does.

        Args:
            initializer: a class of keras.initializers. settings: its arguments.
        """
        if name not in self._by_name:
            # Keras allows no '/' in a name, and would cast on reading: normalization needs float32
            self._by_name[name] = self.add_weight(
                name=name.replace('/', '.'), shape=shape, initializer=initializer(**settings),
                dtype='float32', autocast=False)
        return self._by_name[name]

    def _moving_average(self, name, shape, initializer):
        """Returns the moving average of that name, made on its first use."""
        if name not in self._by_name:
            # Each replica moves its own copy, so that an attack step needs no word from the others;
            # add_weight cannot say so. Keras tracks a variable that is an attribute.
            self._by_name[name] = keras.Variable(
                keras.initializers.get(initializer), name=name.replace('/', '.'), shape=shape,
                dtype='float32', autocast=False, trainable=False, synchronization='on_read',
                aggregation='mean')
            setattr(self, '_' + name.replace('/', '_'), self._by_name[name])
        return self._by_name[name]

    def get_config(self):
        """Returns the constructor's arguments: with them Keras loads what Model.save wrote."""
        return dict(self.arguments)

    def get_build_config(self):
        return None  # the constructor makes all variables

    def export(self, *_, **__):
        """Raises UserError. As Keras has it, the exported model would normalize by its batch."""
        raise UserError(
            'Model.export would serve batch norms: each answer would depend on the other images; '
            "expected model.save('x.keras'), or keras.export.ExportArchive with an endpoint that "
            'calls model(images, training=False)')

    @property
    def variables_by_name(self):
        """dict: the original's name of each variable -> the variable."""
        return dict(self._by_name)

    def weight_decay_loss(self):
        """Returns the sum of half the squared norms of the convolution and dense kernels, a scalar.

        Biases and normalization parameters are left out, as in the original.
        """
        return self._decay()

    def average_population_norms(self):
        """Sets the moving averages of all replicas to their mean, in each replica's context.

        They are linear in the batches' statistics: this is what averaging these would give.
        """
        if num_replicas() > 1:
            norms = [v for v in self._by_name.values() if not v.trainable]
            means = tf.distribute.get_replica_context().all_reduce(
                'MEAN', [tf.identity(v) for v in norms])
            for v, mean in zip(norms, means):
                v.assign(mean)

    def checkpoint_variables(self, optimizer=None):
        """Returns {name in the original's checkpoints: tf.Variable}.

        The '/Momentum' slots and global_step are among them if `optimizer`, a
        train.MomentumOptimizer, is given. Of several replicas' copies it is this process's first.
        """
        return {name: copies[0] for name, copies in self._copies(optimizer).items()}

    def _copies(self, optimizer):
        """Returns {name in the original's checkpoints: this process's copies, one a replica}."""
        variables = {name: v.value for name, v in self._by_name.items()}
        if optimizer is not None:
            optimizer.build(self.trainable_variables)
            variables['global_step'] = optimizer.iterations.value
            for name, v in self._by_name.items():
                if v.trainable:
                    variables[f'{name}/Momentum'] = optimizer.velocity(v).value
        return {name: self.strategy.experimental_local_results(v)
                for name, v in variables.items()}

    def load_madry_checkpoint(self, prefix, optimizer=None):
        """Assigns the weights of a checkpoint of the original's or of this project: one format.

        Args:
            prefix: path of the checkpoint less its '.index', e.g. 'models/secret/checkpoint-70000'.
            optimizer: a train.MomentumOptimizer that takes over velocities and step, if given.

        Returns:
            the checkpoint's global step, an int (0 where it holds none).

        Raises:
            running.UserError: no such checkpoint, another network's, or one with values that no
                training has: text, NaN, an endless step. Nothing is assigned then.
        """
        copies = self._copies(optimizer)
        expected = {name: variable for name, (variable, *_) in copies.items()}
        try:
            reader = tf.train.load_checkpoint(str(prefix))
            global_step = _global_step(prefix, reader)
            self._check_fit(prefix, reader.get_variable_to_shape_map(), expected)
            values = {name: _finite(prefix, reader, name) for name in copies
                      if name != 'global_step'}
        except UserError:
            raise
        except Exception as error:  # a damaged index raises nearly anything
            raise UserError(f'{prefix} cannot be read as a checkpoint: '
                            f'{brief(error)}') from None
        if 'global_step' in copies:
            values['global_step'] = global_step
        for name, replicas in copies.items():
            for variable in replicas:
                variable.assign(values[name])
        return global_step

    def _check_fit(self, prefix, shapes, expected):
        """Raises UserError unless a checkpoint's tensors are those of this network.

        Args:
            shapes: {name: shape} of the checkpoint. expected: {name: tf.Variable}.
        """
        for name, variable in expected.items():
            if name not in shapes and name.endswith('/Momentum'):
                raise UserError(f'{prefix} holds no velocities; expected the folder of a training, '
                                'not released weights')
            if name not in shapes:
                raise UserError(f'{prefix} holds no {name}: it is of another network than '
                                f'num_residual_units {self.num_residual_units} '
                                f'describes; {ELSEWHERE}')
            if tuple(shapes[name]) != tuple(variable.shape):
                raise UserError(f'{name} is {list(shapes[name])} in {prefix}, but '
                                f'{list(variable.shape)} here: see width_factor and classes; '
                                f'{ELSEWHERE}')
        extra = sorted(n for n in shapes if n.endswith('/DW') and n not in expected)
        if extra:
            raise UserError(f'{prefix} also holds {extra[0]}: it is of a deeper network than '
                            f'num_residual_units {self.num_residual_units} describes; {ELSEWHERE}')

    def save_madry_checkpoint(self, prefix, optimizer=None, global_step=0):
        """Writes prefix.index and prefix.data-00000-of-00001, which the original's Saver restores.

        Names and shapes are the original's, global_step (which its eval.py asks for) included.

        Args:
            optimizer: a train.MomentumOptimizer whose velocities and step are stored, if given.
            global_step: what is stored where there is no optimizer.

        For the original's scripts to find it, the folder also needs a file `checkpoint` that names
        it, as train.py's folders have (tf.compat.v1.train.update_checkpoint_state writes one).
        """
        variables = self.checkpoint_variables(optimizer)
        if optimizer is None:
            variables['global_step'] = tf.Variable(global_step, dtype=tf.int64)
        tf.compat.v1.train.Saver(variables).save(None, str(prefix), write_state=False,
                                                 write_meta_graph=False)


def _finite(prefix, reader, name):
    """Returns the tensor of that name in a checkpoint. Raises UserError: not finite numbers."""
    dtype = reader.get_variable_to_dtype_map()[name]
    if not dtype.is_floating:
        raise UserError(f'{prefix}: {name} is of type {dtype.name}; expected float32')
    value = reader.get_tensor(name)
    if not np.isfinite(value).all():
        raise UserError(f'{prefix}: {name} holds NaN or infinity; expected finite numbers')
    return value


def _global_step(prefix, reader):
    """Returns the global step of a checkpoint, 0 where it holds none. Raises UserError."""
    if not reader.has_tensor('global_step'):
        return 0
    shape = reader.get_variable_to_shape_map()['global_step']
    dtype = reader.get_variable_to_dtype_map()['global_step']
    if shape or not dtype.is_integer:
        raise UserError(f'{prefix}: global_step is {dtype.name} {list(shape)}; expected one '
                        'integer')
    step = int(reader.get_tensor('global_step'))
    if not 0 <= step <= MAX_INTEGER:
        raise UserError(f'{prefix}: global_step is {step}; expected 0 to {MAX_INTEGER}')
    return step


def build_model(config, num_classes):
    """Returns the Model that a configuration describes."""
    return Model(config['num_residual_units'], config['width_factor'], num_classes,
                 config['precision'], config['batch_norms'])


def num_replicas():
    """Returns how many replicas of a tf.distribute strategy run the calling code together."""
    context = tf.distribute.get_replica_context()
    return 1 if context is None else context.num_replicas_in_sync


def checkpoints(folder):
    """Returns the prefixes of the checkpoints in a folder, the newest first."""
    found = []
    for name in os.listdir(folder) if os.path.isdir(folder) else ():
        match = re.fullmatch(r'checkpoint-(\d{1,18})\.index', name)
        if match:
            found.append(int(match[1]))
    return [os.path.join(folder, f'checkpoint-{step}') for step in sorted(found, reverse=True)]


def damage(prefix):
    """Returns what is wrong with a checkpoint's files, in one line, or None.

    Every byte that counts is read: the format keeps a checksum of each tensor and of its index.
    """
    try:
        for end in ('.index', '.data-00000-of-00001'):
            check_plain(prefix + end)
        size = os.path.getsize(f'{prefix}.data-00000-of-00001')
        reader = tf.train.load_checkpoint(prefix)
        types = reader.get_variable_to_dtype_map()
        for name, shape in reader.get_variable_to_shape_map().items():
            if types[name].size * np.prod(shape, dtype=object) > size:  # or it would be allocated
                return f'{name} is larger than the file that holds it'
            reader.get_tensor(name)
    except OSError as error:
        return f'{os.path.basename(error.filename or prefix)}: {error.strerror or brief(error)}'
    except Exception as error:  # a damaged index raises nearly anything
        return brief(error)
    return None


def newest_intact(folder):
    """Returns the prefix of the newest intact checkpoint in a folder, or None.

    Those that were cut short or damaged are named on stderr and skipped.
    """
    for prefix in checkpoints(folder):
        fault = damage(prefix)
        if fault is None:
            return prefix
        print(f'{prefix} is damaged and skipped: {fault}', file=sys.stderr, flush=True)
    return None


def network_name(config):
    """Returns what the network is called, such as 'w32-10': its depth and width."""
    return f'w{6 * config["num_residual_units"] + 2}-{config["width_factor"]}'


def find_checkpoint(config, checkpoint=None, select='last', option='--checkpoint'):
    """Returns the prefix of a checkpoint: the one given, or one in model_dir.

    Args:
        checkpoint: its prefix, one of its files, or a folder, whose newest intact one is taken.
        select: 'last', the newest intact one in model_dir, or 'best', the best by validation.
        option: what named the checkpoint, for messages.

    Raises:
        UserError: there is none, none that is intact, or it was trained with another network or
            other classes.
    """
    if select == 'best':
        checkpoint = best_checkpoint(config['model_dir'], checkpoint)
    prefix, folder = (given_checkpoint(checkpoint, option) if checkpoint else
                      (None, config['model_dir']))
    if prefix is None:
        where = f'{option} {checkpoint}' if checkpoint else f'model_dir {folder}'
        prefix = newest_intact(folder)
        if prefix is None and checkpoints(folder):
            raise UserError(f'{where} holds checkpoints, but none that is intact; expected another '
                            'folder')
        if prefix is None:
            raise UserError(f'{where} holds no checkpoint; train.py writes them there')
    check_trained_alike(config, prefix, option)
    return prefix


def best_checkpoint(model_dir, checkpoint=None):
    """Returns the prefix of the best checkpoint in model_dir. Raises UserError: there is none.

    Args:
        checkpoint: None, or what was named as well, which is refused.
    """
    if checkpoint:
        raise UserError(f'--checkpoint {checkpoint} and --select best each name a checkpoint; '
                        'expected one of them')
    prefix = os.path.join(model_dir, BEST)
    if not os.path.exists(f'{prefix}.index'):
        raise UserError(f'{model_dir} holds no {BEST}; a training with num_validation_examples '
                        'above 0 writes it there')
    fault = damage(prefix)
    if fault:
        raise UserError(f'{prefix} is damaged: {fault}; expected --select last')
    return prefix


def given_checkpoint(checkpoint, option):
    """Returns (prefix, None) where a checkpoint's prefix or file is given, (None, folder) else."""
    prefix = re.sub(r'\.(index|meta|data-\d{5}-of-\d{5})$', '', str(checkpoint))
    folder, name = os.path.split(prefix)
    if os.path.isfile(f'{prefix}.index'):
        return prefix, None
    if os.path.isdir(prefix):
        return None, prefix
    if name == 'checkpoint':  # the list of checkpoints that TensorFlow keeps beside them
        return None, folder or '.'
    if os.path.isfile(prefix):  # TensorFlow's old format: one file
        return prefix, None
    here = ', '.join(map(os.path.basename, checkpoints(folder or '.')[:3]))
    raise UserError(f'{option} {checkpoint}: there is no {prefix}.index; expected a prefix '
                    'such as models/secret/checkpoint-70000'
                    + (f'; {folder or "this folder"} holds {here}' if here else ''))


def check_trained_alike(config, prefix, option):
    """Raises UserError where config.json beside a checkpoint describes another kind of model."""
    folder = os.path.dirname(prefix)
    path = os.path.join(folder, 'config.json')
    stored = read_json(path) if os.path.isfile(path) else {}
    for key in ('num_residual_units', 'width_factor', 'dataset', 'classes'):
        if key in stored and key in config and stored[key] != config[key]:
            expected = (f'--model_dir {folder or "."}, which takes the configuration stored there'
                        if option == '--checkpoint' else f'the same where {option} names a model')
            raise UserError(f'{prefix} was trained with {key} {brief(json.dumps(stored[key]))}, '
                            f'got {json.dumps(config[key])}; expected {expected}')


def synchronized_batch_norm(x, gamma, beta):
    """Normalizes x [b, h, w, c] by the statistics of all replicas' x, in each replica's context.

    All shares are equally large. The squares are summed about the common mean: a sum of squares
    less the squared mean would lose digits that one device's kernel keeps. Gradients flow through
    the statistics between the replicas: those with respect to x are of the sum of all their losses.

    Returns:
        y [b, h, w, c], and the mean and the unbiased variance of each channel, [c].
    """
    def mean_of_all(values):
        local = tf.reduce_mean(values, [0, 1, 2])
        return tf.distribute.get_replica_context().all_reduce('SUM', local) / num_replicas()

    x32 = tf.cast(x, tf.float32)
    mean = mean_of_all(x32)
    variance = mean_of_all(tf.math.squared_difference(x32, mean))
    y = tf.nn.batch_normalization(x32, mean, variance, beta, gamma, BN_EPSILON)
    n = tf.cast(tf.size(x) // x.shape[-1] * num_replicas(), tf.float32)
    return tf.cast(y, x.dtype), mean, variance * n / (n - 1)


def population_norm(x, gamma, beta, mean, variance):
    """Normalizes x [b, h, w, c] by the given mean and variance [c], in one fused kernel."""
    return tf.raw_ops.FusedBatchNormV3(
        x=x, scale=gamma, offset=beta, mean=mean, variance=variance,
        epsilon=BN_EPSILON, is_training=False).y


def mixed_norm(x, gamma, beta, mean, variance, ratio):
    """Normalizes each image of x [b, h, w, c] by ratio:1 of a recording and its own statistics.

    With s = 1 / (ratio + 1), an image's own mean m and variance v and its recording's M and V, the
    statistics of the mixture are (1 - s) M + s m and (1 - s) V + s v + s (1 - s) (m - M)^2: those
    of a batch of `ratio` images that have M and V together, and this one.

    Args:
        mean, variance: of a recording for each image, [b, c], float32.
    """
    s = 1. / (ratio + 1)
    x32 = tf.cast(x, tf.float32)
    own_mean = tf.reduce_mean(x32, [1, 2])
    own_variance = tf.reduce_mean(tf.square(x32), [1, 2]) - tf.square(own_mean)
    mixed_mean = (1 - s) * mean + s * own_mean
    mixed_variance = ((1 - s) * variance + s * own_variance
                      + s * (1 - s) * tf.square(own_mean - mean))
    scale = gamma * tf.math.rsqrt(mixed_variance + BN_EPSILON)
    offset = beta - mixed_mean * scale
    return (x * tf.cast(scale, x.dtype)[:, None, None] + tf.cast(offset, x.dtype)[:, None, None])


def batch_norm_by_group(x, gamma, beta, num_groups=1):
    """Normalizes each of num_groups equal, consecutive groups of x [b, h, w, c] by its statistics.

    One fused kernel either way: groups are moved next to the channels, so that the kernel sees
    num_groups * c channels of a batch of b / num_groups. Keras's own layer is not fused, which
    costs a third of the gradient's time on a CPU.

    Returns:
        y [b, h, w, c], and the mean and the unbiased variance of each channel, [num_groups * c].
    """
    if num_groups > 1:
        h, w, c = x.shape[1:]
        group_size = tf.shape(x)[0] // num_groups
        x = tf.transpose(tf.reshape(x, [num_groups, group_size, h * w, c]), [1, 2, 0, 3])
        x = tf.reshape(x, [group_size, h, w, num_groups * c])
        gamma, beta = tf.tile(gamma, [num_groups]), tf.tile(beta, [num_groups])
    y, mean, variance, *_ = tf.raw_ops.FusedBatchNormV3(
        x=x, scale=gamma, offset=beta, mean=[], variance=[], epsilon=BN_EPSILON, is_training=True)
    if num_groups > 1:
        y = tf.transpose(tf.reshape(y, [group_size, h * w, num_groups, c]), [2, 0, 1, 3])
        y = tf.reshape(y, [num_groups * group_size, h, w, c])
    return y, mean, variance
