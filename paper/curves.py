"""The course of each training, by what train.py wrote to log.jsonl."""
import os

from paper import formats
from paper.published import DEFAULT, NATURAL, SHAPED, Training
from paper.trainings import name_of
from running import UserError
from running.resume import LOG
from running.untrusted import parse_json, read_bytes

SHOWN = Training('pgd', NATURAL), DEFAULT, SHAPED
MAX_BYTES = 64 * 2 ** 20
VALUES = {'accuracy_nat': 'natural', 'accuracy_adv': 'attacked',
          'validation_accuracy': 'held out, natural', 'validation_accuracy_adv': 'held out, PGD'}
HEADER = ['training', 'last step', *VALUES.values()]
NOTE = ('At the last step: one training batch as it is, attacked samples (a mean over the steps '
        'since the report before), and the held-out images, where there are some.')


def read_log(folder):
    """Returns {key of VALUES: [[step, value], ...]} of a training, for a JSON file.

    All are empty where the folder has no log: released weights have none.

    Raises:
        UserError: the log is damaged.
    """
    path, found = os.path.join(folder, LOG), {key: [] for key in VALUES}
    if not os.path.exists(path):
        return found
    try:
        lines = [parse_json(line) for line in read_bytes(path, MAX_BYTES).decode().splitlines()]
        for line in lines:
            for key in VALUES:
                if line.get(key) is not None:
                    found[key].append([int(line['step']), float(line[key])])
    except (KeyError, ValueError, TypeError, AttributeError, RecursionError):
        raise UserError(f'{path} is damaged; expected a JSON object a line') from None
    return found


def courses(config, evaluations):
    """Returns {name: what read_log found} of the trainings that have a log, or had one.

    Raises:
        UserError: a folder of stored evaluations holds none.
    """
    found, kept = {}, False
    for training in SHOWN:
        of_training = evaluations[name_of(training, config)]
        folder = of_training.config['model_dir']
        course = of_training.if_kept(of_training.get, 'curves', [],
                                     lambda _, folder=folder: read_log(folder))
        kept |= course is not None
        if course and any(course[key] for key in VALUES):
            found[of_training.name] = course
    if not kept:
        raise UserError('no course of a training is stored')
    return found


def curve_rows(config, evaluations):
    """Returns what each training's log ends with."""
    rows = []
    for name, course in courses(config, evaluations).items():
        last = max(values[-1][0] for values in (course[key] for key in VALUES) if values)
        rows.append([f'`{name}`', last, *(
            formats.percent(course[key][-1][1]) if course[key] else '' for key in VALUES)])
    return rows
