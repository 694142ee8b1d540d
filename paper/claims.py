"""What is seen of the paper's claims: our difference on the same samples, and a verdict."""
import math
import textwrap

from attacks import DIRECT
from doubts import first_of_all
from paper import formats
from paper.cells import NUM_DRAWS, right_in_draws
from paper.intervals import FEW_PAIRS, paired_difference
from paper.published import (CLAIMS, CLOSE, INFERENCE_RATIOS, MORE, NO_MORE, NOT_COMPARABLE,
                             SAME, paper_difference)
from paper.trainings import name_of
from running import UserError

SAME_POINTS = 2   # up to which two accuracies count as the same
CLOSE_POINTS = 5  # how far below the best is close to it: the paper's are up to 3.4
# Where a difference must lie, if that is not simply above zero
CLAIMED = {SAME: (-SAME_POINTS / 100, SAME_POINTS / 100),
           NO_MORE: (-math.inf, SAME_POINTS / 100),
           CLOSE: (-CLOSE_POINTS / 100, math.inf)}

HEADER = ['section', 'claim', 'paper', 'ours', 'at this scale']
NOTE = f"""\
Norm shaping is the model with shaping in attack and training, judged by `bn_shaping`; the default
is adversarial-only training, judged by `pn`; unless said otherwise. `pgd`, `fgsm`, `cw` and
`deepfool` are made with `pn`: judged by `bn_shaping` or `bn`, they are transferred.

The verdict depends on the 95% interval of our difference. Seen: the whole interval is on the
claimed side of zero (smaller, larger: and the paper's number is outside it). Contradicted: the
whole interval is on the other side. Not seen: zero is inside, the paper's number is above the
interval. Open: both are inside, so more samples are needed. A number of the paper with > or < is a
bound, as the text says "over 0.93".

Three kinds of claims are about small differences. *Makes no difference*, *as accurate as*:
{SAME_POINTS} points at most, either way. *No better than*, *no worse than*: one-sided, at most
{SAME_POINTS} points. *Close to the best*: {CLOSE_POINTS} points below it at most; the best is
chosen by our numbers on the same images, which favours it a little. Seen: the whole interval is
within this range. Contradicted: the whole interval is outside. Open: otherwise.

The simple mix is taken to be shaping in training alone, judged by `pn`: clean and attacked samples
in one batch, attack and inference as usual. (The paper compares with a mix "like in TRADES", but
its adversarial-only rows are trained on no clean samples.)

The intervals are over test images and, in rows with "{NUM_DRAWS} draws", over the draws of clean
samples that classify the same examples. In other rows there is one draw or none; `adaptive_pgd`
and `adaptive_weak` always have one. Where the two differ on fewer than {FEW_PAIRS} images, the
interval is exact and cautious. Each model is one training, and another seed's may differ by more
(see the table of seeds). About one in twenty intervals of 95% is expected to
miss by chance.

""" + textwrap.fill(f'Claims about `cw` are not comparable: {NOT_COMPARABLE["cw"]}.', 100)


def claim_rows(config, evaluations):
    """Returns the paper's claims: its difference, ours on the same samples, and a verdict.

    Where one of the two attacks was run on fewer samples, the difference is on these. Of stored
    evaluations, the claims that lack one are counted in a last row.

    Raises:
        UserError: all claims lack one.
    """
    rows, lacking = [], 0
    for claim in CLAIMS:  # all are asked for before one is looked into: Ray computes side by side
        for of in (claim.higher, claim.lower, *claim.others):
            evaluation_of(of, config, evaluations)
    for claim in CLAIMS:
        paper, both = paper_difference(claim), right_in_both(claim, config, evaluations)
        if both is None:
            lacking += 1
            continue
        a, b = both
        value, interval = paired_difference(a, b)
        said = ('not comparable' if claim.higher.attack in NOT_COMPARABLE
                else verdict(paper, interval, claim.kind))
        if not paper_shows(paper, claim.kind):
            said += "; the paper's own numbers do not show it"
        rows.append([claim.where, claim.words, paper_words(paper),
                     formats.difference(value, interval) + remarks(a, b, config), said])
    if not rows:
        raise UserError('no claim has both of its numbers stored')
    if lacking:
        rows.append(['', f'{lacking} of the {len(CLAIMS)} claims', '', '', 'not computed'])
    return rows


def right_in_both(claim, config, evaluations):
    """Returns which samples were right in the two accuracies of a claim, bool [draws, n] each.

    Of several that the claim is about, the one that is the best in ours. None where a folder of
    stored evaluations lacks one.
    """
    found = [evaluation_of(of, config, evaluations)
             for of in (claim.higher, claim.lower, *claim.others)]
    if None in found:
        return None
    a, *others = first_of_all(*(
        right_in_draws(evaluation, of.inference, of.inference_ratio)
        for evaluation, of in zip(found, (claim.higher, claim.lower, *claim.others))))
    return a, max(others, key=lambda right: right.mean())


def evaluation_of(of, config, evaluations):
    """Returns the evaluation that a published.Accuracy of ours is in; None where it is lacking."""
    of_training, asked = evaluations[name_of(of.training, config)], [of.attack]
    if of.inference_ratio is not None:
        asked += [(of.inference,), INFERENCE_RATIOS]
    elif of.attack in DIRECT:  # made anew for each inference: for this one alone
        asked += [(of.inference,)]
    return of_training.if_kept(of_training.attack, *asked)


def remarks(a, b, config):
    """Returns ' (n = 50, 5 draws)': what sets a difference apart; '' where nothing does."""
    n, draws = a.shape[1], max(len(a), len(b))
    found = [f'n = {n}'] if n < config['num_eval_examples'] else []
    if draws > 1:
        found.append(f'{draws} draws')
    return f' ({", ".join(found)})' if found else ''


def paper_words(paper):
    """Returns the paper's difference in points, as paper_difference returns it: '> +6.1'."""
    least, most = paper
    if most == math.inf:
        return f'> {100 * least:+.1f}'
    return f'{"< " if least == -math.inf else ""}{100 * most:+.1f}'


def paper_shows(paper, kind):
    """Returns whether the paper's own difference, (least, most), can be what a claim says."""
    low, high = CLAIMED.get(kind, (0, math.inf))
    least, most = paper
    return most > low and least <= high


def verdict(paper, interval, kind=MORE):
    """Returns what our difference's interval says of a claim, in a word or two; see NOTE.

    Args:
        paper: the paper's difference, (least, most). interval: ours. kind: as in published.Claim.
    """
    low, high = interval
    if kind in CLAIMED:
        claimed_low, claimed_high = CLAIMED[kind]
        return ('seen' if claimed_low <= low and high <= claimed_high else
                'contradicted' if low > claimed_high or high < claimed_low else 'open')
    least, most = paper
    if high < 0:
        return 'contradicted'
    if low > 0:
        return 'seen, smaller' if high < least else 'seen, larger' if low > most else 'seen'
    return 'not seen' if high < least else 'open'
