"""Recorded norms: what is recorded, the attack by fixed norms, the inference bn_recorded."""
import keras
import numpy as np
import pytest
import tensorflow as tf

from config import TRAINING_MODES
from conftest import attacked_batch
from model import BN_EPSILON, Model, mixed_norm
from running import UserError
from shaping import RecordedInference, make_inference, record_norms
import train


def moving_averages(model):
    return {name: v.numpy() for name, v in model.variables_by_name.items() if '/moving_' in name}


def test_a_batch_by_its_own_recording_has_the_logits_of_batch_norms(small_model, batch):
    x = tf.cast(batch[0], tf.float32)
    before = moving_averages(small_model)
    recorded = small_model.record(x)
    np.testing.assert_allclose(small_model(x, recorded=recorded), small_model(x), atol=1e-4)
    after = moving_averages(small_model)
    assert all((before[name] == after[name]).all() for name in before)
    assert [mean.shape[0] for mean, _ in recorded.values()] == [16, 16, 16, 32, 32, 64, 64]


def test_an_answer_by_recorded_norms_does_not_depend_on_the_rest_of_the_batch(small_model, batch):
    x = tf.cast(batch[0], tf.float32)
    recorded = small_model.record(x[:8])
    alone = small_model(x[8:12], recorded=recorded).numpy()
    np.testing.assert_allclose(small_model(x, recorded=recorded)[8:12], alone, atol=1e-4)


def test_a_recording_moves_the_averages_where_the_training_asks_for_it(small_model, batch):
    x = tf.cast(batch[0], tf.float32)
    other = Model(1, 1)
    for name, v in small_model.variables_by_name.items():
        other.variables_by_name[name].assign(v)
    small_model.record(x, update_population_norms=True)
    other(x, update_population_norms=True)
    ours, theirs = moving_averages(small_model), moving_averages(other)
    assert all((ours[name] == theirs[name]).all() for name in ours)
    assert any((v != 0).any() for name, v in ours.items() if name.endswith('mean'))


@pytest.mark.parametrize('mode', [mode for mode in TRAINING_MODES if mode != 'natural'])
@pytest.mark.parametrize('adversary', ['pgd', 'trades'])
def test_the_attack_by_fixed_norms_is_that_of_a_plain_loop(
        small_model, small_config, batch, mode, adversary):
    """Two steps written out: the norms of X^(0), the gradient of each sample's own loss, sign."""
    config = small_config(training_mode=mode, adversary=adversary, attack_norms='fixed',
                          data_augmentation=False)
    get_batch, _ = train.make_adversary(small_model, config, False)
    x, x_nat, labels = get_batch(*batch, tf.constant(3, tf.int64))
    recorded = small_model.record(x_nat)
    tail = train.adversarial_tail(config)
    p = tf.nn.softmax(small_model(x_nat, recorded=recorded))
    for _ in range(config['num_steps']):
        with tf.GradientTape() as tape:
            tape.watch(x)
            logits = small_model(x, recorded=recorded)
            loss = (tf.nn.sparse_softmax_cross_entropy_with_logits(labels, logits)
                    if adversary == 'pgd' else
                    tf.reduce_sum(p * (tf.math.log(p) - tf.nn.log_softmax(logits)), 1))
        x = x + 2 * tf.sign(tape.gradient(loss, x))
        x = tf.clip_by_value(tf.clip_by_value(x, x_nat - 8, x_nat + 8), 0, 255)
    _, x_adv, _ = attacked_batch(small_model, config, batch, 3, update_population_norms=False)
    assert (x_adv.numpy()[~tail] == x_nat.numpy()[~tail]).all()
    assert np.mean(x_adv.numpy()[tail] == x.numpy()[tail]) > 0.97  # tiny gradients turn on rounding


def test_fixed_norms_move_the_averages_by_the_recording_and_by_the_update_alone(
        small_model, small_config, batch):
    config = small_config(attack_norms='fixed', num_steps=5, step_size_schedule=[[0, 1e-9]])
    images = tf.constant(batch[0])
    x_nat, x_adv, _ = attacked_batch(small_model, config, batch, 0, update_population_norms=False)
    other = Model(1, 1)
    for name, v in small_model.variables_by_name.items():
        other.variables_by_name[name].assign(v)
    train.make_train_step(small_model, train.make_optimizer(config), config)(
        images, tf.constant(batch[1]), tf.constant(0, tf.int64))
    for x in (x_nat, x_adv):
        other(x, update_population_norms=True)
    ours, theirs = moving_averages(small_model), moving_averages(other)
    for name in ours:
        np.testing.assert_allclose(ours[name], theirs[name], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize('precision', ['float32', 'mixed_bfloat16'])
def test_a_step_with_fixed_norms_lowers_the_loss(small_config, batch, precision):
    keras.utils.set_random_seed(0)
    model = Model(1, 1, precision=precision)
    config = small_config(attack_norms='fixed', precision=precision, data_augmentation=False,
                          epsilon=2., step_size=1.)
    step = train.make_train_step(model, train.make_optimizer(config), config)
    losses = [float(step(*map(tf.constant, batch), tf.constant(i, tf.int64))['xent'])
              for i in range(12)]
    assert np.isfinite(losses).all() and losses[-1] < losses[0]


def test_the_mixture_is_that_of_n_images_and_the_query():
    rng = np.random.default_rng(0)
    n, (h, w, c) = 9, (4, 4, 3)
    clean = rng.normal(2, 3, (n, h, w, c))
    query = rng.normal(-1, 1, (1, h, w, c))
    together = np.concatenate([clean, query])
    mean, variance = together.mean((0, 1, 2)), together.var((0, 1, 2))
    gamma, beta = rng.normal(size=(2, c))
    expected = (query - mean) / np.sqrt(variance + BN_EPSILON) * gamma + beta
    y = mixed_norm(*(tf.constant(v, tf.float32) for v in (
        query, gamma, beta, clean.mean((0, 1, 2))[None], clean.var((0, 1, 2))[None])), n)
    np.testing.assert_allclose(y, expected, atol=1e-4)


@pytest.fixture
def recorded(small_model, data):
    return RecordedInference(
        small_model, record_norms(small_model, data.train_data.xs, 7, 20, seed=3), 9, seed=3)


def test_the_same_query_draws_the_same_recordings_and_others_draw_others(recorded, batch):
    def drawn(query, size=16):
        return recorded.known(query)(0, size)
    assert (drawn(5) == drawn(5)).all() and (drawn(5) != drawn(6)).any()
    assert set(drawn(0, 500)) == set(range(7))
    assert (drawn(5, 500)[:16] == drawn(5)).all()  # how many others there are does not count
    np.testing.assert_array_equal(recorded(batch[0], 5), recorded(batch[0], 5))
    assert np.abs(recorded(batch[0], 5) - recorded(batch[0], 6)).max() > 1e-3


def test_what_is_beside_a_query_changes_no_bit_of_its_answer(recorded, batch):
    images, others = batch[0], batch[0].copy()
    others[1:] = np.random.default_rng(1).integers(0, 256, others[1:].shape)
    others[1] = 255
    ours, theirs = recorded(images, 5).numpy(), recorded(others, 5).numpy()
    assert ours[0].tobytes() == theirs[0].tobytes()
    assert (ours[1:] != theirs[1:]).all()


def test_recordings_are_the_statistics_of_clean_images_alone(recorded, small_model, data):
    rng = np.random.default_rng([3, 4, 0, 1])
    clean = data.train_data.xs[rng.choice(200, 20, replace=False)]
    for name, (mean, variance) in small_model.record(tf.cast(clean, tf.float32)).items():
        np.testing.assert_allclose(recorded.recordings[name][0][4], mean, atol=1e-5)
        np.testing.assert_allclose(recorded.recordings[name][1][4], variance, atol=1e-5)


def test_an_attack_can_go_through_a_known_recording(recorded, small_model, batch):
    x = tf.cast(batch[0], tf.float32)
    drawn = recorded.known(5)(0, 16)
    with tf.GradientTape() as tape:
        tape.watch(x)
        loss = tf.reduce_sum(tf.nn.sparse_softmax_cross_entropy_with_logits(
            batch[1], recorded.logits(x, drawn)))
    gradient = tape.gradient(loss, x)
    assert np.isfinite(gradient).all() and np.mean(np.abs(gradient) > 0) > 0.9
    stepped = recorded.logits(x + 2 * tf.sign(gradient), drawn)
    assert float(tf.reduce_sum(tf.nn.sparse_softmax_cross_entropy_with_logits(
        batch[1], stepped))) > float(loss)


def test_no_image_gets_another_recording_that_it_is_judged_by(recorded):
    queries = [5, 6, 7]
    judging = np.stack([recorded.known(query)(0, 200) for query in queries])
    others = np.stack([recorded.other(queries, query)(0, 200) for query in queries])
    assert not (others[:, None] == judging[None]).any() and set(others.ravel()) == set(range(7))
    assert (others[0] != others[1]).any()
    with pytest.raises(UserError, match='num_recordings is 7, and 7 draws.*expected at least 8'):
        recorded.other(range(7), 0)


def test_too_few_clean_images_are_refused(small_model, data):
    with pytest.raises(UserError, match='recorded_samples must be at most 200, .*, got 201'):
        record_norms(small_model, data.train_data.xs, 2, 201, seed=0)


def test_make_inference_makes_it_of_the_configuration(small_model, small_config, data, batch):
    config = small_config(num_recordings=3, recorded_samples=10, inference_shaping_ratio=4)
    classify = make_inference(small_model, 'bn_recorded', data, config)
    seed = config['np_random_seed']
    expected = RecordedInference(
        small_model, record_norms(small_model, data.train_data.xs, 3, 10, seed), 4, seed)
    np.testing.assert_allclose(classify(batch[0], 0), expected(batch[0], 0), atol=1e-5)
    assert classify.num_recordings == 3
