"""Pictures for people: what attacks do to the first test images, and what is answered then."""
import base64

import numpy as np

from config import relevant
from eval import evaluate
from paper.cells import JUDGES
from paper.published import DEFAULT, SHAPED
from paper.trainings import name_of
from report import answer, gallery as grid

ATTACKS = ('clean', 'pgd', 'adaptive', 'deepfool')
SIZE = 32, 32, 3
HEADER = ['training', 'image', 'label', 'examples of', *(f'`{mode}`' for mode in JUDGES)]
NOTE = 'Answers with their probability in %, * where they are wrong.'


def gallery(model, data, config, kept=None):
    """Returns the first examples of some attacks, and what each inference mode answers.

    Under `bn` the images stand in a batch of eval_batch_size.

    Args:
        kept: not used: one batch is soon made.

    Returns:
        what eval.evaluate adds to its samples, JSON: 'names' of the classes; 'labels'; 'images' and
        'examples' {label: ...}, rounded to whole pixels, in base64; 'answers' {label: {mode: [class
        ...]}}, 'probabilities' likewise.
    """
    config = {**config, 'num_eval_examples': config['eval_batch_size'], 'num_attack_examples': {}}
    samples = {}
    evaluate(model, data, config, ATTACKS, JUDGES, samples=samples)
    k = len(samples['clean'][0])
    return {
        'names': list(data.label_names), 'labels': data.eval_data.ys[:k].tolist(),
        'images': as_text(data.eval_data.xs[:k]),
        'examples': {label: as_text(x) for label, (x, _, _) in samples.items()},
        'answers': {label: {mode: answers.tolist() for (mode, _), answers in of.items()}
                    for label, (_, of, _) in samples.items()},
        'probabilities': {label: {mode: sure.tolist() for (mode, _), sure in of.items()}
                          for label, (_, _, of) in samples.items()}}


def as_text(images):
    """Returns images [k, 32, 32, 3] as text."""
    return base64.b64encode(np.rint(images).astype(np.uint8).tobytes()).decode()


def from_text(text):
    """Returns the images that as_text made into text, uint8 [k, 32, 32, 3]."""
    return np.frombuffer(base64.b64decode(text), np.uint8).reshape(-1, *SIZE)


def found(training, config, evaluations):
    """Returns what `gallery` found of a training."""
    of_training = evaluations[name_of(training, config)]
    identity = {**relevant(config), 'attacks': [[a, relevant(config, a)] for a in ATTACKS]}
    return of_training.experiment(gallery, identity, lambda samples: samples)


def gallery_rows(config, evaluations):
    """Returns what each inference mode answers to each example."""
    rows = []
    for training in (DEFAULT, SHAPED):
        of = found(training, config, evaluations)
        for i, y in enumerate(of['labels']):
            for label, answers in of['answers'].items():
                sure = of['probabilities'][label]
                rows.append([
                    f'`{name_of(training, config)}`', i, of['names'][y], label,
                    *(answer(of['names'], answers[mode][i], sure[mode][i], y)
                      if mode in answers else '' for mode in JUDGES)])
    return rows


def draw(training, config, evaluations):
    """Returns the pictures of a training, a matplotlib figure."""
    of = found(training, config, evaluations)
    samples = {label: (from_text(of['examples'][label]), *(
        {(mode, None): np.array(values) for mode, values in of[what][label].items()}
        for what in ('answers', 'probabilities'))) for label in of['examples']}
    return grid(from_text(of['images']), of['labels'], of['names'], samples,
                name_of(training, config))
