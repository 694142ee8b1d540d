"""The paper's minimum-norm attacks and FGSM on pixels of [0, 1] and on pixels of [0, 255].

CleverHans's settings are made for [0, 1]. C&W minimizes the squared L2 distance plus a constant
times a margin of logits. With pixels of [0, 255] the distance is 65,025 times larger, and constants
of 1e-2 to 1e2 (the search has five steps) are too small for a perturbation to pay. So the paper's
numbers under C&W may be those of an attack that gave up. This shows what each scale leaves under
`pn`, the norms that the attacks go through: nothing is transferred.
"""
from config import relevant
from attacks.minimum_norm import minimum_norm_attack
from cifar10_input import eval_examples
from eval import evaluate_attack, make_judges
from paper import formats
from paper.cells import kept_of, result_of
from paper.published import INFERENCES, MODES, PAPER_TABLES, Training
from paper.trainings import name_of

MAX_EXAMPLES = 500     # of what Tables I and II do not have
NUM_CW_EXAMPLES = 100  # of them; C&W needs up to 5,000 gradients an image
FGSM = ((0.3, 1), (0.3, 255), (16., 255))  # epsilon, scale: CleverHans's default; the paper's
HEADER = ['training', 'attack', 'pixels in', 'images', 'accuracy under `pn`', 'moved',
          'their median L2 on [0, 1]', 'paper, `pn`']
NOTE = """\
C&W and DeepFool with CleverHans v2.1's defaults, made and judged with `pn`; on [0, 1] they are
those of Tables I and II. An image on which the attack finds nothing is not moved. FGSM with
CleverHans's default epsilon, 0.3, at both scales, and with the paper's: 16 on [0, 1] would make
every pixel black or white."""


def scale_rows(config, evaluations):
    """Returns accuracy under C&W, DeepFool and FGSM with the same numbers at both scales."""
    rows, n = [], min(MAX_EXAMPLES, config['num_eval_examples'])
    for adversary, table in PAPER_TABLES.items():
        for mode in MODES:
            of_training = evaluations[name_of(Training(adversary, mode), config)]
            paper = {attack: formats.percent(of_attack[INFERENCES.index('pn')])
                     for attack, of_attack in table[mode].items()}
            for attack, most in (('cw', min(n, NUM_CW_EXAMPLES)), ('deepfool', n)):
                for scale, evaluation in ((1, of_training.attack(attack)),
                                          (255, on_255(of_training, attack, most))):
                    result = result_of(evaluation, 'pn')
                    l2 = result['median_l2']
                    rows.append([f'`{of_training.name}`', attack, f'[0, {scale}]',
                                 result['num_examples'], formats.accuracy(result),
                                 result['num_fooled'], '' if l2 is None else f'{l2:.3f}',
                                 paper[attack]])
            for epsilon, scale in FGSM:
                result = result_of(of_training.attack(
                    'fgsm', ('pn',), num_eval_examples=n, fgsm_epsilon=epsilon * 255 / scale), 'pn')
                rows.append([f'`{of_training.name}`', f'fgsm, epsilon {epsilon:g}', f'[0, {scale}]',
                             result['num_examples'], formats.accuracy(result), '', '',
                             paper['fgsm']])
    return rows


def on_255(of_training, name, n):
    """Returns the evaluation under C&W or DeepFool on pixels of [0, 255], judged by pn.

    Args:
        of_training: an Evaluations. n: on how many images, from the first.
    """
    config = {**of_training.config, 'num_eval_examples': n, 'num_attack_examples': {}}

    def compute(unfinished):
        model, data = of_training.load(), of_training.data
        attack = minimum_norm_attack(name, model, *eval_examples(data, config), scale=255)
        results, found = evaluate_attack(
            name, attack, data, config, make_judges(model, data, config, ['pn']), 1, unfinished)
        return kept_of(results, found.in_ball)

    return of_training.get(f'{name}-scale-255', {**relevant(config, name), 'scale': 255}, compute)
