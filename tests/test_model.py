"""The network: agreement with the original, its norms, its checkpoints; Keras's ways to save."""
import os
import subprocess
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf

from running import UserError
from conftest import CHECKPOINT, ROOT
from model import BN_EPSILON, Model, batch_norm_by_group, damage
import train


def relative_error(ours, theirs):
    return np.abs(np.asarray(ours) - theirs).max() / np.abs(theirs).max()


def values(model):
    return {name: v.numpy().copy() for name, v in model.variables_by_name.items()}


def test_logits_agree_with_the_original(madry_model, golden):
    assert relative_error(madry_model(golden['images'], training=False), golden['pn_logits']) < 1e-5
    assert relative_error(madry_model(golden['images']), golden['bn_logits']) < 1e-5
    for norms, training in (('bn', True), ('pn', False)):
        xent = tf.nn.sparse_softmax_cross_entropy_with_logits(
            golden['labels'], madry_model(golden['images'], training=training))
        np.testing.assert_allclose(xent, golden[f'{norms}_xent'], rtol=1e-3, atol=1e-4)


def test_moving_averages_after_one_forward_pass_agree_with_the_original(madry_model, golden):
    madry_model(golden['images'], training=True, update_population_norms=True)
    for name in ('mean', 'variance'):
        ours = madry_model.variables_by_name[f'unit_last/BatchNorm/moving_{name}']
        theirs = golden[f'moving_{name}_after_one_forward__unit_last']
        assert relative_error(ours, theirs) < 1e-5


def test_weight_decay_loss_agrees_with_the_original(madry_model, golden):
    assert float(madry_model.weight_decay_loss()) == pytest.approx(
        float(golden['weight_decay_loss']), rel=1e-6)


@pytest.mark.parametrize('arguments', [
    {}, dict(training=True), dict(training=False), dict(norms_from=8, update_population_norms=True),
    dict(num_groups=4, update_population_norms=True)])
def test_a_call_leaves_the_model_as_it_was_unless_the_training_asks(small_model, batch, arguments):
    before = values(small_model)
    small_model(batch[0], **arguments)
    after = values(small_model)
    assert all((before[name] == after[name]).all() for name in before)


def test_each_group_is_normalized_as_a_batch_of_its_own(small_model, batch):
    together = small_model(batch[0], num_groups=4)
    apart = [small_model(batch[0][i:i + 4], update_population_norms=False) for i in (0, 4, 8, 12)]
    np.testing.assert_allclose(together, np.concatenate(apart), atol=1e-5)
    assert relative_error(together, small_model(batch[0]).numpy()) > 1e-3  # groups do matter


def test_gradients_through_groups_are_those_of_separate_batches():
    rng = np.random.default_rng(1)
    x = tf.constant(rng.normal(size=(6, 4, 4, 5)), tf.float32)
    weight = tf.constant(rng.normal(size=(6, 4, 4, 5)), tf.float32)
    gamma, beta = tf.constant(rng.normal(size=5), tf.float32), tf.zeros(5)

    def gradients(norm):
        with tf.GradientTape() as tape:
            tape.watch([x, gamma, beta])
            loss = tf.reduce_sum(norm(x) * weight)
        return tape.gradient(loss, [x, gamma, beta])

    def plainly(x):
        parts = []
        for part in tf.split(x, 3):
            mean, variance = tf.nn.moments(part, [0, 1, 2])
            parts.append(gamma * (part - mean) * tf.math.rsqrt(variance + BN_EPSILON) + beta)
        return tf.concat(parts, 0)

    for ours, plain in zip(gradients(lambda x: batch_norm_by_group(x, gamma, beta, 3)[0]),
                           gradients(plainly)):
        np.testing.assert_allclose(ours, plain, atol=1e-4)


def test_the_full_network_has_the_papers_size():
    model = Model()
    assert sum(int(np.prod(v.shape)) for v in model.trainable_variables) == 45_901_914
    convolutions = [name for name in model.variables_by_name if '/conv' in name]
    assert len(convolutions) == 30  # "w32": with the first convolution and the dense layer
    assert model.variables_by_name['unit_3_4/sub2/conv2/DW'].shape == (3, 3, 640, 640)


def test_initial_weights_are_drawn_as_in_the_original():
    keras.utils.set_random_seed(1)
    model = Model(num_residual_units=1, width_factor=4)
    v = model.variables_by_name
    kernel = v['unit_3_0/sub2/conv2/DW'].numpy()
    assert kernel.std() == pytest.approx(np.sqrt(2 / (9 * 256)), rel=0.01)
    assert np.abs(kernel).max() > 3.5 * kernel.std()  # normal, not truncated
    dense = v['logit/DW'].numpy()
    assert 0.95 * np.sqrt(3 / 256) < np.abs(dense).max() <= np.sqrt(3 / 256)
    assert not v['logit/biases'].numpy().any()
    keras.utils.set_random_seed(1)
    again = Model(num_residual_units=1, width_factor=4)
    assert (again.variables_by_name['logit/DW'].numpy() == dense).all()


def test_bfloat16_keeps_pixels_statistics_and_logits_in_float32(golden):
    model = Model(5, 1, precision='mixed_bfloat16')
    model.load_madry_checkpoint(CHECKPOINT)
    logits = model(golden['images'])
    assert logits.dtype == tf.float32
    assert all(v.dtype == 'float32' for v in model.variables)
    assert 1e-4 < relative_error(logits, golden['bn_logits']) < 0.1
    agree = np.mean(np.argmax(logits, 1) == np.argmax(golden['bn_logits'], 1))
    assert agree >= 0.9


def test_saved_checkpoint_is_restored_by_name_by_tensorflow_1s_saver(madry_model, tmp_path):
    prefix = str(tmp_path / 'checkpoint-7')
    madry_model.save_madry_checkpoint(prefix, global_step=7)
    theirs = tf.train.load_checkpoint(CHECKPOINT)
    with tf.Graph().as_default():  # the variables that the original's graph has
        dtypes = theirs.get_variable_to_dtype_map()
        variables = {name: tf.compat.v1.get_variable(name, shape, dtypes[name])
                     for name, shape in theirs.get_variable_to_shape_map().items()}
        with tf.compat.v1.Session() as sess:
            tf.compat.v1.train.Saver().restore(sess, prefix)
            restored = sess.run(variables)
    assert restored.pop('global_step') == 7
    for name, value in restored.items():
        assert (value == theirs.get_tensor(name)).all(), name


@pytest.mark.parametrize('network, named', [
    (dict(num_residual_units=6, width_factor=1), 'num_residual_units'),
    (dict(num_residual_units=4, width_factor=1), 'num_residual_units'),
    (dict(num_residual_units=5, width_factor=2), 'width_factor'),
    (dict(num_residual_units=5, width_factor=1, num_classes=3), 'classes')])
def test_a_checkpoint_of_another_network_is_named_and_nothing_is_assigned(network, named):
    model = Model(**network)
    before = values(model)
    with pytest.raises(UserError, match=named) as error:
        model.load_madry_checkpoint(CHECKPOINT)
    assert '\n' not in str(error.value)
    assert all((before[name] == v).all() for name, v in values(model).items())


def test_a_missing_or_damaged_checkpoint_is_named(tmp_path, small_model):
    with pytest.raises(UserError, match='nowhere'):
        small_model.load_madry_checkpoint(tmp_path / 'nowhere')
    prefix = tmp_path / 'checkpoint-1'
    small_model.save_madry_checkpoint(prefix)
    data = tmp_path / 'checkpoint-1.data-00000-of-00001'
    data.write_bytes(data.read_bytes()[:1000])
    with pytest.raises(UserError, match='checkpoint-1 ') as error:
        small_model.load_madry_checkpoint(prefix)
    assert '\n' not in str(error.value)


# ---- hostile checkpoints


@pytest.fixture
def rewritten(small_model, small_config, tmp_path):
    """f({name: value}) -> prefix of a training's checkpoint in which these tensors are others."""
    def write(changes):
        optimizer = train.make_optimizer(small_config())
        tensors = {name: v.numpy() for name, v in
                   small_model.checkpoint_variables(optimizer).items()} | changes
        prefix = str(tmp_path / 'checkpoint-7')
        tf.raw_ops.SaveV2(prefix=prefix, tensor_names=list(tensors),
                          shape_and_slices=[''] * len(tensors),
                          tensors=[tf.convert_to_tensor(v) for v in tensors.values()])
        return prefix
    return write


HOSTILE = {
    'two steps': ({'global_step': np.array([1, 2])}, 'global_step is int64 .2.; expected one'),
    'a huge step': ({'global_step': np.int64(2 ** 62)}, 'expected 0 to 2147483647'),
    'a negative step': ({'global_step': np.int64(-1)}, 'global_step is -1; expected 0 to'),
    'a step of text': ({'global_step': tf.constant('7')}, 'global_step is string'),
    'a step that is no integer': ({'global_step': np.float32('nan')}, 'global_step is float32'),
    'text': ({'logit/biases': tf.constant(['a'] * 10)}, 'logit/biases is of type string; expected'),
    'integers': ({'logit/biases': np.zeros(10, np.int32)}, 'logit/biases is of type int32'),
    'NaN': ({'logit/biases': np.full(10, np.nan, np.float32)}, 'logit/biases holds NaN'),
    'infinity': ({'unit_last/BatchNorm/gamma': np.full(64, np.inf, np.float32)}, 'holds NaN or')}


@pytest.mark.parametrize('with_optimizer', [False, True])
@pytest.mark.parametrize('kind', HOSTILE)
def test_a_checkpoint_that_no_training_writes_is_refused_and_nothing_is_assigned(
        rewritten, small_config, kind, with_optimizer):
    changes, said = HOSTILE[kind]
    prefix = rewritten(changes)
    keras.utils.set_random_seed(5)
    model = Model(1, 1)
    optimizer = train.make_optimizer(small_config()) if with_optimizer else None
    before = values(model)
    with pytest.raises(UserError, match=said) as error:
        model.load_madry_checkpoint(prefix, optimizer)
    assert '\n' not in str(error.value) and (prefix in str(error.value) or 'here' in said)
    assert all((before[name] == v).all() for name, v in values(model).items())


def test_velocities_of_nan_are_refused(rewritten, small_config):
    prefix = rewritten({'logit/DW/Momentum': np.full((64, 10), np.nan, np.float32)})
    assert Model(1, 1).load_madry_checkpoint(prefix) == 0  # an evaluation does not read them
    with pytest.raises(UserError, match='logit/DW/Momentum holds NaN'):
        Model(1, 1).load_madry_checkpoint(prefix, train.make_optimizer(small_config()))


@pytest.mark.parametrize('error', [tf.errors.DataLossError(None, None, ''), RuntimeError(),
                                   OSError(), ValueError(' \n '), UnicodeError()])
def test_an_error_that_says_nothing_is_told_by_its_kind(small_model, monkeypatch, error):
    def fail(_):
        raise error
    monkeypatch.setattr(tf.train, 'load_checkpoint', fail)
    with pytest.raises(UserError, match=type(error).__name__):
        small_model.load_madry_checkpoint(CHECKPOINT)
    assert type(error).__name__ in damage(CHECKPOINT)


@pytest.mark.parametrize('key', ['batch_norms', 'precision'])
def test_a_mistyped_argument_is_refused(key):
    with pytest.raises(ValueError, match=f"^{key} must be one of .*, got 'synchronised'$"):
        Model(1, 1, **{key: 'synchronised'})
LOAD = '''
import keras, numpy as np
import model
loaded = keras.models.load_model('saved.keras')
x = np.load('x.npy')
np.savez('logits.npz', bn=loaded(x), pn=loaded(x, training=False),
         predict=loaded.predict(x, verbose=0))
'''


@pytest.mark.parametrize('settings', [
    dict(num_residual_units=1, width_factor=2, num_classes=3),
    dict(num_residual_units=2, width_factor=1, precision='mixed_bfloat16',
         batch_norms='synchronized')])
def test_a_saved_keras_model_answers_the_same_in_a_fresh_process(tmp_path, batch, settings):
    model, x = Model(**settings), batch[0].astype(np.float32)
    for _ in range(3):
        model(x, update_population_norms=True)
    np.save(tmp_path / 'x.npy', x)
    model.save(tmp_path / 'saved.keras')
    subprocess.run([sys.executable, '-c', LOAD], cwd=tmp_path, check=True, timeout=300,
                   env={**os.environ, 'PYTHONPATH': ROOT})
    with np.load(tmp_path / 'logits.npz') as z:
        np.testing.assert_array_equal(z['bn'], model(x))
        np.testing.assert_array_equal(z['pn'], model(x, training=False))
        np.testing.assert_allclose(z['predict'], z['pn'], atol=1e-4)
    again = keras.models.load_model(tmp_path / 'saved.keras')
    assert again.get_config() == {**dict(num_classes=10, precision='float32',
                                         batch_norms='per_replica'), **settings}
    ours, theirs = values(again), values(model)
    assert list(ours) == list(theirs) and all((ours[n] == theirs[n]).all() for n in ours)


def test_export_is_refused_and_what_its_message_names_serves_population_norms(
        small_model, batch, tmp_path):
    x = batch[0].astype(np.float32)
    small_model(x, update_population_norms=True)
    with pytest.raises(UserError, match='ExportArchive.*training=False') as error:
        small_model.export(tmp_path / 'served')
    assert '\n' not in str(error.value) and not os.path.exists(tmp_path / 'served')
    archive = keras.export.ExportArchive()
    archive.track(small_model)
    archive.add_endpoint('serve', lambda images: small_model(images, training=False),
                         [tf.TensorSpec([None, 32, 32, 3], tf.float32)])
    archive.write_out(str(tmp_path / 'served'))
    served = tf.saved_model.load(str(tmp_path / 'served'))
    np.testing.assert_allclose(served.serve(x), small_model(x, training=False), atol=1e-5)
