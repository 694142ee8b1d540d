"""Our attacks beside public ones: same trained model, same samples, and but for one same budget.

    pip install torch adversarial-robustness-toolbox
    git clone https://github.com/fra31/auto-attack
    python tests/second_opinion.py --model_dir DIR --autoattack auto-attack
    python tests/second_opinion.py --model_dir DIR --inference bn_recorded

Accuracy under ours and theirs, with 95% Wilson intervals; for the minimum-norm attacks also the
median L2 size on [0, 1] of the perturbations that fool the model. `--output FILE` stores them, and
which images were right, as JSON.

With population norms: FGSM and PGD are foolbox's. Square and APGD are AutoAttack's, APGD on
cross-entropy, DLR and targeted DLR, each on what is left. `autoattack` is its standard version as a
whole, with its own budget, as RobustBench runs it, beside `adaptive` as configured. It prints what
each of its four parts finds, has nine targets, and so needs ten classes. C&W and DeepFool, which
are foolbox's in attacks/minimum_norm.py, are those of ART, the Adversarial Robustness Toolbox. With
three classes, AutoAttack's targeted DLR does not exist: both take the target's cross-entropy, which
AutoAttack has but does not use.

With bn_shaping or bn_recorded, every attack meets fresh draws, and the draw that eval.py would use
judges. `pgd_eot`: foolbox's PGD on the mean logits of eot_draws draws, its wrapper for expectation
over transformation; ours is PGD on the sum of their losses. `square`: ART's, which tries as many
squares as ours, needs three queries for each, and has one square for the whole batch.

Random starts and draws differ, so single samples do; the accuracies should not.
"""
import json
import os
import sys
from timeit import default_timer as timer

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from absl import flags  # noqa: E402
import numpy as np  # noqa: E402

from config import choice, config_from_flags, define_model_flags  # noqa: E402
from running import UserError, optional  # noqa: E402
from running.files import replacing  # noqa: E402
from running.program import run  # noqa: E402
import running.quiet  # noqa: E402, F401
import tensorflow as tf  # noqa: E402

from attacks import make_attack, num_examples  # noqa: E402
from attacks.adaptive import AdaptivePGD  # noqa: E402
from attacks.apgd import fresh_draws  # noqa: E402
from attacks.minimum_norm import CLEVERHANS_CW, CLEVERHANS_DEEPFOOL  # noqa: E402
from cifar10_input import eval_examples, load_data  # noqa: E402
from eval import wilson_interval  # noqa: E402
from model import build_model, find_checkpoint  # noqa: E402
from paper.cells import as_digits  # noqa: E402
from pgd_attack import perturbation_fault, pgd_settings  # noqa: E402
from running.results import check_writable, provenance  # noqa: E402
from running.unfinished import checkpoint_digest, data_digest  # noqa: E402
from shaping import FORMS, MAX_GRADIENT_IMAGES, make_inference  # noqa: E402

ATTACKS = ('fgsm', 'pgd', 'deepfool', 'apgd', 'square', 'cw', 'autoattack')  # with `pn`
ATTACKS_WHERE_DRAWN = ('pgd_eot', 'square')
OF_AUTOATTACK = ('apgd', 'square', 'autoattack')  # its repository's; Square is ART's where drawn


def under_fresh_draws(inference, seed):
    """Returns f(x [b, 32, 32, 3]) -> logits, by an inference under new draws at every call."""
    rng = np.random.default_rng([seed, 0, 0, 0, 4])
    graph = tf.function(inference.logits, reduce_retracing=inference.mode != 'bn_shaping')

    def classify(x):
        return tf.concat([
            graph(x[part.start:part.end],
                  tf.constant(inference.drawn(part, inference.fresh(rng))))
            for part in inference.parts(len(x), MAX_GRADIENT_IMAGES)], axis=0)

    return classify


def pgd_eot(inference, images, labels, config):
    """Returns our PGD on the summed losses of eot_draws fresh draws at each step, f(start, end)."""
    pgd = AdaptivePGD(inference, **pgd_settings(config))
    step = tf.function(pgd.step)

    def perturb(start, end):
        rng = np.random.default_rng([config['np_random_seed'], start, 0, 0, 5])
        examples = []
        for part in inference.parts(end - start, MAX_GRADIENT_IMAGES):
            a, b = start + part.start, start + part.end
            x_nat, y = tf.cast(images[a:b], tf.float32), tf.constant(labels[a:b], tf.int64)
            x = pgd.initialize(x_nat, (config['np_random_seed'], a))
            for drawn in fresh_draws(inference, part, rng, config['num_steps'],
                                     config['eot_draws']):
                x = step(x, x_nat, y, None, tf.constant(drawn))
            examples.append(x)
        return tf.concat(examples, axis=0)

    return perturb


def foolbox_attack(name, classify, settings):
    """Returns foolbox's FGSM or PGD, f(x_nat, y) -> x_adv, pixels in [0, 255].

    settings: with eot_draws, the gradient is that of the mean logits of so many calls.
    """
    import foolbox
    fmodel = foolbox.TensorFlowModel(classify, bounds=(0, 255), device='/CPU:0')
    if 'eot_draws' in settings:
        fmodel = foolbox.models.ExpectationOverTransformationWrapper(fmodel, settings['eot_draws'])
    library = (foolbox.attacks.LinfFastGradientAttack(random_start=False) if name == 'fgsm' else
               foolbox.attacks.LinfPGD(abs_stepsize=settings['step_size'],
                                       steps=settings['num_steps'],
                                       random_start=settings['random_start']))
    return lambda x, y: library(fmodel, x, y, epsilons=settings['epsilon'])[1]


def autoattack_attack(name, classify, settings):
    """Returns AutoAttack as a whole, its Square, or its APGD, f(x_nat, y) -> x_adv.

    Its APGD: cross-entropy, DLR, targeted DLR, each on the rest.

    settings: of ours; num_classes beside them.
    """
    import torch
    sys.path.insert(0, flags.FLAGS.autoattack)
    from autoattack import AutoAttack
    from autoattack.autopgd_base import APGDAttack, APGDAttack_targeted
    from autoattack.square import SquareAttack

    @tf.function(reduce_retracing=True)  # batches of all sizes
    def backward(x, upstream):
        with tf.GradientTape() as tape:
            tape.watch(x)
            logits = classify(x)
        return tape.gradient(logits, x, upstream)

    class Logits(torch.autograd.Function):
        """The network as a PyTorch function of images [b, 3, 32, 32] in [0, 1]."""

        @staticmethod
        def forward(ctx, x):
            pixels = tf.constant(255 * x.numpy().transpose(0, 2, 3, 1))
            ctx.pixels = pixels
            return torch.from_numpy(classify(pixels).numpy())

        @staticmethod
        def backward(ctx, upstream):
            gradient = backward(ctx.pixels, tf.constant(upstream.numpy()))
            return torch.from_numpy(255 * gradient.numpy().transpose(0, 3, 1, 2).copy())

    def attack(x_nat, y):
        x = torch.from_numpy(x_nat.numpy().transpose(0, 3, 1, 2) / 255).contiguous()
        labels = torch.from_numpy(y.numpy())
        common = {'eps': settings['epsilon'] / 255, 'seed': 0, 'device': 'cpu'}
        if name == 'autoattack':
            x = AutoAttack(Logits.apply, version='standard', **common).run_standard_evaluation(
                x, labels, bs=len(x))
            return 255 * x.numpy().transpose(0, 2, 3, 1)
        if name == 'square':
            attacks = [SquareAttack(Logits.apply, n_queries=settings['square_queries'], **common)]
        else:
            attacks = [APGDAttack(Logits.apply, n_iter=settings['num_steps'], loss=loss,
                                  n_restarts=settings['num_restarts'], **common)
                       for loss in ('ce', 'dlr')]
            # Ours takes the next target in each restart, theirs all targets
            targeted = APGDAttack_targeted(
                Logits.apply, n_iter=settings['num_steps'], **common,
                n_target_classes=min(settings['num_restarts'], settings['num_classes'] - 1))
            if settings['num_classes'] < 4:
                targeted.dlr_loss_targeted = targeted.ce_loss_targeted
            attacks.append(targeted)
        for one in attacks:
            right = Logits.apply(x).argmax(1) == labels
            if right.any():
                x[right] = one.perturb(x[right], labels[right])
        return 255 * x.detach().numpy().transpose(0, 2, 3, 1)

    return attack


def art_attack(name, classify, num_classes, settings):
    """Returns ART's C&W L2, DeepFool or Square, f(x_nat, y) -> x_adv, pixels in [0, 255]."""
    from art.attacks.evasion import CarliniL2Method, DeepFool, SquareAttack
    from art.estimators.classification import (BlackBoxClassifierNeuralNetwork,
                                               TensorFlowV2Classifier)
    classifier = TensorFlowV2Classifier(
        model=lambda x, training=False: classify(255 * x), nb_classes=num_classes,
        input_shape=(32, 32, 3), clip_values=(0, 1),
        loss_object=tf.keras.losses.CategoricalCrossentropy(from_logits=True))
    if name == 'deepfool':
        library = DeepFool(classifier, max_iter=CLEVERHANS_DEEPFOOL['num_steps'],
                           epsilon=CLEVERHANS_DEEPFOOL['overshoot'], batch_size=100, verbose=False,
                           nb_grads=min(CLEVERHANS_DEEPFOOL['candidates'], num_classes))
    elif name == 'square':
        scores = BlackBoxClassifierNeuralNetwork(
            lambda x: classify(tf.constant(255 * x)).numpy(), (32, 32, 3), num_classes,
            channels_first=False, clip_values=(0, 1))
        library = SquareAttack(scores, max_iter=settings['square_queries'], batch_size=100,
                               eps=settings['epsilon'] / 255, verbose=False)
    else:
        library = CarliniL2Method(
            classifier, confidence=CLEVERHANS_CW['confidence'],
            learning_rate=CLEVERHANS_CW['learning_rate'], max_iter=CLEVERHANS_CW['num_steps'],
            binary_search_steps=CLEVERHANS_CW['binary_search_steps'], batch_size=100,
            initial_const=CLEVERHANS_CW['initial_const'], verbose=False)

    def attack(x_nat, y):
        x_adv = 255 * library.generate(x_nat.numpy() / 255, y=tf.one_hot(y, num_classes).numpy())
        if name == 'square':
            return x_adv
        right = np.argmax(classify(x_nat), 1) == y  # what is wrong already is none of its business
        return np.where(right[:, None, None, None], x_adv, x_nat)

    return attack


def attacks_of(name, model, data, config, inference):
    """Returns (attacks {source: f(start, end) -> x_adv}, settings), ours first."""
    images, labels = eval_examples(data, config)
    if name == 'pgd_eot':
        ours = pgd_eot(inference, images, labels, config)
        settings = {**pgd_settings(config), 'eot_draws': config['eot_draws']}
    else:
        ours, settings = make_attack('adaptive' if name == 'autoattack' else name, model, data,
                                     config, 1, inference)
    classify = (under_fresh_draws(inference, config['np_random_seed']) if inference.is_random else
                tf.function(lambda x: model(x, training=False), reduce_retracing=True))
    if name in ('fgsm', 'pgd', 'pgd_eot'):
        library, public = 'foolbox', foolbox_attack(name, classify, settings)
    elif name in OF_AUTOATTACK and not inference.is_random:
        library, public = 'AutoAttack', autoattack_attack(
            name, classify, {**settings, 'num_classes': data.num_classes})
    else:
        library, public = 'ART', art_attack(name, classify, data.num_classes, settings)

    def theirs(start, end):
        return public(tf.cast(images[start:end], tf.float32), tf.constant(labels[start:end]))

    return {'ours': ours, library: theirs}, settings


def import_libraries(names, drawn):
    """Raises UserError where what the chosen attacks come from is not there."""
    if not drawn and {*OF_AUTOATTACK} & {*names}:
        if not flags.FLAGS.autoattack:
            raise UserError('--autoattack is missing; expected the folder of a clone of fra31/'
                            'auto-attack, or an --attack without apgd, square and autoattack')
        optional('torch', 'AutoAttack needs PyTorch')
        if not os.path.isdir(os.path.join(flags.FLAGS.autoattack, 'autoattack')):
            raise UserError(f'--autoattack {flags.FLAGS.autoattack} holds no folder autoattack; '
                            'expected a clone of fra31/auto-attack')
    if {'cw', 'deepfool', *(('square',) if drawn else ())} & {*names}:
        optional('art', 'C&W, DeepFool and Square need ART', 'adversarial-robustness-toolbox')


def main():
    config = config_from_flags()
    drawn = flags.FLAGS.inference in FORMS
    names = choice('attack', flags.FLAGS.attack, ATTACKS_WHERE_DRAWN if drawn else ATTACKS)

    # The libraries and the output: fail now, not after the first attacks
    import_libraries(names, drawn)
    if flags.FLAGS.output:
        check_writable(flags.FLAGS.output, '--output FILE in a folder that can be written')
        os.makedirs(os.path.dirname(os.path.abspath(flags.FLAGS.output)), exist_ok=True)

    data = load_data(config, flags.FLAGS.download)
    if 'autoattack' in names and data.num_classes < 10:
        raise UserError(f'{data.num_classes} classes are too few for autoattack, whose standard '
                        'version has nine targets; expected ten, or an --attack without it')
    images, labels = eval_examples(data, config)
    model = build_model(config, data.num_classes)
    checkpoint = find_checkpoint(config, flags.FLAGS.checkpoint, flags.FLAGS.select)
    model.load_madry_checkpoint(checkpoint)
    inference = make_inference(model, flags.FLAGS.inference, data, config)

    results = []
    for name in names:
        attacks, settings = attacks_of(name, model, data, config, inference)
        n = num_examples(name, config)
        for source, attack in attacks.items():
            right, sizes, seconds = np.zeros(n, bool), [], 0.
            for start in range(0, n, config['eval_batch_size']):
                end = min(start + config['eval_batch_size'], n)
                query = start // config['eval_batch_size']
                begin = timer()
                x_adv = np.asarray(attack(start, end), np.float32)
                seconds += timer() - begin
                fault = perturbation_fault(images[start:end], x_adv, settings['epsilon'], 1e-2)
                if fault:
                    raise RuntimeError(f'{name}, {source}: {fault}')
                x_nat = images[start:end].astype(np.float32)
                right[start:end] = np.argmax(inference(x_adv, query), 1) == labels[start:end]
                fooled = ~right[start:end] & (
                    np.argmax(inference(x_nat, query), 1) == labels[start:end])
                change = (x_adv - x_nat).reshape(end - start, -1)[fooled]
                sizes += list(np.linalg.norm(change / 255, axis=1))
            low, high = wilson_interval(right.sum(), n)
            results.append({'attack': name, 'source': source, 'inference': inference.mode,
                            'accuracy': float(right.mean()), 'interval': [low, high],
                            'num_examples': n, 'right': as_digits(right),
                            'seconds': round(seconds, 3)})
            size = f', median L2 {np.median(sizes):.4f} of {len(sizes)}' if name in (
                'cw', 'deepfool') and sizes else ''
            print(f'{name:<11}{source:<11}{100 * right.mean():6.2f}% [{100 * low:.2f}, '
                  f'{100 * high:.2f}], n = {n}{size}; {seconds:.0f} s', flush=True)

    if flags.FLAGS.output:
        with replacing(flags.FLAGS.output) as f:
            json.dump({'checkpoint_digest': checkpoint_digest(checkpoint),
                       'data': data_digest(data), 'config': config, 'results': results,
                       'provenance': provenance()}, f)


if __name__ == '__main__':
    define_model_flags()
    flags.DEFINE_string('attack', 'all', f'Comma-separated: {", ".join(ATTACKS)}, or all; where '
                        f'something is drawn: {", ".join(ATTACKS_WHERE_DRAWN)}, or all.')
    flags.DEFINE_enum('inference', 'pn', ['pn', *FORMS], 'What answers, and is attacked.')
    flags.DEFINE_string('autoattack', None, 'Folder of a clone of fra31/auto-attack.')
    flags.DEFINE_string('output', None, 'Write the results to this JSON file.')
    run(main)
