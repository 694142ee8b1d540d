"""Auto-PGD on one draw after another: whoever may send an image again meets another draw."""
import numpy as np

from attacks.apgd import Batch, through_known_draws
from shaping import Unfit


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

    def attack_part(images, labels, drawn, attack, runs, seed):
        x_adv, is_fooled = images.astype(np.float32), np.zeros(len(images), bool)
        for number, of_draw in enumerate(drawn):
            if is_fooled.all():
                break
            batch = Batch(inference, images, labels, of_draw[None])
            batch.start_from(attack, x_adv, is_fooled)
            batch.run(attack, runs, (seed[0] + number, seed[1]))
            x_adv, is_fooled = batch.x_adv, batch.judged[1] == 0
        return x_adv

    return through_known_draws(inference, data, config, num_draws, attack_part)
