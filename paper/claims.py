"""What is seen of the paper's claims: our difference on the same samples, and a verdict."""
from paper import formats
from paper.cells import right_of
from paper.intervals import paired_difference
from paper.published import CLAIMS, INFERENCE_RATIOS, paper_accuracy
from paper.trainings import name_of

SAME_POINTS = 0.02  # up to which two accuracies count as the same

HEADER = ['section', 'claim', 'paper', 'ours', 'at this scale']
NOTE = f"""\
Norm shaping is the model with shaping in attack and training, judged by `bn_shaping`; the default
is adversarial-only training, judged by `pn`; unless said otherwise. `pgd`, `fgsm`, `cw` and
`deepfool` are made with `pn`: judged by `bn_shaping` or `bn`, they are transferred.

The verdict depends on the interval of our difference. Seen: the whole interval is on the claimed
side of zero (smaller, larger: and the paper's number is outside it). Contradicted: the whole
interval is on the other side. Not seen: zero is inside, the paper's number is above the interval.
Open: both are inside, so more samples are needed. Where the claim is that there is no difference,
{100 * SAME_POINTS:g} points at most count as none. Seen: the whole interval is within them.
Contradicted: the whole interval is outside. Open: otherwise.

The intervals are over test images alone: each model is one training, and another seed's may differ
by more (see the table of seeds). Of {len(CLAIMS)} intervals of 95%, {round(len(CLAIMS) / 20)} are
expected to miss by chance."""


def claim_rows(config, evaluations):
    """Returns the paper's claims: its difference, ours on the same samples, and a verdict.

    Where one of the two attacks was run on fewer samples, the difference is on these.
    """
    rows = []
    for claim in CLAIMS:
        a, b = (right_in(of, config, evaluations) for of in (claim.higher, claim.lower))
        n = min(len(a), len(b))
        value, interval = paired_difference(a[:n], b[:n])
        paper = paper_accuracy(claim.higher) - paper_accuracy(claim.lower)
        few = f' (n = {n})' if n < config['num_eval_examples'] else ''
        said = verdict(paper, interval, claim.same)
        if not claim.same and paper <= 0:
            said += "; the paper's own numbers do not show it"
        rows.append([claim.where, claim.words, f'{100 * paper:+.1f}',
                     formats.difference(value, interval) + few, said])
    return rows


def right_in(of, config, evaluations):
    """Returns which examples were right in ours of a published.Accuracy, bool [n]."""
    of_training = evaluations[name_of(of.training, config)]
    if of.inference_ratio is None:
        return right_of(of_training.attack(of.attack), of.inference)
    evaluation = of_training.attack(of.attack, (of.inference,), INFERENCE_RATIOS)
    return right_of(evaluation, of.inference, of.inference_ratio)


def verdict(paper, interval, same=False):
    """Returns what our difference's interval says of a claim, in a word or two; see NOTE.

    Args:
        paper: the paper's difference, the accuracy that is claimed to be higher less the other one.
        interval: ours. same: the claim is that there is none: SAME_POINTS at most.
    """
    low, high = interval
    if same:
        return ('seen' if -SAME_POINTS <= low and high <= SAME_POINTS else
                'contradicted' if low > SAME_POINTS or high < -SAME_POINTS else 'open')
    if high < 0:
        return 'contradicted'
    if low > 0:
        return 'seen, smaller' if high < paper else 'seen, larger' if low > paper else 'seen'
    return 'not seen' if high < paper else 'open'
