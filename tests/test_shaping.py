"""Norm shaping: the ratio, the mask, the inference modes."""
import numpy as np
import pytest
import tensorflow as tf

from cifar10_input import CIFAR10Data
from shaping import (INFERENCE_MODES, Inference, RecordedInference, ShapedInference, make_inference,
                     num_clean, record_norms, tail_mask)


class SpyModel:
    """Stands before a model and keeps every batch that it is given."""

    def __init__(self, model):
        self.model, self.seen = model, []

    def __call__(self, images, training=True, num_groups=1, update_population_norms=False):
        assert not update_population_norms
        self.seen.append((np.asarray(images), training, num_groups))
        return self.model(images, training=training, num_groups=num_groups,
                          update_population_norms=update_population_norms)


@pytest.fixture
def clean_images():
    return np.random.default_rng(7).integers(0, 256, (200, 32, 32, 3), np.uint8)


@pytest.mark.parametrize('batch_size, ratio, k', [
    (64, 3, 48), (100, 9, 90), (10, 9, 9), (64, 7, 56), (100, 1, 50), (100, 49, 98), (8, 0, 0)])
def test_num_clean_is_eq_5s_k(batch_size, ratio, k):
    assert num_clean(batch_size, ratio) == k
    mask = tail_mask(batch_size, ratio)
    assert mask.dtype == bool and not mask[:k].any() and mask[k:].all() and len(mask) == batch_size


@pytest.mark.parametrize('batch_size, ratio, fits', [(64, 2, '63 or 66'), (10, 3, '8 or 12'),
                                                     (5, 9, '10 or 20')])
def test_a_batch_that_does_not_fit_the_ratio_names_sizes_that_do(batch_size, ratio, fits):
    with pytest.raises(ValueError, match=fits):
        num_clean(batch_size, ratio)
    for size in fits.split(' or '):
        num_clean(int(size), ratio)


def test_one_query_is_eq_6_to_the_letter(small_model, clean_images, batch):
    """Batch of n + 1: each test sample is normalized together with its own n clean samples."""
    shaped = ShapedInference(small_model, clean_images, ratio=9, batch_size=10, seed=1)
    logits = shaped(batch[0][:3], query=5).numpy()
    for i in range(3):
        x = np.concatenate([clean_images[shaped.known(5)(i, 9)], batch[0][i:i + 1]])
        expected = small_model(x, update_population_norms=False)[9]
        np.testing.assert_allclose(logits[i], expected, atol=1e-5)


def test_larger_batches_hold_several_test_samples_at_the_same_ratio(
        small_model, clean_images, batch):
    spy = SpyModel(small_model)
    shaped = ShapedInference(spy, clean_images, ratio=3, batch_size=16, seed=1)
    tf.config.run_functions_eagerly(True)
    try:
        logits = shaped(batch[0][:10], query=0)
    finally:
        tf.config.run_functions_eagerly(False)
    assert logits.shape == (10, 10)
    (full, _, groups), (rest, _, _) = spy.seen
    assert groups == 2 and len(full) == 32 and len(rest) == 8  # 12 + 4, 12 + 4; then 6 + 2
    expected = small_model(rest, update_population_norms=False)[6:]
    np.testing.assert_allclose(logits[8:], expected, atol=1e-5)


def test_clean_and_test_pixels_are_unchanged_bit_for_bit_by_inference(
        small_model, clean_images, batch):
    spy = SpyModel(small_model)
    shaped = ShapedInference(spy, clean_images, ratio=3, batch_size=16, seed=1)
    x = batch[0] + np.float32(0.25)
    before = clean_images.tobytes()
    tf.config.run_functions_eagerly(True)
    try:
        shaped(x, query=3)
    finally:
        tf.config.run_functions_eagerly(False)
    seen = spy.seen[0][0].reshape(4, 16, 32, 32, 3)
    for group in range(4):
        clean = clean_images[shaped.known(3)(group, 12)].astype(np.float32)
        assert seen[group, :12].tobytes() == clean.tobytes()
        assert len(np.unique(clean.reshape(12, -1), axis=0)) == 12  # drawn without replacement
        assert seen[group, 12:].tobytes() == x[4 * group:4 * group + 4].tobytes()
    assert clean_images.tobytes() == before


def test_the_same_query_draws_the_same_clean_samples_another_one_others(
        small_model, clean_images, batch):
    def ask(query, seed=1):
        return ShapedInference(small_model, clean_images, 3, 16, seed)(batch[0], query).numpy()
    shaped = ShapedInference(small_model, clean_images, 3, 16, 1)
    shaped(batch[0], 1)
    assert (shaped(batch[0], 8).numpy() == ask(8)).all()
    assert (ask(8) != ask(9)).any()
    assert (ask(8) != ask(8, seed=2)).any()


def test_an_attack_can_differentiate_through_shaping(small_model, clean_images, batch):
    shaped = ShapedInference(small_model, clean_images, 3, 16, 1)
    x = tf.cast(batch[0][:4], tf.float32)
    with tf.GradientTape() as tape:
        tape.watch(x)
        loss = tf.reduce_sum(shaped.logits(x, shaped.known(0)(0, 12)[None]) ** 2)
    assert np.abs(tape.gradient(loss, x)).max() > 0


def test_too_few_clean_images_are_named(small_model, clean_images):
    with pytest.raises(ValueError, match='90 clean samples'):
        ShapedInference(small_model, clean_images[:50], 9, 100, 1)


@pytest.mark.parametrize('mode', INFERENCE_MODES)
def test_inference_modes_use_the_norms_that_they_name_and_leave_the_model_alone(
        small_model, clean_images, batch, small_config, mode):
    data = CIFAR10Data((clean_images, np.zeros(200, int)), batch, [str(i) for i in range(10)])
    config = small_config(shaping_batch_size=40, num_recordings=3)  # 3:1, of 20 recorded samples
    before = [v.numpy().copy() for v in small_model.variables]
    infer = make_inference(small_model, mode, data, config)
    logits = infer(batch[0], 0)
    if mode == 'bn':
        expected = small_model(batch[0], training=True, update_population_norms=False)
    elif mode == 'pn':
        expected = small_model(batch[0], training=False)
    elif mode == 'bn_shaping':
        expected = ShapedInference(small_model, clean_images, 3, 40, config['np_random_seed'])(
            batch[0], 0)
    else:
        seed = config['np_random_seed']
        recordings = record_norms(small_model, clean_images, 3, 20, seed)
        expected = RecordedInference(small_model, recordings, 3, seed)(batch[0], 0)
    np.testing.assert_allclose(logits, expected, atol=1e-5)
    assert all((a == b.numpy()).all() for a, b in zip(before, small_model.variables))


@pytest.mark.parametrize('mode', INFERENCE_MODES)
def test_an_answer_is_the_logits_under_the_known_draw(
        small_model, clean_images, batch, small_config, mode):
    """What an attack differentiates is what answers."""
    data = CIFAR10Data((clean_images, np.zeros(200, int)), batch, [str(i) for i in range(10)])
    infer = make_inference(small_model, mode, data, small_config(shaping_batch_size=20))
    through = tf.function(infer.logits)
    logits = [through(tf.cast(batch[0][part.start:part.end], tf.float32),
                      infer.drawn(part, infer.known(7))) for part in infer.parts(16, 40)]
    assert len(logits) == (3 if mode == 'bn_shaping' else 1)
    np.testing.assert_allclose(tf.concat(logits, 0), infer(batch[0], 7), atol=1e-5)


def test_what_nothing_is_drawn_for_has_one_draw(small_model):
    pn = Inference(small_model, 'pn')
    part, = pn.parts(5000)
    draws = [pn.known(3), pn.other([3], 3), pn.fresh(np.random.default_rng(0))]
    assert (part.start, part.end, pn.is_random) == (0, 5000, False)
    assert [pn.drawn(part, draw).shape for draw in draws] == 3 * [(1, 0)]
