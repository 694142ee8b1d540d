"""Minimum-norm attacks on the population norms: Carlini & Wagner's L2 and DeepFool, by foolbox."""
import tensorflow as tf

from cifar10_input import eval_examples
from running import optional

CLEVERHANS_CW = {'binary_search_steps': 5, 'num_steps': 1000, 'learning_rate': 5e-3,
                 'initial_const': 1e-2, 'confidence': 0, 'abort_early': True}
CLEVERHANS_DEEPFOOL = {'num_steps': 50, 'candidates': 10, 'overshoot': 0.02}


def cw(model, data, config):
    """Returns Carlini & Wagner's L2 attack; see minimum_norm_attack, attacks.make_attack."""
    return minimum_norm_attack('cw', model, *eval_examples(data, config))


def deepfool(model, data, config):
    """Returns the L2 attack DeepFool; see minimum_norm_attack, attacks.make_attack."""
    return minimum_norm_attack('deepfool', model, *eval_examples(data, config))


def minimum_norm_attack(name, model, images, labels, scale=1):
    """Returns foolbox's C&W L2 or DeepFool L2 attack on the population norms, as make_attack does.

    The settings are the defaults of CleverHans v2.1, which the paper used, on the [0, 1] scale,
    for which they are made:
    'cw' (its CarliniWagnerL2): 5 binary search steps, 1,000 iterations, learning rate 5e-3, initial
    constant 1e-2, confidence 0, abort early. 'deepfool' (its DeepFool): 10 candidate classes or all
    there are, overshoot 0.02, 50 iterations.

    What differs from CleverHans, v2.1, each on purpose or by the library:
    - The true labels are used, where CleverHans takes the model's prediction: a sample that is
      wrong already comes back as it is, and cannot become right.
    - A sample on which the attack finds nothing comes back as it is, too (CleverHans's C&W does so;
      its DeepFool returns its last try).
    - foolbox's DeepFool oversteps at every iteration, CleverHans's once, at the end, where it has
      crossed the boundary; against a difference of logits of zero, foolbox adds 1e-4 to the
      distance, CleverHans 1e-5 to the difference.
    - foolbox's C&W looks every 100 iterations whether the loss of the whole batch went down, and
      aborts all or none; CleverHans attacks one sample at a time by default.

    Args:
        scale: the attack works on pixels of [0, scale], with the same numbers. The paper does not
            say which scale it used. On 255, C&W gives up on nearly all images: paper/scales.py.

    Raises:
        UserError: foolbox is not installed.
    """
    foolbox = optional('foolbox', f'the attack {name} needs foolbox')
    settings = CLEVERHANS_CW if name == 'cw' else CLEVERHANS_DEEPFOOL
    foolbox_names = {'num_steps': 'steps', 'learning_rate': 'stepsize'}
    library = (foolbox.attacks.L2CarliniWagnerAttack if name == 'cw'
               else foolbox.attacks.L2DeepFoolAttack)
    attack = library(**{foolbox_names.get(key, key): value for key, value in settings.items()})
    unit = 255 / scale  # in pixels of [0, 255]
    classify = tf.function(lambda x: model(x, training=False))
    graph = tf.function(lambda x: model(unit * x, training=False))
    fmodel = foolbox.TensorFlowModel(graph, bounds=(0, scale), device=device())

    def perturb(start, end):
        x_nat, y = tf.cast(images[start:end], tf.float32), tf.constant(labels[start:end])
        x_adv = unit * attack(fmodel, x_nat / unit, y, epsilons=None)[0]
        right = tf.argmax(classify(x_nat), 1) == y
        fooled = tf.argmax(classify(x_adv), 1) != y
        found = tf.reduce_any(x_adv > 0, axis=[1, 2, 3])  # its C&W returns black where it fails
        return tf.where((right & fooled & found)[:, None, None, None], x_adv, x_nat)

    gradients = settings['num_steps'] * (settings['binary_search_steps'] if name == 'cw'
                                         else settings['candidates'] - 1)
    return perturb, {'epsilon': None, 'norms': 'pn', 'library': f'foolbox {foolbox.__version__}',
                     **settings, **({} if scale == 1 else {'scale': scale}),
                     'gradients': gradients}


def device():
    """Returns the name of the device that TensorFlow runs on: the first GPU, else the CPU."""
    return '/GPU:0' if tf.config.get_visible_devices('GPU') else '/CPU:0'
