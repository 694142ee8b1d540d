"""The wide ResNet of MadryLab's CIFAR-10 challenge (the original's model.py) as a keras.Model.

What differs from the original's file is the normalization. The paper turns on *which* statistics a
forward pass normalizes by, so that is an argument of every call: the batch ("BN"), each of several
equal groups of the batch (paper, Eq. 6, many queries in one call), or the population, that is the
moving averages ("PN").
"""
import os
import re
import sys

import numpy as np

from config import UserError
import keras
import tensorflow as tf

BN_DECAY = 0.9        # of the moving averages; the original's model.py
BN_EPSILON = 0.001    # added to the variance; the default of the original's batch_norm
LEAKINESS = 0.1       # slope of the leaky ReLU below zero


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
        if precision not in ('float32', 'mixed_bfloat16'):
            raise ValueError(f"precision is {precision!r}; 'float32' or 'mixed_bfloat16' would fit")
        self.strategy = tf.distribute.get_strategy()
        self.synchronized = batch_norms == 'synchronized'
        self.num_residual_units = num_residual_units
        self.num_classes = num_classes
        self.compute_type = tf.float32 if precision == 'float32' else tf.bfloat16
        self.filters = [16] + [channels * width_factor for channels in (16, 32, 64)]
        self._by_name = {}

        self._add_conv('input/init_conv', 3, 16)
        for name, in_filters, out_filters, _ in self.units():
            self._add_batch_norm(f'{name}/{self._activation_scope(name)}', in_filters)
            self._add_conv(f'{name}/sub1/conv1', in_filters, out_filters)
            self._add_batch_norm(f'{name}/sub2', out_filters)
            self._add_conv(f'{name}/sub2/conv2', out_filters, out_filters)
        self._add_batch_norm('unit_last', self.filters[-1])
        limit = np.sqrt(3.0 / self.filters[-1])  # TensorFlow 1's uniform_unit_scaling_initializer
        self._add('logit/DW', (self.filters[-1], num_classes),
                  keras.initializers.RandomUniform(-limit, limit))
        self._add('logit/biases', (num_classes,), 'zeros')
        self.built = True

    def units(self):
        """Yields (name, input channels, output channels, stride) of each unit, in order."""
        for stage in (1, 2, 3):
            for i in range(self.num_residual_units):
                in_filters = self.filters[stage - 1 if i == 0 else stage]
                stride = 2 if stage > 1 and i == 0 else 1
                yield f'unit_{stage}_{i}', in_filters, self.filters[stage], stride

    @staticmethod
    def _activation_scope(name):
        return 'shared_activation' if name == 'unit_1_0' else 'residual_only_activation'

    def _add(self, name, shape, initializer):
        # Keras allows no '/' in a name, and would cast on reading: normalization needs float32.
        self._by_name[name] = self.add_weight(
            name=name.replace('/', '.'), shape=shape, initializer=initializer, dtype='float32',
            autocast=False)

    def _add_population_norm(self, name, shape, initializer):
        # Each replica moves its own copy, so that an attack step needs no word from the others;
        # add_weight cannot say so. Keras tracks a variable that is an attribute.
        self._by_name[name] = keras.Variable(
            keras.initializers.get(initializer), name=name.replace('/', '.'), shape=shape,
            dtype='float32', autocast=False, trainable=False, synchronization='on_read',
            aggregation='mean')
        setattr(self, '_' + name.replace('/', '_'), self._by_name[name])

    def _add_conv(self, name, in_filters, out_filters):
        stddev = np.sqrt(2.0 / (3 * 3 * out_filters))
        self._add(f'{name}/DW', (3, 3, in_filters, out_filters),
                  keras.initializers.RandomNormal(stddev=stddev))

    def _add_batch_norm(self, name, channels):
        self._add(f'{name}/BatchNorm/beta', (channels,), 'zeros')
        self._add(f'{name}/BatchNorm/gamma', (channels,), 'ones')
        self._add_population_norm(f'{name}/BatchNorm/moving_mean', (channels,), 'zeros')
        self._add_population_norm(f'{name}/BatchNorm/moving_variance', (channels,), 'ones')

    @property
    def variables_by_name(self):
        """dict: the original's name of each variable -> the variable."""
        return dict(self._by_name)

    def call(self, images, training=True, num_groups=1, update_population_norms=True,
             norms_from=None):
        """Computes the logits of a batch.

        Args:
            images: [b, 32, 32, 3], in [0, 255]; each is standardized here, as in the original.
            training: True normalizes by the batch (BN), False by the moving averages (PN).
            num_groups: with BN, normalizes each of this many equal, consecutive groups of the batch
                by its own statistics. b must be a multiple of it.
            update_population_norms: with BN, moves the moving averages towards this batch, as every
                forward pass of the original's training does. False where a model is only judged:
                an evaluation with BN must not change what PN will answer. They never move with
                num_groups > 1, where there is no one batch to move towards.
            norms_from: with BN, normalizes the whole batch by the statistics of this many first
                samples: how the others look to the batch norms of these. The moving averages are
                left alone.

        Returns:
            logits [b, num_classes], float32.
        """
        def conv(x, name, stride=1):
            kernel = tf.cast(self._by_name[f'{name}/DW'], self.compute_type)
            return tf.nn.conv2d(x, kernel, stride, padding='SAME')

        def batch_norm(x, name):
            beta, gamma, moving_mean, moving_variance = (
                self._by_name[f'{name}/BatchNorm/{v}']
                for v in ('beta', 'gamma', 'moving_mean', 'moving_variance'))
            if not training:
                return population_norm(x, gamma, beta, moving_mean, moving_variance)
            if norms_from is not None:
                mean, variance = tf.nn.moments(tf.cast(x[:norms_from], tf.float32), [0, 1, 2])
                return population_norm(x, gamma, beta, mean, variance)
            if self.synchronized and num_replicas() > 1:
                y, mean, variance = synchronized_batch_norm(x, gamma, beta)
            else:
                y, mean, variance = batch_norm_by_group(x, gamma, beta, num_groups)
            if update_population_norms and num_groups == 1:
                moving_mean.assign_sub((moving_mean - mean) * (1 - BN_DECAY))
                moving_variance.assign_sub((moving_variance - variance) * (1 - BN_DECAY))
            return y

        def activation(x, name):
            return self.leaky_relu(batch_norm(x, name))

        images = self.standardize(tf.cast(images, tf.float32))
        x = conv(tf.cast(images, self.compute_type), 'input/init_conv')
        for name, in_filters, out_filters, stride in self.units():
            shortcut = x
            x = activation(x, f'{name}/{self._activation_scope(name)}')
            if name == 'unit_1_0':  # "shared": the shortcut, too, starts after the activation
                shortcut = x
            x = conv(x, f'{name}/sub1/conv1', stride)
            x = conv(activation(x, f'{name}/sub2'), f'{name}/sub2/conv2')
            if in_filters != out_filters:
                if stride > 1:
                    shortcut = tf.nn.avg_pool2d(shortcut, stride, stride, 'VALID')
                pad = (out_filters - in_filters) // 2
                shortcut = tf.pad(shortcut, [[0, 0], [0, 0], [0, 0], [pad, pad]])
            x += shortcut
        x = tf.cast(activation(x, 'unit_last'), tf.float32)
        x = tf.reduce_mean(x, [1, 2])
        return tf.matmul(x, self._by_name['logit/DW']) + self._by_name['logit/biases']

    def standardize(self, images):
        """Returns images [b, 32, 32, 3], each of mean 0 and variance 1."""
        return tf.image.per_image_standardization(images)

    def leaky_relu(self, x):
        return tf.nn.leaky_relu(x, LEAKINESS)

    def weight_decay_loss(self):
        """Returns the sum of half the squared norms of the convolution and dense kernels, a scalar.

        Biases and normalization parameters are left out, as in the original.
        """
        return tf.add_n([tf.nn.l2_loss(tf.convert_to_tensor(v))
                         for name, v in self._by_name.items() if name.endswith('/DW')])

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
            config.UserError: no such checkpoint, or another network's; nothing is assigned then.
        """
        copies = self._copies(optimizer)
        try:
            reader = tf.train.load_checkpoint(str(prefix))
            shapes = reader.get_variable_to_shape_map()
            for name, (variable, *_) in copies.items():
                if name not in shapes:
                    raise UserError(f'{prefix} holds no {name}: it is of another network than '
                                    f'num_residual_units {self.num_residual_units} describes')
                if tuple(shapes[name]) != tuple(variable.shape):
                    raise UserError(f'{name} is {list(shapes[name])} in {prefix}, but '
                                    f'{list(variable.shape)} here: see width_factor and classes')
            extra = sorted(n for n in shapes if n.endswith('/DW') and n not in copies)
            if extra:
                raise UserError(f'{prefix} also holds {extra[0]}: it is of a deeper network than '
                                f'num_residual_units {self.num_residual_units} describes')
            values = {name: reader.get_tensor(name) for name in copies}
            global_step = int(reader.get_tensor('global_step')) if 'global_step' in shapes else 0
        except UserError:
            raise
        except (tf.errors.OpError, ValueError, IndexError) as error:
            raise UserError(f'{prefix} cannot be read as a checkpoint: '
                            f'{str(error).splitlines()[0]}') from None
        for name, replicas in copies.items():
            for variable in replicas:
                variable.assign(values[name])
        return global_step

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
        size = os.path.getsize(f'{prefix}.data-00000-of-00001')
        reader = tf.train.load_checkpoint(prefix)
        types = reader.get_variable_to_dtype_map()
        for name, shape in reader.get_variable_to_shape_map().items():
            if types[name].size * np.prod(shape, dtype=object) > size:  # or it would be allocated
                return f'{name} is larger than the file that holds it'
            reader.get_tensor(name)
    except OSError as error:
        return f'{os.path.basename(error.filename)}: {error.strerror}'
    except Exception as error:  # a damaged index raises nearly anything
        return (str(error) or type(error).__name__).splitlines()[0]
    return None


def newest_whole(folder):
    """Returns the prefix of the newest checkpoint in a folder that is whole, or None.

    Those that were cut short or damaged are named on stderr and passed over.
    """
    for prefix in checkpoints(folder):
        fault = damage(prefix)
        if fault is None:
            return prefix
        print(f'{prefix} is damaged and passed over: {fault}', file=sys.stderr, flush=True)
    return None


def find_checkpoint(config, prefix=None):
    """Returns the prefix of a checkpoint: the one given, or the newest in model_dir that is whole.

    Raises:
        UserError: there is none, or none that is whole.
    """
    prefix = prefix or newest_whole(config['model_dir'])
    if prefix:
        return prefix
    if checkpoints(config['model_dir']):
        raise UserError(f'model_dir {config["model_dir"]} holds checkpoints, but none that is '
                        'whole; another model_dir would fit')
    raise UserError(f'model_dir {config["model_dir"]} holds no checkpoint; train.py writes '
                    'them there')


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
