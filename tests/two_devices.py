"""What tests/test_distribution.py looks at: one device against two replicas on two logical CPUs.

    python tests/two_devices.py OUT.npz

In a process of its own, as the CPU is divided before TensorFlow first uses it. Weights start alike,
images are random, the attack is on. Two networks: the real one, and one whose activation is smooth,
so that rounding cannot turn a leaky ReLU's slope and nothing hides behind a tolerance.
"""
import argparse
import os
import sys
from types import SimpleNamespace

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
os.environ['CUDA_VISIBLE_DEVICES'] = '-1'
import running.quiet  # noqa: E402, F401
from cifar10_input import DataSubset  # noqa: E402
from config import load_config  # noqa: E402
import keras  # noqa: E402
import numpy as np  # noqa: E402
import tensorflow as tf  # noqa: E402

from running.devices import divide_cpu, make_strategy  # noqa: E402
from model import Model  # noqa: E402
from pgd_attack import LinfPGDAttack  # noqa: E402
import train  # noqa: E402

SETTINGS = ['dataset=synthetic', 'num_residual_units=1', 'width_factor=1', 'num_steps=3',
            'training_batch_size=16', 'step_size_schedule=[[0,0.1]]']


class SmoothModel(Model):
    def _relu(self, x, leakiness=0.0):
        return tf.nn.softplus(x)


def make(strategy, config, model_class=Model):
    """Returns (model, optimizer, training step) for a strategy; the weights are always the same."""
    keras.utils.set_random_seed(1)
    with strategy.scope():
        model = model_class(1, 1, 10, batch_norms=config['batch_norms'])
        optimizer = train.make_optimizer(config)
        return model, optimizer, train.make_train_step(model, optimizer, config)


def copies(model):
    """Returns {name: [each replica's copy]} of all variables."""
    return {name: [v.numpy() for v in model.strategy.experimental_local_results(variable.value)]
            for name, variable in model.variables_by_name.items()}


def gradient(strategy, model_class, x, y):
    """Returns the attack's gradient [b, 32, 32, 3], with synchronized batch norms."""
    model, *_ = make(strategy, load_config(None, [*SETTINGS, 'batch_norms=synchronized']),
                     model_class)
    attack = LinfPGDAttack(model, 8., 3, 2., True, 'xent', update_population_norms=False)

    @tf.function
    def in_replicas():
        def of_share():
            context = tf.distribute.get_replica_context()
            size = len(x) // context.num_replicas_in_sync
            mine = tf.range(size) + size * context.replica_id_in_sync_group
            return attack.gradient(tf.gather(x, mine), tf.gather(y, mine))
        return strategy.experimental_local_results(strategy.run(of_share))
    return np.concatenate([share.numpy() for share in in_replicas()])


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
    parser.add_argument('output', help='the .npz file that is written')
    output = parser.parse_args().output
    divide_cpu(2)
    one = make_strategy({'distribution': 'none'})
    two = make_strategy({'distribution': 'mirrored', 'xla': 'auto'})
    assert two.num_replicas_in_sync == 2
    rng = np.random.default_rng(0)
    batches = [(rng.integers(0, 256, (16, 32, 32, 3), np.uint8), rng.integers(0, 10, 16))
               for _ in range(3)]
    x, y = tf.constant(batches[0][0], tf.float32), tf.constant(batches[0][1])
    found = {}
    for number, strategy in enumerate((one, two), 1):
        for model_class in (Model, SmoothModel):
            found[f'gradient/{model_class.__name__}/{number}'] = gradient(strategy, model_class,
                                                                          x, y)

    # Three steps of every kind of training, synchronized
    cases = [[f'training_mode={mode}']
             for mode in ('shaping_in_training', 'shaping_in_attack_and_training')]
    cases += [['adversary=trades', 'trades_beta=3'], ['attack_norms=fixed'],
              ['attack_norms=fixed', 'training_mode=adv_only']]
    for case in cases:
        config = load_config(None, [*SETTINGS, 'batch_norms=synchronized', *case])
        name = '+'.join(setting.partition('=')[2] for setting in case[::-1])
        for number, strategy in enumerate((one, two), 1):
            model, optimizer, step = make(strategy, config, SmoothModel)
            metrics = [step(*batch, t) for t, batch in enumerate(batches)]
            for key in metrics[0]:
                found[f'metric/{name}/{key}/{number}'] = np.array([float(m[key]) for m in metrics])
            for key, variable in model.checkpoint_variables(optimizer).items():
                found[f'weight/{name}/{key}/{number}'] = variable.numpy()
            for key, values in copies(model).items():
                found[f'spread/{name}/{key}/{number}'] = np.ptp(values, axis=0)

    # What a training's validation counts; the labels are the answers, so all are right unattacked
    config = load_config(None, [*SETTINGS, 'epsilon=16', 'step_size=16'])
    for number, strategy in enumerate((one, two), 1):
        model, *_ = make(strategy, config)
        answers = np.argmax(model(x, training=False), axis=1)
        held_out = DataSubset(batches[0][0], answers, 0)
        line = train.Validation(model, SimpleNamespace(validation_data=held_out), config).measure(0)
        found[f'validation/{number}'] = np.array(
            [line['validation_accuracy'], line['validation_accuracy_adv']])

    # Per replica: each share normalized and attacked on its own
    config = load_config(None, [*SETTINGS, 'data_augmentation=false'])
    model, optimizer, step = make(two, config)
    get_batch, perturb = train.make_adversary(model, config, False)

    @tf.function
    def attacked(*batch):
        x, x_nat, labels = get_batch(*batch)
        return x_nat, perturb(x, x_nat, labels), labels
    x_nat, x, labels = attacked(*batches[0], 0)
    found['share/x_nat'], found['share/x'], found['share/y'] = (
        np.stack([v.numpy() for v in two.experimental_local_results(values)])
        for values in (x_nat, x, labels))
    found['share/images'], found['share/labels'] = batches[0]

    # One forward pass per replica, beside each share alone on one device
    def forward(x):
        logits = model(x, update_population_norms=True)
        model.average_population_norms()
        return logits
    name = 'unit_3_0/sub2/BatchNorm/moving_mean'
    logits = tf.function(lambda x: two.run(forward, (x,)))(x_nat)
    found['norms/logits/2'] = np.stack([v.numpy() for v in two.experimental_local_results(logits)])
    found['norms/moving_mean/2'] = np.mean(copies(model)[name], axis=0)
    alone = []
    for share in found['share/x_nat']:
        model, *_ = make(one, config)
        logits = model(share, update_population_norms=True)
        alone.append((logits.numpy(), model.variables_by_name[name].numpy()))
    found['norms/logits/1'], means = (np.stack(values) for values in zip(*alone))
    found['norms/moving_mean/1'] = means.mean(axis=0)
    np.savez(output, **found)


if __name__ == '__main__':
    main()
