"""Auto-PGD on one draw after another: whoever may send an image again meets another draw."""
import numpy as np
import tensorflow as tf

from attacks.apgd import Batch, apgd_settings, loss_funcs_for, make_apgd
from cifar10_input import eval_examples
from shaping import MAX_GRADIENT_IMAGES, Unfit, form_of, queries_of


def retry(inference, data, config, num_draws):
    """Returns `adaptive` on each of the known draws alone, in turn; see attacks.make_attack.

    An image is attacked under the first draw, then, if that answers its example rightly, under the
    second one, and so on; of an image that no draw answers wrongly, the last example is kept. It is
    what an attacker can do who is answered num_draws times, or who chooses the draw, as the caller
    of an export may. So of its results, how many images are right under all draws counts
    (accuracy_all_draws), beside that of `clean`: sent again, an image that nobody changed may meet
    a draw that answers it wrongly, too.

    Raises:
        Unfit: there is but one draw, or images share their norms, and so their draws.
    """
    if inference.coupled or not inference.is_random or num_draws < 2:
        raise Unfit('retry tries one draw after another; expected --num_draws 2 or more, and an '
                    f'inference that draws for each image alone, not {inference.mode}')
    images, labels = eval_examples(data, config)
    runs = [(loss_func, restart) for loss_func in loss_funcs_for(data.num_classes)
            for restart in range(config['num_restarts'])]
    attack = make_apgd(inference, data, config)

    def perturb(start, end):
        draws = [inference.known(query)
                 for query in queries_of(start // config['eval_batch_size'], num_draws)]
        examples = []
        for part in inference.parts(end - start, MAX_GRADIENT_IMAGES):
            a, b = start + part.start, start + part.end
            x, is_fooled = images[a:b].astype(np.float32), np.zeros(b - a, bool)
            for number, draw in enumerate(draws):
                drawn = inference.drawn(part, draw)[None]
                batch = Batch(inference, images[a:b], labels[a:b], drawn)
                xent, share = batch.judge(attack, x)
                batch.x_adv, batch.judged = x, [xent, np.where(is_fooled, 0, share)]
                for i, (loss_func, restart) in enumerate(runs):
                    seed = config['np_random_seed'] + number, len(runs) * a + i
                    batch.attack(attack, loss_func, seed, restart + 1)
                x, is_fooled = batch.x_adv, batch.judged[1] == 0
            examples.append(x)
        return tf.constant(np.concatenate(examples))

    return perturb, {**apgd_settings(data, config), 'num_restarts': config['num_restarts'],
                     'norms': inference.mode, 'num_draws_known': num_draws,
                     **form_of(inference.mode, config),
                     'gradients': len(runs) * (attack.num_steps + 1) * num_draws
                     * inference.number_forward_passes}
