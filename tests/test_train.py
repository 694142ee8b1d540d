"""The training step, its four modes, its optimizer; training as a whole is in test_programs.py."""
import os

import keras
import numpy as np
import pytest
import tensorflow as tf

from config import TRAINING_MODES, load_config, store_config
from running import UserError
from cifar10_input import augment
from conftest import CHECKPOINT, ROOT, attacked_batch
import train
from model import Model

REFERENCE = os.path.join(os.path.dirname(ROOT), 'shared', 'reference', 'madry_w1')


def values(model):
    return {name: v.numpy().copy() for name, v in model.variables_by_name.items()}


def make_step(model, config):
    return train.make_train_step(model, train.make_optimizer(config), config)


@pytest.mark.skipif(not os.path.exists(REFERENCE), reason='needs ../shared/reference')
def test_eight_training_steps_agree_with_the_original():
    with np.load(os.path.join(REFERENCE, 'golden.npz')) as z:
        golden = {key: z[key] for key in z.files if 'train' in key}
    config = load_config(None, ['training_batch_size=32', 'training_mode=adv_only',
                                'random_start=false', 'data_augmentation=false'])
    model, optimizer = Model(5, 1), train.make_optimizer(config)
    assert model.load_madry_checkpoint(os.path.join(REFERENCE, 'checkpoint-250'), optimizer) == 250
    step = train.make_train_step(model, optimizer, config)
    for t in range(8):
        metrics = step(golden['train_images'][t], golden['train_labels'][t], t)
        ours = [float(metrics['loss']), float(metrics['xent'])]
        np.testing.assert_allclose(ours, golden['train_total_loss_and_mean_xent'][t], rtol=0.01)
    for key in golden:
        if key.startswith('after_train__'):
            ours = model.variables_by_name[key[len('after_train__'):].replace('__', '/')].numpy()
            np.testing.assert_allclose(ours, golden[key], atol=0.02 * np.abs(golden[key]).max())


def test_optimizer_does_what_tensorflow_1s_does_across_changes_of_the_rate():
    schedule, momentum = [[0, 0.5], [2, 0.1], [4, 0.01]], 0.9
    gradients = np.random.default_rng(0).normal(size=(7, 3)).astype(np.float32)
    optimizer = train.make_optimizer({'step_size_schedule': schedule, 'momentum': momentum})
    ours = tf.Variable(tf.ones(3))
    with tf.Graph().as_default(), tf.compat.v1.Session() as sess:
        step = tf.compat.v1.train.get_or_create_global_step()
        rate = tf.compat.v1.train.piecewise_constant(tf.cast(step, tf.int32), [2, 4],
                                                     [0.5, 0.1, 0.01])
        weight = tf.compat.v1.Variable(tf.ones(3))
        gradient = tf.compat.v1.placeholder(tf.float32, [3])
        update = tf.compat.v1.train.MomentumOptimizer(rate, momentum).apply_gradients(
            [(gradient, weight)], global_step=step)
        sess.run(tf.compat.v1.global_variables_initializer())
        expected = []
        for g in gradients:
            sess.run(update, {gradient: g})
            expected.append(sess.run(weight))
    for g, theirs in zip(gradients, expected):
        optimizer.apply([tf.constant(g)], [ours])
        np.testing.assert_allclose(ours, theirs, rtol=1e-5)


@pytest.mark.parametrize('mode', ['natural', 'shaping_in_attack_and_training'])
def test_the_update_is_the_rate_times_the_gradient_of_the_mean_loss_and_of_weight_decay(
        small_model, small_config, batch, mode):
    """Written out, and decay on kernels alone; without a ball, the attack changes nothing."""
    config = small_config(training_mode=mode, epsilon=0., weight_decay=0.1)
    _, x, labels = attacked_batch(small_model, config, batch, 0, update_population_norms=False)
    weights = {name: v for name, v in small_model.variables_by_name.items() if v.trainable}
    with tf.GradientTape() as tape:
        loss = tf.reduce_mean(tf.nn.sparse_softmax_cross_entropy_with_logits(
            labels, small_model(x)))
    gradients = tape.gradient(loss, list(weights.values()))
    before = {name: v.numpy() for name, v in weights.items()}
    make_step(small_model, config)(*batch, 0)
    for (name, v), gradient in zip(weights.items(), gradients):
        decay = 0.1 * before[name] if name.endswith('/DW') else 0.
        np.testing.assert_allclose(before[name] - v.numpy(), 0.1 * (gradient.numpy() + decay),
                                   rtol=1e-3, atol=1e-5, err_msg=name)
    assert {name.rpartition('/')[2] for name in weights} == {'DW', 'beta', 'gamma', 'biases'}


@pytest.mark.parametrize('mode', TRAINING_MODES)
def test_what_the_weight_update_sees(small_model, small_config, batch, mode):
    config = small_config(training_mode=mode)
    x_nat, x, _ = (v.numpy() for v in attacked_batch(small_model, config, batch, 3))
    attacked = (x_nat != x).reshape(16, -1).mean(axis=1) > 0.5
    expected = {'natural': [False] * 16, 'adv_only': [True] * 16}.get(
        mode, [False] * 12 + [True] * 4)
    assert attacked.tolist() == expected
    assert x[~attacked].tobytes() == x_nat[~attacked].tobytes()  # bit for bit
    assert np.abs(x - x_nat).max() <= 8 and x.min() >= 0 and x.max() <= 255


def test_shaping_in_training_attacks_as_adv_only_does_and_then_restores_the_head(
        small_model, small_config, batch):
    def x(mode):
        config = small_config(training_mode=mode)
        return attacked_batch(small_model, config, batch, 0)[1].numpy()
    whole, mixed, shaped = x('adv_only'), x('shaping_in_training'), x(TRAINING_MODES[-1])
    assert (whole[12:] == mixed[12:]).all()
    assert (shaped[12:] != mixed[12:]).mean() > 0.01  # under other norms, another attack


@pytest.mark.parametrize('mode, passes', [('natural', 1), ('adv_only', 3),
                                          ('shaping_in_attack_and_training', 3)])
def test_every_forward_pass_of_a_step_moves_the_moving_averages(
        small_model, small_config, batch, mode, passes):
    """With epsilon 0 all passes see one batch; the first mean depends on one kernel alone."""
    name = 'unit_1_0/shared_activation/BatchNorm/moving_mean'
    config = small_config(training_mode=mode, epsilon=0., data_augmentation=False)
    make_step(small_model, config)(*batch, 0)
    moved = small_model.variables_by_name[name].numpy().copy()
    again = Model(1, 1)
    again.set_weights([v.numpy() for v in small_model.variables])
    again.variables_by_name[name].assign(tf.zeros(16))
    again.variables_by_name['input/init_conv/DW'].assign(initial_kernel())
    again(batch[0], update_population_norms=True)
    mean = again.variables_by_name[name].numpy() / 0.1
    np.testing.assert_allclose(moved, mean * (1 - 0.9 ** passes), rtol=1e-3, atol=1e-6)


def initial_kernel():
    keras.utils.set_random_seed(0)
    return Model(1, 1).variables_by_name['input/init_conv/DW'].numpy()


def test_a_step_follows_from_seed_and_step_number_alone(small_config, batch):
    def after(step, seed=1):
        keras.utils.set_random_seed(0)
        model = Model(1, 1)
        config = small_config(tf_random_seed=seed)
        make_step(model, config)(*batch, step)
        return model.variables_by_name['logit/DW'].numpy()
    assert (after(5) == after(5)).all()
    assert (after(5) != after(6)).any()
    assert (after(5) != after(5, seed=2)).any()


def test_metrics_tell_clean_head_and_adversarial_tail_apart(small_model, small_config, batch):
    step = make_step(small_model, small_config())
    metrics = {name: float(v) for name, v in step(*batch, 0).items()}
    assert metrics['xent'] == pytest.approx(
        0.75 * metrics['xent_clean'] + 0.25 * metrics['xent_adv'], rel=1e-5)
    assert metrics['loss'] > metrics['xent']
    assert metrics['learning_rate'] == pytest.approx(0.1)
    natural = make_step(small_model, small_config(training_mode='natural'))(*batch, 0)
    assert 'accuracy_adv' not in natural and 'accuracy_clean' in natural
    adv_only = make_step(small_model, small_config(training_mode='adv_only'))(*batch, 0)
    assert 'accuracy_clean' not in adv_only and 'accuracy_adv' in adv_only


def test_augmentation_is_a_crop_of_the_padded_image_or_its_mirror():
    images = np.random.default_rng(0).integers(1, 256, (64, 32, 32, 3)).astype(np.float32)
    out = augment(tf.constant(images), tf.constant([1, 2], tf.int64)).numpy()
    padded = np.pad(images, [(0, 0), (2, 2), (2, 2), (0, 0)])
    found = set()
    for image, crop in zip(padded, out):
        matches = [(top, left, flip) for top in range(5) for left in range(5) for flip in (1, -1)
                   if (image[top:top + 32, left:left + 32][:, ::flip] == crop).all()]
        assert len(matches) == 1
        found.add(matches[0])
    assert len(found) > 25  # of 50
    assert {flip for _, _, flip in found} == {1, -1}


@pytest.mark.parametrize('attack_norms, step_size, tolerance', [('batch', 0., 1e-4),
                                                                ('fixed', 2., 0.02)])
def test_the_step_is_the_same_under_xla(
        small_config, batch, step_size, tolerance, attack_norms):
    """Random numbers are the same; the sign of a tiny gradient may turn on rounding."""
    losses = []
    for xla in ('off', 'on'):
        keras.utils.set_random_seed(0)
        model = Model(1, 1)
        step = make_step(model, small_config(xla=xla, step_size=step_size,
                                             attack_norms=attack_norms))
        compiled = step.get_concrete_function().function_def.attr['_XlaMustCompile'].b
        assert compiled == (xla == 'on')
        losses.append([float(step(*batch, t)['loss']) for t in range(3)])
    np.testing.assert_allclose(losses[0], losses[1], rtol=tolerance)


def test_another_training_in_the_same_folder_is_refused(tmp_path, small_config):
    config = small_config(model_dir=str(tmp_path))
    path = tmp_path / 'config.json'
    store_config(config, path)
    train.check_same_run({**config, 'max_num_training_steps': 9, 'num_eval_examples': 7}, path)
    with pytest.raises(UserError, match='training_mode .was shaping_in_attack_and_training, is '
                                        'natural.*another model_dir'):
        train.check_same_run({**config, 'training_mode': 'natural'}, path)


def test_the_original_weights_can_be_trained_on(small_config):
    """MadryLab's checkpoints without optimizer slots are named as such, not half loaded."""
    config = small_config()
    with pytest.raises(UserError, match='holds no velocities; expected the folder of a training'):
        Model(5, 1).load_madry_checkpoint(CHECKPOINT, train.make_optimizer(config))
