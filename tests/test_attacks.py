"""The evaluation's attacks, against closed forms, plain loops and what they promise to know."""
from types import SimpleNamespace

import keras
import numpy as np
import pytest
import tensorflow as tf

from attacks import apgd, hopskipjump, make_attack, minimum_norm, random_search, square
from attacks.adaptive import AdaptivePGD
from attacks.minimum_norm import minimum_norm_attack
from cifar10_input import CIFAR10Data, DataSubset
from config import load_config
from model import Model
from pgd_attack import LinfPGDAttack, perturbation_fault
from running import UserError
import train
from shaping import (DRAW, INFERENCE_MODES, Inference, RecordedInference, ShapedInference, Unfit,
                     make_inference, queries_of)

RNG = np.random.default_rng(0)
NOTHING_DRAWN = np.zeros([1, 1, 1, 0], np.int32)
WEIGHTS = RNG.normal(size=(32 * 32 * 3, 3)).astype(np.float32) / 5000


class Linear:
    """Three classes, logits linear in the pixels: every minimum distance has a closed form."""

    def __call__(self, x, training=True, **_):
        return tf.matmul(tf.reshape(x, [-1, 32 * 32 * 3]) - 128, WEIGHTS)


@pytest.fixture(scope='module')
def linear():
    """(model, images, the model's own labels, distance to the nearest boundary on [0, 1])"""
    images = RNG.integers(100, 156, (6, 32, 32, 3), np.uint8)
    logits = Linear()(tf.cast(images, tf.float32)).numpy()
    labels = logits.argmax(1)
    distances = [min((z[y] - z[k]) / np.linalg.norm(WEIGHTS[:, y] - WEIGHTS[:, k]) / 255
                     for k in range(3) if k != y) for z, y in zip(logits, labels)]
    return Linear(), images, labels, np.array(distances)


@pytest.mark.parametrize('name, excess', [('deepfool', 0.03), ('cw', 0.2)])
def test_minimum_norm_attacks_find_the_nearest_boundary(linear, name, excess):
    """On [0, 1] and back: DeepFool oversteps by its 2% and a 1e-4, C&W closes in from outside."""
    model, images, labels, distances = linear
    attack, settings = minimum_norm_attack(name, model, images, labels)
    x_adv = attack(0, 6).numpy()
    assert (np.argmax(model(x_adv), 1) != labels).all()
    found = np.linalg.norm((x_adv - images).reshape(6, -1), axis=1) / 255
    assert (found >= distances * 0.999).all() and (found <= distances * (1 + excess)).all()
    assert settings['epsilon'] is None and settings['norms'] == 'pn'


def test_on_pixels_of_0_to_255_cw_gives_up_and_deepfool_does_not(linear, monkeypatch):
    """Where the boundary is several pixels off; see paper/scales.py."""
    monkeypatch.setitem(minimum_norm.CLEVERHANS_CW, 'num_steps', 100)
    model, images, labels, _ = linear
    def far(x, training=True, **_):
        return model(x) + 3 * tf.one_hot(labels, 3)
    moved = {}
    for name, scale in (('cw', 1), ('cw', 255), ('deepfool', 255)):
        attack, settings = minimum_norm_attack(name, far, images, labels, scale)
        moved[name, scale] = (attack(0, 6).numpy() != images).any((1, 2, 3))
        assert settings.get('scale', 1) == scale
    assert moved['cw', 1].all() and moved['deepfool', 255].all() and not moved['cw', 255].any()


def test_random_is_the_strongest_of_its_draws_and_weaker_than_pgd(
        linear, small_config, monkeypatch):
    model, images, labels, _ = linear
    def loss(x):
        return tf.nn.sparse_softmax_cross_entropy_with_logits(labels, model(x)).numpy()
    data = CIFAR10Data((images, labels), (images, labels), list('abc'))
    config, losses = small_config(num_eval_examples=len(images)), []
    for draws in (1, 4, 16, 64):
        monkeypatch.setattr(random_search, 'RANDOM_DRAWS', draws)
        attack, settings = make_attack('random', model, data, config)
        losses.append(loss(attack(0, 6)))
        assert settings['random_draws'] == draws
    assert (np.diff(losses, axis=0) >= 0).all() and (losses[-1] > losses[0]).all()
    x_adv = LinfPGDAttack(model, 8., 10, 2., True, 'xent', False).perturb(images, labels, 0)
    assert (loss(x_adv) > losses[-1]).all()


def test_samples_that_are_wrong_already_come_back_as_they_are(linear):
    model, images, labels, _ = linear
    wrong = labels.copy()
    wrong[::2] = (wrong[::2] + 1) % 3
    attack, _ = minimum_norm_attack('deepfool', model, images, wrong)
    x_adv = attack(0, 6).numpy()
    assert (x_adv[::2] == images[::2]).all() and (x_adv[1::2] != images[1::2]).any()


def test_hopskipjump_finds_the_nearest_boundary_by_labels_alone(monkeypatch):
    """Small images, as its directions take as many queries as there are pixels. What is wrong
    already comes back as it is, and is in no other image's way."""
    monkeypatch.setitem(hopskipjump.SETTINGS, 'num_steps', 8)
    rng, n = np.random.default_rng(0), 12
    images = rng.integers(0, 256, (n, 8, 8, 3), np.uint8)
    direction = rng.normal(size=8 * 8 * 3).astype(np.float32)
    def model(x, **_):  # two classes, their boundary in the middle of the images
        lead = tf.reshape(x - images.mean(0), [-1, 8 * 8 * 3]) @ direction[:, None]
        return tf.concat([lead, -lead], axis=1)
    lead = model(images.astype(np.float32)).numpy()[:, 0]
    labels, wrong = (lead < 0).astype(int), np.arange(n) < 2
    distances = np.abs(lead) / np.linalg.norm(direction) / 255
    attack = hopskipjump.HopSkipJump(Inference(model, 'pn'), images,
                                     np.where(wrong, 1 - labels, labels), images, n, 0)
    x_adv = attack(0, n).numpy()
    assert x_adv.min() >= 0 and x_adv.max() <= 255 and (x_adv[wrong] == images[wrong]).all()
    assert (np.argmax(model(x_adv), 1) != labels)[~wrong].all()
    found = np.linalg.norm((x_adv - images).reshape(n, -1), axis=1) / 255
    assert (found >= distances * 0.999)[~wrong].all()
    assert np.median((found / distances)[~wrong]) < 1.25  # 50 steps come closer
    assert 1600 < attack.num_queries < 2000  # for the gradients 100 sqrt(t) at step t: 1,628
    assert (x_adv == attack(0, n).numpy()).all()


def test_hopskipjump_leaves_what_has_no_start_and_refuses_shared_norms(
        linear, small_model, small_config, data, monkeypatch):
    monkeypatch.setitem(hopskipjump.SETTINGS, 'num_steps', 1)
    _, images, _, _ = linear
    def constant(x, **_):
        return tf.repeat([[1., 0., 0.]], len(x), axis=0)
    attack = hopskipjump.HopSkipJump(Inference(constant, 'pn'), images, np.zeros(6, int), images,
                                     6, 0)
    assert (attack(0, 6).numpy() == images).all()
    for mode, size, coupled in (('bn', 10, True), ('bn_shaping', 20, True),
                                ('bn_shaping', 10, False)):
        config = small_config(shaping_batch_size=size, inference_shaping_ratio=9)
        inference = make_inference(small_model, mode, data, config)
        if coupled:
            with pytest.raises(Unfit, match=f'under {mode} the images of a batch share their'):
                make_attack('hopskipjump', small_model, data, config, 1, inference)
        else:
            _, settings = make_attack('hopskipjump', small_model, data, config, 1, inference)
            assert settings['epsilon'] is None and settings['norms'] == mode


def test_settings_are_cleverhans_defaults(linear):
    """CleverHans v2.1, attacks.py: CarliniWagnerL2.parse_params, DeepFool.parse_params."""
    _, settings = minimum_norm_attack('cw', *linear[:3])
    assert {k: settings[k] for k in ('binary_search_steps', 'num_steps', 'learning_rate',
                                     'initial_const', 'confidence', 'abort_early')} == {
        'binary_search_steps': 5, 'num_steps': 1000, 'learning_rate': 5e-3, 'initial_const': 1e-2,
        'confidence': 0, 'abort_early': True}
    _, settings = minimum_norm_attack('deepfool', *linear[:3])
    assert (settings['candidates'], settings['overshoot'], settings['num_steps']) == (10, 0.02, 50)


def test_the_checks_of_apgd_are_the_papers():
    """Croce and Hein 2020, section 3: p_0 = 0, p_1 = 0.22, p_j+1 = p_j + max(...)."""
    assert apgd.checkpoints(100) == [22, 41, 57, 70, 80, 87, 93, 99]
    assert apgd.checkpoints(10) == [3, 5, 6, 7, 8, 9, 10]


def test_dlr_is_that_of_numpy_and_does_not_see_the_logits_scale():
    logits, y = RNG.normal(0, 3, (40, 10)), RNG.integers(0, 10, 40)
    def dlr(z, label):
        top = np.sort(z)
        best_other = max(v for k, v in enumerate(z) if k != label)
        return -(z[label] - best_other) / (top[-1] - top[-3])
    expected = [dlr(z, label) for z, label in zip(logits, y)]
    for scale in (1, 100):
        ours = apgd.dlr_loss(tf.constant(scale * logits, tf.float32), tf.constant(y))
        np.testing.assert_allclose(ours, expected, rtol=1e-4)


@pytest.mark.parametrize('loss_func', ['xent', 'dlr'])
def test_apgd_reaches_the_corner_that_is_the_optimum(linear, loss_func):
    """Two linear classes and one far off: the worst point of the ball is a corner, known."""
    model, images, _, _ = linear
    def two_classes(x):
        return model(x) * [1., 1., 0.] - [0., 0., 1000.]
    images = images.astype(np.float32)
    z = two_classes(images).numpy()
    y = z.argmax(1)
    direction = np.sign(WEIGHTS[:, 1] - WEIGHTS[:, 0]).reshape(32, 32, 3)
    corner = two_classes(images + 4 * direction * np.where(y, -1, 1)[:, None, None, None]).numpy()
    x_adv, = apgd.APGDAttack(lambda x, drawn: two_classes(x), [loss_func], 4., 30).perturb(
        images, y, (0, 0), NOTHING_DRAWN, loss_func)
    x_adv = x_adv.numpy()
    assert np.abs(x_adv - images).max() <= 4
    def lead(z):
        return (z[:, 0] - z[:, 1]) * np.where(y, -1, 1)
    reached = lead(two_classes(x_adv).numpy())
    assert (lead(z) - reached > 0.98 * (lead(z) - lead(corner))).all()


def test_apgd_halves_its_step_where_it_finds_no_progress():
    """The loss peaks inside the ball: fixed steps of 2 epsilon would jump over it for ever."""
    peak = 3.3
    class Peak(apgd.APGDAttack):
        def target_class(self, x, y, drawn, rank):
            return y

        def evaluate(self, x, y, target, drawn, loss_func):
            offset = x - (100 + peak)
            return -tf.reduce_sum(tf.abs(offset), [1, 2, 3]), tf.ones([len(x)]), -tf.sign(offset)
    x_adv, = Peak(None, ['xent'], 8., 100).perturb(
        np.full((1, 4, 4, 1), 100.), [0], (0, 0), NOTHING_DRAWN, 'xent')
    assert np.abs(x_adv - 100 - peak).mean() < 0.3


def adaptive_examples(inference, data, config, num_draws):
    """One batch's adaptive examples by a plain loop over the draws that the inference makes."""
    images, labels = data.eval_data.xs[20:40], data.eval_data.ys[20:40]
    x = images.astype(np.float32)
    for _ in range(config['num_steps']):
        total = np.zeros_like(x)
        for draw in range(num_draws):
            known = inference.known(1 + draw * DRAW)  # eval_batch_size 20: batch 1
            for part in inference.parts(20):
                a, b = part.start, part.end
                some = tf.constant(x[a:b])
                with tf.GradientTape() as tape:
                    tape.watch(some)
                    loss = tf.reduce_sum(tf.nn.sparse_softmax_cross_entropy_with_logits(
                        labels[a:b], inference.logits(some, inference.drawn(part, known))))
                total[a:b] += tape.gradient(loss, some).numpy()
        x = np.clip(np.clip(x + 2 * np.sign(total), images - 8., images + 8.), 0, 255)
        x = x.astype(np.float32)
    return x


@pytest.mark.parametrize('mode, num_draws', [
    ('bn', 1), ('pn', 1), ('bn_shaping', 1), ('bn_shaping', 2), ('bn_recorded', 1),
    ('bn_recorded', 2)])
@pytest.mark.parametrize('name', ['adaptive_pgd', 'adaptive_weak'])
def test_adaptive_goes_through_what_answers_and_weak_through_another_draw(
        small_model, small_config, data, name, mode, num_draws):
    config = small_config(random_start=False, recorded_samples=4)
    inference = make_inference(small_model, mode, data, config)
    attack, settings = make_attack(name, small_model, data, config, num_draws, inference)
    agreement = (attack(20, 40).numpy() == adaptive_examples(
        inference, data, config, num_draws)).mean()
    if name == 'adaptive_pgd' or not inference.is_random:
        assert agreement > 0.99
    else:
        assert agreement < 0.95
    assert settings['norms'] == mode


class Shifted(Linear):
    """Its recordings shift the logits."""
    num_classes = 3

    def __call__(self, x, recorded, ratio):
        return super().__call__(x) + recorded['shift'][0]


def test_retry_goes_on_until_a_draw_is_fooled(small_config):
    """Whom the first draw's attack fools has its example; of the others, later draws fool some."""
    images = RNG.integers(100, 156, (40, 32, 32, 3), np.uint8)
    shifts = RNG.normal(size=(5, 3)).astype(np.float32) / 10
    inference = RecordedInference(Shifted(), {'shift': (shifts, shifts)}, 9, 0)
    labels = np.argmax(inference(images, 0), 1)
    data = SimpleNamespace(eval_data=DataSubset(images, labels), num_classes=3)
    config = small_config(num_eval_examples=40, eval_batch_size=40, epsilon=0.25)
    once, (again, settings) = (make_attack(name, None, data, config, num_draws, inference)
                               for name, num_draws in (('adaptive', 1), ('retry', 4)))
    first, last = once[0](0, 40).numpy(), again(0, 40).numpy()
    assert perturbation_fault(images, last, 0.25) is None and settings['num_draws_known'] == 4
    right = np.array([np.argmax(inference(last, query), 1) == labels
                      for query in queries_of(0, 4)])
    by_first = np.argmax(inference(first, 0), 1) == labels
    assert (last == first)[~by_first].all() and not right[:, ~by_first].all(axis=0).any()
    assert 0 < right.all(axis=0).sum() < by_first.sum() < 40


@pytest.mark.parametrize('mode, size, num_draws', [
    ('pn', 4, 2), ('bn_recorded', 4, 1), ('bn', 4, 2), ('bn_shaping', 20, 2)])
def test_retry_without_several_draws_for_each_image_is_named(
        small_model, small_config, data, mode, size, num_draws):
    config = small_config(shaping_batch_size=size)
    inference = make_inference(small_model, mode, data, config)
    with pytest.raises(Unfit, match=f'expected --num_draws 2 or more.*, not {mode}'):
        make_attack('retry', small_model, data, config, num_draws, inference)


def test_adaptive_through_population_norms_is_pgd(small_model, small_config, data):
    config = small_config()
    pn = make_inference(small_model, 'pn', data, config)
    ours, pgd = (make_attack(name, small_model, data, config, 1, pn)[0](20, 40)
                 for name in ('adaptive_pgd', 'pgd'))
    assert np.mean(ours == pgd) > 0.99


def test_targeted_dlr_is_that_of_numpy_and_does_not_see_the_logits_scale():
    """Croce and Hein 2020, equation 7."""
    logits, y, t = RNG.normal(0, 3, (40, 10)), RNG.integers(0, 10, 40), RNG.integers(0, 10, 40)
    top = np.sort(logits)
    expected = -(logits[np.arange(40), y] - logits[np.arange(40), t]) / (
        top[:, -1] - (top[:, -3] + top[:, -4]) / 2)
    for scale in (1, 100):
        ours = apgd.targeted_dlr_loss(tf.constant(scale * logits, tf.float32), tf.constant(y),
                                      tf.constant(t))
        np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-6)


def test_targets_are_the_most_probable_wrong_classes(linear):
    model, images, labels, _ = linear
    for classes, names in ((2, 'xent+targeted_xent'), (3, 'xent+dlr+targeted_xent'),
                           (10, 'xent+dlr+targeted_dlr')):
        assert '+'.join(apgd.loss_funcs_for(classes)) == names
    attack = apgd.APGDAttack(lambda x, drawn: model(x), ['targeted_xent'], 8., 1)
    z, drawn = model(tf.cast(images, tf.float32)).numpy(), tf.zeros([1, 1, 0], tf.int32)
    order = np.argsort(-z, 1)
    for rank in (1, 2):
        target = attack.target_class(tf.cast(images, tf.float32), tf.constant(labels), drawn, rank)
        assert (target.numpy() == order[:, rank]).all()


@pytest.fixture(scope='module')
def taught():
    """(weights of the smallest network after a few natural steps, (images, labels) twice)"""
    config = load_config(settings=[
        'dataset=synthetic', 'num_residual_units=1', 'width_factor=1', 'training_mode=natural',
        'step_size_schedule=[[0, 0.02]]'])
    rng = np.random.default_rng(0)
    def subset(n):
        y = rng.integers(0, 10, n)
        x = 128 + 12 * np.sin(y[:, None, None, None] + np.arange(3) * 2) + rng.normal(
            0, 10, (n, 32, 32, 3))
        return np.clip(x, 0, 255).astype(np.uint8), y
    subsets = subset(640), subset(60)
    data = CIFAR10Data(*subsets, [str(i) for i in range(10)])
    keras.utils.set_random_seed(0)
    model = Model(num_residual_units=1, width_factor=1)
    step = train.make_train_step(model, train.make_optimizer(config), config)
    for i in range(60):
        step(*map(tf.constant, data.train_data.get_batch(i, 64)), tf.constant(i, tf.int64))
    return [v.numpy() for v in model.variables], subsets


@pytest.fixture
def learned(taught, small_model):
    """(the smallest network after a few natural steps, its data), most of which it answers right"""
    weights, subsets = taught
    small_model.set_weights(weights)
    return small_model, CIFAR10Data(*([each.copy() for each in subset] for subset in subsets),
                                    [str(i) for i in range(10)])


@pytest.mark.parametrize('mode, size', [
    ('pn', 100), ('bn', 100), ('bn_shaping', 50), ('bn_shaping', 10), ('bn_recorded', 100)])
def test_adaptive_is_as_strong_as_pgd_through_any_inference(learned, small_config, mode, size):
    """At an epsilon where some images are beaten and some are not."""
    model, data = learned
    config = small_config(num_recordings=5, apgd_num_steps=6, num_steps=4, num_restarts=1,
                          num_eval_examples=20, shaping_batch_size=size, epsilon=3., step_size=1.,
                          inference_shaping_ratio=9, recorded_samples=90)
    inference = make_inference(model, mode, data, config)
    labels = data.eval_data.ys[:20]
    def right(x):
        return np.argmax(inference(x, 0), 1) == labels
    clean, pgd, strong = (right(make_attack(name, model, data, config, 1, inference)[0](0, 20))
                          for name in ('clean', 'adaptive_pgd', 'adaptive'))
    assert clean.mean() >= 0.5 and strong.sum() <= pgd.sum() < clean.sum()
    if not inference.coupled:
        assert not (strong & ~clean).any()  # what is wrong stays wrong


def test_an_image_that_is_wrong_is_not_attacked_where_images_do_not_share_norms(
        learned, small_config):
    model, data = learned
    config = small_config(apgd_num_steps=3, num_restarts=1, num_eval_examples=20, num_recordings=5)
    data.eval_data.ys[:20:2] = (data.eval_data.ys[:20:2] + 1) % 10
    for mode in ('pn', 'bn_recorded'):
        inference = make_inference(model, mode, data, config)
        attack, _ = make_attack('adaptive', model, data, config, 1, inference)
        wrong = np.argmax(inference(data.eval_data.xs[:20], 0), 1) != data.eval_data.ys[:20]
        changed = (attack(0, 20).numpy() != data.eval_data.xs[:20]).any((1, 2, 3))
        assert wrong.any() and (changed == ~wrong).all()


def test_in_a_shared_batch_the_whole_mixture_is_judged(learned, small_config):
    """Each run either improves what the batch answers as a whole, or is dropped."""
    model, data = learned
    config = small_config(num_eval_examples=20, shaping_batch_size=50, inference_shaping_ratio=9,
                          epsilon=3.)
    shaped = make_inference(model, 'bn_shaping', data, config)
    part, = shaped.parts(20)
    drawn = shaped.drawn(part, shaped.known(0))[None]
    y = data.eval_data.ys[:20]
    batch = apgd.Batch(shaped, data.eval_data.xs[:20], y, drawn)
    counts = [np.sum(np.argmax(shaped(batch.x_adv, 0), 1) == y)]
    attack = apgd.APGDAttack(shaped.logits, ['xent'], 3., 5)
    for run in range(3):
        before = batch.x_adv.copy()
        wrong = np.argmax(shaped(before, 0), 1) != y
        batch.attack(attack, 'xent', (0, run), 1)
        assert run == 0 or (batch.x_adv[wrong] == before[wrong]).all()  # they keep their pixels
        counts.append(np.sum(np.argmax(shaped(batch.x_adv, 0), 1) == y))
    assert (np.diff(counts) <= 0).all() and counts[-1] < counts[0]


@pytest.mark.parametrize('mode', INFERENCE_MODES)
def test_apgd_through_an_inference_lowers_what_it_answers(small_model, small_config, data, mode):
    config = small_config(num_recordings=5, eot_draws=4, apgd_num_steps=10, num_eval_examples=20)
    inference = make_inference(small_model, mode, data, config)
    attack, settings = make_attack('apgd_eot', small_model, data, config, 1, inference)
    labels = data.eval_data.ys[:20]
    def losses(x):
        return apgd.xent_loss(inference(x, 0), labels).numpy()
    assert (losses(attack(0, 20)) > losses(data.eval_data.xs[:20])).all()
    assert ('eot_draws' in settings) == inference.is_random


def test_other_samples_are_none_of_those_that_any_draw_uses(small_model, data):
    shaped = ShapedInference(small_model, data.train_data.xs, 8, 45, 5)
    def ids(draw):
        return {int(i) for i in draw(3, 40)}
    queries = [4, 4 + DRAW]
    used = ids(shaped.known(4)) | ids(shaped.known(4 + DRAW))
    for query in queries:
        others = ids(shaped.other(queries, query))
        assert len(others) == 40 and not others & used
    with pytest.raises(UserError, match='5 draws of 40 clean samples .* 200 .* at most 4'):
        shaped.other([1, 2, 3, 4, 5], 1)


def test_shaped_attacks_leave_the_moving_averages_alone_and_stay_in_the_ball(small_model, data):
    shaped = ShapedInference(small_model, data.train_data.xs, 4, 10, 0)
    before = [v.numpy().copy() for v in small_model.variables]
    images, labels = data.eval_data.xs[:4], data.eval_data.ys[:4]
    part = shaped.parts(4)[0]
    drawn = np.stack([shaped.drawn(part, shaped.known(query)) for query in (0, 1)])
    part = slice(part.start, part.end)
    x_adv = AdaptivePGD(shaped, 8., 3, 4., True, 'xent').perturb(
        images[part], labels[part], (0, 0), drawn)
    images = images[part]
    assert 7 < np.abs(x_adv - images).max() <= 8
    assert all((a == b.numpy()).all() for a, b in zip(before, small_model.variables))


def test_apgd_eot_draws_afresh_at_every_step_and_not_what_the_inference_draws(
        small_model, small_config, data, monkeypatch):
    seen = []
    original = ShapedInference.logits
    def logits(self, images, drawn):
        tf.py_function(lambda numbers: seen.append(numbers.numpy()[0].tolist()), [drawn], [])
        return original(self, images, drawn)
    monkeypatch.setattr(ShapedInference, 'logits', logits)
    config = small_config(shaping_batch_size=10, inference_shaping_ratio=9, apgd_num_steps=3,
                          eot_draws=4, num_eval_examples=1)
    attack, settings = make_attack('apgd_eot', small_model, data, config)
    attack(0, 1)
    steps = [tuple(draw) for draw in seen]
    # Two losses, each three steps and the start; then what is kept under the same fresh draws
    assert len(steps) == 2 * 4 * 4 + 2 * 5 * 4 and settings['eot_draws'] == 4
    assert len(set(steps[:32])) == 32
    assert all(steps[i:i + 4] == steps[32:36] for i in range(32, len(steps), 4))
    assert not set(steps[32:36]) & set(steps[:32])
    shaped = make_inference(small_model, 'bn_shaping', data, config)
    assert tuple(shaped.known(0)(0, 9)) not in set(steps)


def test_what_is_kept_stands_in_order_of_strength():
    """Of five values, one sample: fewer right draws first, then the higher loss."""
    kept, shares, losses = np.zeros([3, 1], np.float32), np.ones([3, 1]), np.zeros([3, 1])
    for number, (share, loss) in enumerate(
            [(0.5, 1.), (1., 9.), (0.5, 2.), (0., 0.), (0.5, 3.)], 1):
        weaker = (share < shares) | ((share == shares) & (loss > losses))
        kept, shares, losses = (
            apgd.inserted(tf.constant([value], old.dtype), tf.constant(old), weaker).numpy()
            for value, old in ((number, kept), (share, shares), (loss, losses)))
    assert kept[:, 0].tolist() == [4, 5, 3]


@pytest.mark.parametrize('make', [
    lambda inference: AdaptivePGD(inference, 8., 2, 2., True, 'xent'),
    lambda inference: apgd.APGDAttack(inference.logits, ['xent'], 8., 2)])
def test_a_deep_network_and_a_full_batch_are_attacked_again_and_again(madry_model, make):
    """TensorFlow's optimizer once made of a sum what fails at the second call."""
    inference = Inference(madry_model, 'pn')
    attack, images = make(inference), RNG.uniform(0, 255, [100, 32, 32, 3]).astype(np.float32)
    drawn = NOTHING_DRAWN[0] if isinstance(attack, AdaptivePGD) else NOTHING_DRAWN
    more = [] if isinstance(attack, AdaptivePGD) else ['xent']
    first, second = (np.asarray(attack.perturb(images, np.zeros(100), (0, 0), drawn, *more))
                     for _ in range(2))
    assert (first == second).all()


@pytest.mark.parametrize('loss_func', ['xent', 'dlr'])
def test_apgd_raises_its_loss_above_what_pgd_reaches(madry_model, golden, loss_func):
    """The original's network, population norms, five steps each, epsilon 2."""
    images, labels = golden['images'].astype(np.float32), golden['labels']
    def logits(x):
        return madry_model(x, training=False)
    def losses(x):
        return apgd.LOSSES[loss_func](logits(x), labels, None).numpy()
    x_adv, = apgd.APGDAttack(lambda x, drawn: logits(x), [loss_func], 2., 5).perturb(
        images, labels, (0, 0), NOTHING_DRAWN, loss_func)
    pgd = LinfPGDAttack(madry_model, 2., 5, 0.5, True, 'xent', training=False)
    assert losses(x_adv).mean() > losses(images).mean() + 0.1
    assert losses(x_adv).mean() > losses(pgd.perturb(images, labels, 0)).mean() - 0.02


def test_where_cw_finds_nothing_the_image_comes_back_as_it_is(linear):
    """foolbox's C&W returns black there; on this model black is of another class."""
    _, images, labels, _ = linear
    def stubborn(x, training=True, **_):
        """The labels, whatever the image, except that a black one is of another class."""
        black = tf.cast(tf.reduce_all(x == 0, axis=[1, 2, 3]), tf.int64)
        return tf.one_hot((labels[:len(x)] + black) % 3, 3) + 0 * tf.reduce_sum(x)
    attack, _ = minimum_norm_attack('cw', stubborn, images, labels)
    assert np.argmax(stubborn(np.zeros([6, 32, 32, 3], np.float32)), 1).tolist() != labels.tolist()
    assert (attack(0, 6).numpy() == images).all()


def test_squares_shrink_as_autoattack_has_it():
    """fra31/auto-attack, square.py: p_selection and the side in `attack_single_run`, 5,000."""
    sides = square.square_sizes(5000)
    assert sides[0] == 29 and sides[5:8].tolist() == [29, 20, 20]
    assert sides[-1] == 1 and (np.diff(sides) <= 0).all()


def test_square_closes_in_on_the_optimum_without_a_gradient(linear):
    """Logits linear in the means of the colours: it goes more than half the way to the corner."""
    model, images, labels, _ = linear
    images, n = images.astype(np.float32), len(images)
    weights = np.array([[1, -1], [-1, 1], [.5, -.5]], np.float32)

    def logits(x, drawn):
        return tf.reduce_mean(x, [1, 2]) @ weights
    y = np.zeros(n, int)
    attack = square.SquareAttack(logits, 4., 1000)
    x_adv = attack.perturb(images, y, (0, 0), np.zeros([1, 1, 0], np.int32)).numpy()
    assert np.abs(x_adv - images).max() <= 4
    def lead(x):
        z = logits(x, None).numpy()
        return z[:, 0] - z[:, 1]
    corner = images - 4 * np.sign(weights[:, 0] - weights[:, 1])
    assert (lead(images) - lead(x_adv) > 0.5 * (lead(images) - lead(corner))).all()


def test_square_asks_again_where_images_share_norms(linear):
    """Else an image keeps a loss that it had beside squares that others took back, and stops."""
    _, images, _, _ = linear
    images, y = images.astype(np.float32), np.zeros(len(images), int)
    wish = np.resize([[1.], [-1.]], [len(images), 1]).astype(np.float32)  # some want green
    asked = []

    def logits(x, drawn):
        colours = tf.reduce_mean(x, [1, 2])
        lead = colours[:, :1] + 2 * wish * tf.reduce_mean(colours[:, 1])
        tf.py_function(lambda: asked.append(0), [], [])
        return tf.concat([lead, -lead], axis=1)

    left = {}
    for again in (False, True):
        attack = square.SquareAttack(logits, 4., 500, asks_again=again)
        x_adv = attack.perturb(images, y, (0, 0), np.zeros([1, 1, 0], np.int32))
        left[again] = float(tf.reduce_mean(logits(x_adv, None)[:, 0]))
    assert len(asked) == (500 + 1) + (2 * 500 - 1 + 1)
    assert left[True] < left[False] - 1, left


def test_square_is_not_stopped_by_a_lucky_draw(linear):
    """Draws move the margin by more than all squares together: it comes as far as without them."""
    _, images, _, _ = linear
    images, y = images.astype(np.float32), np.zeros(len(images), int)

    def logits(x, drawn):
        lead = tf.reduce_mean(x[..., :1], [1, 2]) + drawn
        return tf.concat([lead, -lead], axis=1)

    left = {}
    for noise in (0., 100.):
        drawn = noise * np.random.default_rng(0).normal(size=[500, 1, 1]).astype(np.float32)
        x_adv = square.SquareAttack(logits, 4., 500, asks_again=True).perturb(
            images, y, (0, 0), drawn)
        left[noise] = float(tf.reduce_mean(x_adv[..., 0]))
    assert left[100.] == pytest.approx(left[0.], abs=0.1)
    assert left[0.] < images[..., 0].mean() - 2


def test_square_meets_a_fresh_draw_at_every_square(small_model, small_config, data, monkeypatch):
    seen = []
    original = ShapedInference.logits
    def logits(self, images, drawn):
        tf.py_function(lambda numbers: seen.append(tuple(numbers.numpy()[0])), [drawn], [])
        return original(self, images, drawn)
    monkeypatch.setattr(ShapedInference, 'logits', logits)
    config = small_config(shaping_batch_size=10, inference_shaping_ratio=9, square_queries=7,
                          num_eval_examples=1)
    attack, settings = make_attack('square', small_model, data, config)
    attack(0, 1)
    assert len(seen) == settings['queries'] == 2 * 7 - 1 and len(set(seen)) == 7
    assert settings['norms'] == 'bn_shaping'
    shaped = make_inference(small_model, 'bn_shaping', data, config)
    assert tuple(shaped.known(0)(0, 9)) not in seen
