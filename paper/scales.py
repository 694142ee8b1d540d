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

SCALES = (1, 255)  # pixels lie in [0, scale]
MAX_EXAMPLES = 500
NUM_CW_EXAMPLES = 100  # of them; C&W needs up to 5,000 gradients an image
FGSM = ((0.3, 1), (0.3, 255), (16., 255))  # epsilon, scale: CleverHans's default; the paper's
HEADER = ['training', 'attack', 'pixels in', 'accuracy under `pn`', 'images moved',
          'their median L2 on [0, 1]', 'paper, `pn`']
NOTE = """\
C&W and DeepFool with CleverHans v2.1's defaults, made and judged with `pn`. An image on which the
attack finds nothing is not moved. FGSM with CleverHans's default epsilon, 0.3, at both scales, and
with the paper's: 16 on [0, 1] would make every pixel black or white."""


def scale_rows(config, evaluations):
    """Returns accuracy under C&W, DeepFool and FGSM with the same numbers at both scales."""
    rows, n = [], min(MAX_EXAMPLES, config['num_eval_examples'])
    for adversary, table in PAPER_TABLES.items():
        for mode in MODES:
            name = name_of(Training(adversary, mode), config)
            shown = {attack: formats.percent(table[mode][attack][INFERENCES.index('pn')])
                     for attack in table[mode]}
            for attack, most in (('cw', NUM_CW_EXAMPLES), ('deepfool', n)):
                for scale in SCALES:
                    result = result_of(at_scale(evaluations[name], attack, scale, min(n, most)),
                                       'pn')
                    l2 = result['median_l2']
                    rows.append([f'`{name}`', attack, f'[0, {scale}]', formats.accuracy(result, n),
                                 f'{result["num_fooled"]} of {result["num_examples"]}',
                                 '' if l2 is None else f'{l2:.3f}', shown[attack]])
            for epsilon, scale in FGSM:
                result = result_of(evaluations[name].attack(
                    'fgsm', ('pn',), num_eval_examples=n, fgsm_epsilon=epsilon * 255 / scale), 'pn')
                rows.append([f'`{name}`', f'fgsm, epsilon {epsilon:g}', f'[0, {scale}]',
                             formats.accuracy(result, n), '', '', shown['fgsm']])
    return rows


def at_scale(of_training, name, scale, n):
    """Returns the evaluation under C&W or DeepFool on pixels of [0, scale], judged by pn.

    Args:
        of_training: an Evaluations. n: on how many images, from the first.
    """
    config = {**of_training.config, 'num_eval_examples': n, 'num_attack_examples': {}}

    def compute(unfinished):
        model, data = of_training.load(), of_training.data
        attack = minimum_norm_attack(name, model, *eval_examples(data, config), scale)
        results, _, in_ball = evaluate_attack(
            name, attack, data, config, make_judges(model, data, config, ['pn']), 1, unfinished)
        return kept_of(results, in_ball)

    return of_training.get(f'{name}-scale-{scale}', {**relevant(config, name), 'scale': scale},
                           compute)
