"""How numbers are shown in the tables: percent, points, intervals, Markdown."""
from doubts import all_transferred, first_of_all, shares_norms
from paper.cells import result_of, right_in_draws
from paper.intervals import paired_difference


def percent(value):
    """Returns '57.1'."""
    return f'{100 * value:.1f}'


def share(value, interval):
    """Returns '57.1 [55.3, 58.9]': a share and its interval in percent."""
    low, high = interval
    return f'{percent(value)} [{percent(low)}, {percent(high)}]'


def accuracy(result, n=None):
    """Returns '57.1 [55.3, 58.9]': accuracy and interval in percent; and how many where not n.

    Behind it 't': the examples were made under other norms than those that judge them; 's': on all
    images of a batch at once, which share the norms. A worst case has a 't' where all of its
    attacks have one, an 's' where one of them has.
    """
    few = result['num_examples'] < (n or 0)
    mark = ' s' if shares_norms(result) else ' t' if all_transferred(result) else ''
    return (share(result['accuracy'], result['interval']) + mark
            + (f' (n = {result["num_examples"]})' if few else ''))


def difference(value, interval):
    """Returns '+7.1 [+5.3, +8.9]': a difference of accuracies and its interval, in points."""
    low, high = interval
    return f'{100 * value:+.1f} [{100 * low:+.1f}, {100 * high:+.1f}]'


def against(ours, theirs):
    """Returns two cells: how far clean and robust accuracy are from another training's, in points.

    Args:
        ours, theirs: (clean, robust), which samples were right, as paired_difference takes them;
            of a different number, the first ones are compared. theirs is None where the other is
            not stored. Both cells are '' then, and in the other's own row.
    """
    if theirs is None or theirs is ours:
        return ['', '']
    return [difference(*paired_difference(*first_of_all(*both))) for both in zip(ours, theirs)]


def pn_and_shaping(evaluation, n):
    """Returns three cells: accuracy judged by pn, by bn_shaping, and their difference.

    Args:
        n: on how many examples the table's numbers are; fewer are marked.
    """
    gain = paired_difference(*(right_in_draws(evaluation, inference)
                               for inference in ('bn_shaping', 'pn')))
    return [*(accuracy(result_of(evaluation, inference), n)
              for inference in ('pn', 'bn_shaping')), difference(*gain)]


def markdown(header, rows):
    """Returns a Markdown table. header: a list of words. rows: lists of what stands below them."""
    lines = [header, ['---'] * len(header), *rows]
    return '\n'.join('| ' + ' | '.join(map(str, line)) + ' |' for line in lines)
