"""Our attack beside that of a public library, on the same model and samples."""
import foolbox
import numpy as np
import tensorflow as tf

from attacks import make_attack
from cifar10_input import CIFAR10Data
from pgd_attack import LinfPGDAttack
from second_opinion import foolbox_attack, pgd_eot, under_fresh_draws
from shaping import make_inference


def test_foolboxs_pgd_makes_the_same_images(madry_model, golden):
    x_nat, y = tf.cast(golden['images'], tf.float32), tf.constant(golden['labels'])
    ours = LinfPGDAttack(madry_model, 8, 10, 2, False, 'xent', training=False).perturb(x_nat, y, 0)
    theirs = foolbox.attacks.LinfPGD(abs_stepsize=2, steps=10, random_start=False)
    fmodel = foolbox.TensorFlowModel(lambda x: madry_model(x, training=False), bounds=(0, 255),
                                     device='/CPU:0')
    _, x_adv, _ = theirs(fmodel, x_nat, y, epsilons=8)
    assert np.mean(ours.numpy() == x_adv.numpy()) >= 0.99


def test_foolboxs_fgsm_makes_the_same_images(madry_model, golden, small_config):
    x_nat, y = tf.cast(golden['images'], tf.float32), tf.constant(golden['labels'])
    images = golden['images'], golden['labels'].astype(int)
    attack, _ = make_attack('fgsm', madry_model, CIFAR10Data(images, images, list('0123456789')),
                            small_config(num_eval_examples=len(y)))
    ours = attack(0, len(y))
    theirs = foolbox.attacks.LinfFastGradientAttack(random_start=False)
    fmodel = foolbox.TensorFlowModel(lambda x: madry_model(x, training=False), bounds=(0, 255),
                                     device='/CPU:0')
    _, x_adv, _ = theirs(fmodel, x_nat, y, epsilons=16)
    assert np.mean(ours.numpy() == x_adv.numpy()) >= 0.99


def test_foolboxs_pgd_over_draws_makes_the_same_images_where_all_draws_are_equal(
        small_model, small_config, data):
    """One recording: each of three fresh draws is that one, so only the sums differ."""
    config = small_config(num_recordings=1, num_steps=5, eot_draws=3, random_start=False)
    inference = make_inference(small_model, 'bn_recorded', data, config)
    images, labels = data.eval_data.xs[:10], data.eval_data.ys[:10]
    ours = pgd_eot(inference, images, labels, config)(0, 10)
    theirs = foolbox_attack('pgd_eot', under_fresh_draws(inference, 0), config)(
        tf.cast(images, tf.float32), tf.constant(labels))
    assert np.mean(ours.numpy() == theirs.numpy()) >= 0.99
    assert np.abs(ours.numpy() - images).max() == 8
