"""TRADES: its attack against a plain loop, its loss against float64 NumPy."""
import numpy as np
import pytest
import tensorflow as tf

from config import TRAINING_MODES
from conftest import attacked_batch
import train
from trades import TradesAttack, kl_divergence


def log_softmax(logits):
    logits = np.asarray(logits, np.float64)
    return logits - np.log(np.sum(np.exp(logits - logits.max(1, keepdims=True)), 1,
                                  keepdims=True)) - logits.max(1, keepdims=True)


def kl(logits_nat, logits_adv):
    log_p, log_q = log_softmax(logits_nat), log_softmax(logits_adv)
    return np.sum(np.exp(log_p) * (log_p - log_q), axis=1)


def test_divergence_and_its_gradient_are_those_of_float64_numpy():
    rng = np.random.default_rng(0)
    a, b = rng.normal(0, 4, (2, 50, 10))
    a32, b32 = tf.constant(a, tf.float32), tf.constant(b, tf.float32)
    with tf.GradientTape() as tape:
        tape.watch([a32, b32])
        ours = kl_divergence(a32, b32)
    np.testing.assert_allclose(ours, kl(a, b), rtol=1e-4)
    p, q = np.exp(log_softmax(a)), np.exp(log_softmax(b))
    for gradient, expected in zip(tape.gradient(ours, [a32, b32]), (
            p * (log_softmax(a) - log_softmax(b) - kl(a, b)[:, None]), q - p)):
        np.testing.assert_allclose(gradient, expected, atol=1e-4)


@pytest.mark.parametrize('training, tail', [(True, None), (False, None),
                                            (True, np.arange(16) >= 12)])
def test_attack_is_that_of_a_plain_loop(small_model, batch, training, tail):
    """Four steps written out: KL from the natural distributions, sign, ball, [0, 255], tail."""
    x_nat = batch[0].astype(np.float32)
    norms = dict(training=training, update_population_norms=False)
    def attack(num_steps):
        pgd = TradesAttack(small_model, 8., num_steps, 3., True, 'xent', **norms)
        return pgd.perturb(*batch, 5, tail)
    attacked = np.ones(16, bool) if tail is None else tail
    noise = (attack(0).numpy() - x_nat)[attacked]
    assert noise.std() == pytest.approx(0.255, rel=0.01) and abs(noise.mean()) < 0.005
    assert np.mean(np.abs(noise) < 0.255) == pytest.approx(0.6827, abs=0.01)  # it is normal
    logits_nat = small_model(x_nat, **norms)
    for num_steps in range(4):
        x = tf.constant(attack(num_steps))
        with tf.GradientTape() as tape:
            tape.watch(x)
            p = tf.nn.softmax(logits_nat)
            loss = tf.reduce_sum(p * (tf.math.log(p) - tf.nn.log_softmax(small_model(x, **norms))))
        step = x.numpy() + 3 * np.sign(tape.gradient(loss, x).numpy())
        step = np.clip(np.clip(step, x_nat - 8, x_nat + 8), 0, 255)
        expected = np.where(attacked[:, None, None, None], step, x_nat)
        x_adv = attack(num_steps + 1).numpy()
        equal = (x_adv == expected).mean()
        assert equal > 0.97, equal  # signs of tiny gradients turn on rounding
        assert x_adv[~attacked].tobytes() == x_nat[~attacked].tobytes()


def test_the_start_is_finite_whatever_bits_are_drawn(monkeypatch):
    """One in 16 million pixels that is infinite makes a training NaN within a hundred steps."""
    extremes = np.array([-2 ** 31, -2 ** 31 + 1, -1, 0, 1, 2 ** 31 - 2, 2 ** 31 - 1], np.int32)
    monkeypatch.setattr('trades.random_bits', lambda like, seed: tf.constant(extremes))
    for jit in (False, True):
        start = tf.function(TradesAttack(None, 8., 1, 2., True, 'xent').initialize, jit_compile=jit)
        noise = start(tf.zeros(7), None) / 0.255
        np.testing.assert_allclose(noise[:3], -noise[::-1][:3], atol=1e-3)
        assert 5 < float(noise[-1]) < 5.5 and abs(float(noise[3])) < 1e-6


@pytest.mark.parametrize('of', ['attacked', 'natural'])
@pytest.mark.parametrize('mode', TRAINING_MODES)
def test_beta_adds_the_divergence_of_the_attacked_samples(
        small_model, small_config, batch, mode, of):
    """The loss with beta 6, from the logits of two plain forward passes, in float64."""
    config = small_config(training_mode=mode, adversary='trades', trades_beta=6., trades_xent=of)
    x_nat, x, _ = attacked_batch(small_model, config, batch, 0, update_population_norms=False)
    logits_nat, logits = (small_model(v, update_population_norms=False) for v in (x_nat, x))
    xent = -log_softmax(logits_nat if of == 'natural' else logits)[np.arange(16), batch[1]]
    attacked = np.flatnonzero(train.adversarial_tail(config))
    expected = (xent.mean() + 6 * kl(logits_nat, logits)[attacked].sum() / 16
                + config['weight_decay'] * float(small_model.weight_decay_loss()))
    metrics = train.make_train_step(small_model, train.make_optimizer(config), config)(*batch, 0)
    assert float(metrics['loss']) == pytest.approx(expected, rel=1e-5)
    assert ('kl' in metrics) == (mode != 'natural')
    if mode != 'natural':
        assert float(metrics['kl']) > 1e-4


def test_beta_pulls_the_two_distributions_together(small_config, small_model, batch):
    """What beta is for: trained on one batch, a large beta leaves a smaller divergence."""
    start = small_model.get_weights()
    left = {}
    for beta in (0., 20.):
        small_model.set_weights(start)
        config = small_config(training_mode='adv_only', adversary='trades', trades_beta=beta,
                              step_size_schedule=[[0, 0.01]], data_augmentation=False)
        step = train.make_train_step(small_model, train.make_optimizer(config), config)
        for _ in range(15):
            step(*batch, 0)
        x_nat, x, _ = attacked_batch(small_model, config, batch, 0)
        left[beta] = float(tf.reduce_mean(kl_divergence(small_model(x_nat), small_model(x))))
    assert left[20.] < left[0.] / 2
