"""Our attack beside that of a public library, on the same model and samples."""
import foolbox
import numpy as np
import tensorflow as tf

from pgd_attack import LinfPGDAttack


def test_foolboxs_pgd_makes_the_same_images(madry_model, golden):
    x_nat, y = tf.cast(golden['images'], tf.float32), tf.constant(golden['labels'])
    ours = LinfPGDAttack(madry_model, 8, 10, 2, False, 'xent', training=False).perturb(x_nat, y, 0)
    theirs = foolbox.attacks.LinfPGD(abs_stepsize=2, steps=10, random_start=False)
    fmodel = foolbox.TensorFlowModel(lambda x: madry_model(x, training=False), bounds=(0, 255),
                                     device='/CPU:0')
    _, x_adv, _ = theirs(fmodel, x_nat, y, epsilons=8)
    assert np.mean(ours.numpy() == x_adv.numpy()) >= 0.99


def test_foolboxs_fgsm_makes_the_same_images(madry_model, golden):
    x_nat, y = tf.cast(golden['images'], tf.float32), tf.constant(golden['labels'])
    ours = LinfPGDAttack(madry_model, 16, 1, 16, False, 'xent', training=False).perturb(x_nat, y, 0)
    theirs = foolbox.attacks.LinfFastGradientAttack(random_start=False)
    fmodel = foolbox.TensorFlowModel(lambda x: madry_model(x, training=False), bounds=(0, 255),
                                     device='/CPU:0')
    _, x_adv, _ = theirs(fmodel, x_nat, y, epsilons=16)
    assert np.mean(ours.numpy() == x_adv.numpy()) >= 0.99
