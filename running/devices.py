"""Training on several devices, through tf.distribute: the strategy, and each replica's share.

    --set distribution=mirrored       all GPUs of this machine (or its logical CPU devices)
    --set distribution=multi_worker   several machines: TF_CONFIG names them, one process on each

Every replica holds all weights and computes its share of each batch; gradients are summed over all.
Of every share, as of the batch, n of n + 1 samples are clean: a share is a part of the batch's
clean head, then a part of its adversarial tail. So what is attacked is what one device would
attack, with the same random numbers.
"""
import json
import os

import numpy as np

import tensorflow as tf

from running import UserError, brief

LOST = (tf.errors.UnavailableError, tf.errors.AbortedError, tf.errors.CancelledError,
        tf.errors.DeadlineExceededError, tf.errors.InternalError, tf.errors.FailedPreconditionError)


def leave_gpus(config):
    """Hides the GPUs from this process if eval_on_cpu says so; to be called before their use."""
    if config['eval_on_cpu']:
        tf.config.set_visible_devices([], 'GPU')


def make_strategy(config):
    """Returns the tf.distribute strategy that a configuration asks for, of one device or more.

    Raises:
        UserError: TF_CONFIG is missing or names no cluster of workers, or they do not come
            together; xla is 'on'.
    """
    if config['distribution'] == 'none':
        return tf.distribute.get_strategy()
    if config['xla'] == 'on':
        raise UserError(f'xla is on, distribution {config["distribution"]}: XLA compiles the step '
                        'of one device alone; expected auto or off')
    if config['distribution'] == 'mirrored':
        devices = tf.config.list_logical_devices('GPU') or tf.config.list_logical_devices('CPU')
        return tf.distribute.MirroredStrategy([device.name for device in devices])
    check_tf_config(os.environ.get('TF_CONFIG'))
    print('Waiting for all workers', flush=True)
    try:
        return tf.distribute.MultiWorkerMirroredStrategy()
    except tf.errors.OpError as error:
        raise UserError('the workers of TF_CONFIG do not come together: '
                        f'{brief(error)}') from None


def check_tf_config(text):
    """Raises UserError unless TF_CONFIG's text names a cluster of workers and this one's place."""
    expected = ('expected {"cluster": {"worker": ["host:port", "host:port"]}, "task": {"type": '
                '"worker", "index": 0}}, with another index in each process')
    if not text:
        raise UserError(f'distribution is multi_worker, but TF_CONFIG is not set; {expected}')
    try:
        value = json.loads(text)
        cluster, task = value['cluster'], value['task']
        addresses = [a for kind in ('chief', 'worker') for a in cluster.get(kind, [])]
        if not addresses or set(cluster) - {'chief', 'worker'} or len(cluster.get('chief', [])) > 1:
            raise ValueError
        if not all(isinstance(a, str) and a.rpartition(':')[2].isdecimal() for a in addresses):
            raise ValueError
        if type(task['index']) is not int or not 0 <= task['index'] < len(cluster[task['type']]):
            raise ValueError
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise UserError('TF_CONFIG names no cluster of workers with a task in it; '
                        f'{expected}') from None


def is_chief(strategy):
    """Returns whether this process writes checkpoints, logs and summaries: one process does."""
    resolver = strategy.cluster_resolver
    if resolver is None or not resolver.cluster_spec().as_dict():
        return True
    if 'chief' in resolver.cluster_spec().as_dict():
        return resolver.task_type == 'chief'
    return resolver.task_id == 0


def num_workers(strategy):
    """Returns how many processes train together."""
    resolver = strategy.cluster_resolver
    cluster = resolver.cluster_spec().as_dict() if resolver else {}
    return sum(map(len, cluster.values())) or 1


def check_shares(config, num_replicas):
    """Raises UserError unless a batch can be divided among the replicas, n:1 in each share."""
    m = config['training_batch_size']
    unit = config['shaping_ratio'] + 1 if config['training_mode'].startswith('shaping') else 1
    unit *= num_replicas
    if m % unit:
        possible = max(1, m // unit) * unit
        raise UserError(
            f'training_batch_size is {m}, divided among {num_replicas} replicas'
            + (f', each share {config["shaping_ratio"]}:1' if unit > num_replicas else '')
            + f'; expected a multiple of {unit}, such as {possible} or {possible + unit}')


def shares(tail, num_replicas):
    """Returns which samples of a batch each replica sees, [replicas, b / replicas].

    Args:
        tail: mask [b] of the batch's adversarial tail.
    """
    parts = [np.flatnonzero(part).reshape(num_replicas, -1) for part in (~tail, tail)]
    return np.concatenate(parts, axis=1)


def make_sum(strategy):
    """Returns f(integer of this process's) -> its sum over all replicas, one of each counted."""
    if num_workers(strategy) == 1:
        return lambda value: value * strategy.num_replicas_in_sync

    @tf.function
    def summed(value):
        def of_replica():
            return tf.distribute.get_replica_context().all_reduce('SUM', tf.identity(value))
        return strategy.experimental_local_results(strategy.run(of_replica))[0]
    return lambda value: int(summed(tf.constant(value, tf.int64)))


def check_agreement(strategy, value, mistake):
    """Raises UserError, saying `mistake`, unless all processes have the same integer."""
    if make_sum(strategy)(value) != value * strategy.num_replicas_in_sync:
        raise UserError(mistake)


def uses_tensor_float_32():
    """Returns whether float32 convolutions and matrix products round their inputs to 10 bits.

    TensorFlow lets GPUs do so from compute capability 8.0 (Ampere) on.
    """
    details = map(tf.config.experimental.get_device_details, tf.config.get_visible_devices('GPU'))
    return (tf.config.experimental.tensor_float_32_execution_enabled()
            and any(of_gpu.get('compute_capability', (0, 0)) >= (8, 0) for of_gpu in details))


def device():
    """Returns what computes here, as a result says it: CPU, or a GPU's name and its arithmetic."""
    gpus = tf.config.get_visible_devices('GPU')
    if not gpus:
        return 'CPU'
    name = tf.config.experimental.get_device_details(gpus[0]).get('device_name', 'GPU')
    return f'{name}, float32 as TensorFloat-32' if uses_tensor_float_32() else name


def divide_cpu(count):
    """Divides the CPU into `count` logical devices, before TensorFlow first uses it.

    They stand in for GPUs: where there are any, these are left alone.
    """
    if not 1 <= count <= 64:
        raise UserError(f'--logical_cpus must be an integer, 1 to 64, got {count}')
    if count > 1:
        tf.config.set_visible_devices([], 'GPU')
        cpu = tf.config.list_physical_devices('CPU')[0]
        tf.config.set_logical_device_configuration(
            cpu, [tf.config.LogicalDeviceConfiguration()] * count)
