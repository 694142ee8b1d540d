"""The attack: agreement with the original, its ball, its tail mask."""
import numpy as np
import pytest
import tensorflow as tf

from pgd_attack import LinfPGDAttack


@pytest.mark.parametrize('loss_func', ['xent', 'cw'])
@pytest.mark.parametrize('norms', ['bn', 'pn'])
def test_gradients_and_images_agree_with_the_original(madry_model, golden, norms, loss_func):
    attack = LinfPGDAttack(madry_model, 8, 10, 2, False, loss_func, training=norms == 'bn')
    x_nat = tf.cast(golden['images'], tf.float32)
    gradient = attack.gradient(x_nat, golden['labels']).numpy()[:8].ravel()
    theirs = golden[f'{norms}_grad_{loss_func}'].astype(np.float32).ravel()
    cosine = gradient @ theirs / np.linalg.norm(gradient) / np.linalg.norm(theirs)
    assert cosine > 0.9999
    x_adv = attack.perturb(golden['images'], golden['labels'], seed=0).numpy()
    expected = golden['images'] + golden[f'{norms}_pgd10_{loss_func}_delta'].astype(np.float32)
    # Batch norms are sums over the batch, whose order depends on the number of threads: on one core
    # ten steps turn the sign of some more gradients near zero
    assert np.mean(x_adv == expected) >= (0.99 if norms == 'pn' else 0.9)


def test_the_graph_does_what_a_plain_numpy_loop_does(small_model, batch):
    x_nat, y = batch[0].astype(np.float32), batch[1]
    attack = LinfPGDAttack(small_model, 8, 5, 3, True, 'xent', training=False)
    x = LinfPGDAttack(small_model, 8, 0, 3, True, 'xent').perturb(x_nat, y, seed=(3, 4)).numpy()
    for _ in range(5):
        x = x + np.float32(3) * np.sign(attack.gradient(tf.constant(x), y).numpy())
        x = np.clip(np.clip(x, x_nat - 8, x_nat + 8), 0, 255)
    x_adv = attack.perturb(x_nat, y, seed=(3, 4)).numpy()
    assert np.mean(np.abs(x_adv - x) < 1e-3) > 0.999


def test_a_configuration_makes_the_attack_that_it_describes(small_model, small_config, batch):
    config = small_config(epsilon=6., num_steps=3, step_size=3., random_start=False, loss_func='cw')
    ours = LinfPGDAttack.from_config(small_model, config).perturb(*batch, seed=0).numpy()
    expected = LinfPGDAttack(small_model, 6, 3, 3, False, 'cw').perturb(*batch, seed=0).numpy()
    assert (ours == expected).all()
    by_xent = LinfPGDAttack(small_model, 6, 3, 3, False, 'xent').perturb(*batch, seed=0).numpy()
    assert (ours != by_xent).mean() > 0.01


def test_examples_stay_in_the_ball_and_in_the_pixel_range(small_model, batch):
    attack = LinfPGDAttack(small_model, 8, 7, 5, True, 'cw')
    x_adv = attack.perturb(*batch, seed=1).numpy()
    assert x_adv.min() >= 0 and x_adv.max() <= 255
    assert np.abs(x_adv - batch[0].astype(np.float32)).max() <= 8


def test_random_start_follows_from_the_seed_and_fills_the_ball(small_model, batch):
    attack = LinfPGDAttack(small_model, 8, 0, 2, True, 'xent')
    start = attack.perturb(*batch, seed=5).numpy()
    assert (start == attack.perturb(*batch, seed=5).numpy()).all()
    assert (start != attack.perturb(*batch, seed=6).numpy()).mean() > 0.9
    inner = (batch[0] >= 8) & (batch[0] <= 247)
    offset = (start - batch[0])[inner]
    assert abs(offset.mean()) < 0.2 and offset.std() == pytest.approx(16 / np.sqrt(12), rel=0.05)


@pytest.mark.parametrize('random_start', [True, False])
def test_only_the_tail_is_attacked_and_the_head_is_unchanged_bit_for_bit(
        small_model, batch, random_start):
    tail = np.arange(16) >= 12
    attack = LinfPGDAttack(small_model, 8, 3, 2, random_start, 'xent')
    x_adv = attack.perturb(*batch, seed=0, tail=tail).numpy()
    assert x_adv[~tail].tobytes() == batch[0][~tail].astype(np.float32).tobytes()
    assert (x_adv[tail] != batch[0][tail]).mean() > 0.9


def test_the_clean_head_takes_part_in_the_batch_norms(small_model, batch):
    """Eq. 5: the gradient is that of the whole batch; another head, another attack on the tail."""
    tail = np.arange(16) >= 12
    other = batch[0].copy()
    other[~tail] = 255 - other[~tail] // 2
    attack = LinfPGDAttack(small_model, 8, 1, 2, False, 'xent', update_population_norms=False)
    a, b = (attack.perturb(x, batch[1], 0, tail).numpy()[tail] for x in (batch[0], other))
    assert (a != b).mean() > 0.01


def test_attack_steps_move_the_moving_averages_only_where_the_training_asks(small_model, batch):
    def moved(**arguments):
        before = small_model.variables_by_name['unit_last/BatchNorm/moving_mean'].numpy().copy()
        LinfPGDAttack(small_model, 8, 1, 2, False, 'xent', **arguments).perturb(*batch, seed=0)
        return (small_model.variables_by_name['unit_last/BatchNorm/moving_mean'].numpy()
                != before).any()
    assert not moved()
    assert not moved(training=False, update_population_norms=True)
    assert moved(update_population_norms=True)


def test_cw_loss_is_the_originals_margin(small_model):
    logits = np.array([[1., 5., 2.], [80., 0., 3.], [0., 0., 7.]], np.float32)
    attack = LinfPGDAttack(small_model, 8, 1, 2, False, 'cw')
    expected = -(max(0, 1 - 5 + 50) + max(0, 80 - 3 + 50) + max(0, 7 - 0 + 50))
    assert float(attack.loss(tf.constant(logits), tf.constant([0, 0, 2]))) == expected


def test_unknown_loss_is_refused(small_model):
    with pytest.raises(ValueError, match='margin'):
        LinfPGDAttack(small_model, 8, 1, 2, False, 'margin')
