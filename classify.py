"""Classifies images: label, probability, and how many of several recordings agree.

    python classify.py --model models/DIR cat.png           # a training's newest checkpoint
    python classify.py --model models/DIR/exported cat.jpg images.npy
    python classify.py --model DIR --resize photo.jpg

An image is a PNG or JPEG file (read by Pillow) or a .npy file, [32, 32, 3] or [n, 32, 32, 3],
pixels in [0, 255]. The answer is that of the inference bn_recorded: each image is classified by
num_votes recordings, the first drawn for it alone, and gets the class that most of them answer.
What export.py wrote needs no data set, nor do the models under weights/. A training's folder does,
to record the norms first.
"""
import os
import sys

from absl import flags
import numpy as np

from config import begin, config_of_model, define_download_flag
from running import UserError, brief, optional
from running.program import ANY, run
from running.untrusted import map_array, read_json

if __name__ == '__main__':  # before TensorFlow is imported: help and mistakes take no time
    flags.DEFINE_string('model', None, 'Folder that export.py made, or of a training. Default: '
                        'model_dir of the configuration.')
    flags.DEFINE_integer('num_votes', 20, 'Recordings by which each image is classified.')
    flags.DEFINE_boolean('resize', False, 'Shrink or enlarge images of another size to 32 x 32.')
    define_download_flag()
    begin(__doc__, takes_words=True, configuration=config_of_model)

import running.quiet  # noqa: F401
import tensorflow as tf

from cifar10_input import load_data
from export import CARD, RECORDINGS, Classifier, config_beside, read_recordings
from model import build_model, find_checkpoint
from running.devices import leave_gpus
from shaping import RecordedInference

SIZE = 32
PILLOW_FORMATS = ('PNG', 'JPEG')
EIGHT_BIT = ('1', 'L', 'LA', 'P', 'PA', 'RGB', 'RGBA', 'CMYK', 'YCbCr')  # Pillow's modes


def main(paths):
    # The images: fail now, not after the model is loaded
    if not paths:
        raise UserError('no image is named; expected python classify.py IMAGE...')
    named = [one for path in paths for one in read_images(path, flags.FLAGS.resize)]

    # The model
    config = config_of_model()
    classify, num_recordings, label_names = (
        load_trained(config, flags.FLAGS.download) if config
        else load_exported(flags.FLAGS.model))
    num_votes = flags.FLAGS.num_votes
    if not 1 <= num_votes <= num_recordings:
        raise UserError(f'--num_votes must be an integer, 1 to {num_recordings}, the number of '
                        f'recordings, got {num_votes}')

    # Classify
    answer = classify(np.stack([image for _, image in named]), num_votes=tf.constant(num_votes))
    for (name, _), label, probabilities, votes in zip(named, *(
            answer[key].numpy() for key in ('label', 'probabilities', 'votes'))):
        print(f'{name}: {label_names[label]}, probability {probabilities[label]:.2f}, '
              f'{votes[label]} of {num_votes} recordings agree')


# ---- images


def read_images(path, resize):
    """Returns a list of (name, float32 [32, 32, 3]) of the images in a file.

    Args:
        resize: whether an image of another size is resized; else it is refused.

    Raises:
        UserError: no image that can be classified.
    """
    if path.endswith('.npy'):
        array = map_array(path)
        if array.ndim not in (3, 4) or array.shape[-1] != 3 or not array.size:
            raise UserError(f'{path} holds an array {list(array.shape)}; expected [32, 32, 3] or '
                            '[n, 32, 32, 3]')
        if array.dtype.kind not in 'uif':
            raise UserError(f'{path} holds values of type {array.dtype}; expected numbers')
        names = [path] if array.ndim == 3 else [f'{path}[{i}]' for i in range(len(array))]
        images = [array] if array.ndim == 3 else array
    else:
        names, images = [path], [read_picture(path)]
    return [(name, checked(name, image, resize)) for name, image in zip(names, images)]


def read_picture(path):
    """Returns the pixels of a PNG or JPEG file, uint8 [h, w, 3]. Raises UserError."""
    optional('PIL', f'{path}: pictures need Pillow', 'pillow')
    from PIL import Image, ImageOps
    try:
        with Image.open(path, formats=PILLOW_FORMATS) as picture:
            if picture.mode not in EIGHT_BIT:
                raise UserError(f'{path} has pixels of kind {picture.mode}; expected 8 bits a '
                                'colour')
            return np.asarray(ImageOps.exif_transpose(picture).convert('RGB'))
    except FileNotFoundError:
        raise UserError(f'{path} does not exist; expected a PNG, JPEG or .npy file') from None
    except UserError:
        raise
    except Exception as error:  # a damaged file raises nearly anything
        raise UserError(f'{path} cannot be read as PNG or JPEG: {brief(error)}') from None


def checked(name, image, resize):
    """Returns an image as float32 [32, 32, 3], pixels in [0, 255]. Raises UserError."""
    image = np.asarray(image, np.float32)
    h, w = image.shape[:2]
    if not (np.isfinite(image).all() and (image >= 0).all() and (image <= 255).all()):
        raise UserError(f'{name} holds pixels that are no finite numbers in [0, 255]')
    if (h, w) == (SIZE, SIZE):
        return image
    if not resize:
        raise UserError(f'{name} is {w} x {h} pixels; expected {SIZE} x {SIZE}, or --resize')
    return np.clip(tf.image.resize(image, [SIZE, SIZE], 'area').numpy(), 0, 255)


# ---- models


def load_exported(folder):
    """Returns (f(images, num_votes=) -> dict, number of recordings, label names) of an export.

    A SavedModel is a program: load none that you would not run.

    Raises:
        UserError: the folder is not what export.py writes.
    """
    card = read_json(os.path.join(folder, CARD))
    try:
        names, num_recordings = names_on(card), card['inference']['num_recordings']
        if type(num_recordings) is not int:
            raise TypeError
        model = tf.saved_model.load(folder)
        model.__call__  # noqa: B018 - or it is another program's
    except (KeyError, TypeError, AttributeError, OSError, ValueError, tf.errors.OpError) as error:
        raise UserError(f'{folder} cannot be read as a model that export.py wrote: '
                        f'{brief(error)}') from None
    return model, num_recordings, names


def names_on(card):
    """Returns the label names on a card. Raises KeyError or TypeError: it has none."""
    names = card['classes']
    if not isinstance(names, list) or not all(
            isinstance(name, str) and name.isprintable() for name in names):
        raise TypeError
    return names


def load_trained(config, download=False):
    """Returns the same of a training's newest checkpoint.

    Its norms are recorded now, unless `export.py --format weights` wrote them beside it.

    Raises:
        UserError: there is none, or what is beside it is not what export.py writes.
    """
    leave_gpus(config)
    checkpoint = find_checkpoint(config, option='--model')
    recordings = f'{checkpoint}{RECORDINGS}'
    if os.path.exists(recordings):
        names = names_beside(checkpoint, config)
        samples = config_beside(checkpoint, config)['recorded_samples']
        if config['recorded_samples'] != samples:
            raise UserError(f'recorded_samples is {config["recorded_samples"]}, but {recordings} '
                            f'are of {samples} training images each; expected no other number')
        model = loaded(config, checkpoint, len(names))
        inference = RecordedInference(
            model, read_recordings(model, recordings, config['num_recordings']),
            config['inference_shaping_ratio'], config['np_random_seed'])
    else:
        data = load_data(config, download)
        names, model = data.label_names, loaded(config, checkpoint, data.num_classes)
        print(f'{checkpoint}: recording {config["num_recordings"]} times '
              f'{config["recorded_samples"]} training images', file=sys.stderr, flush=True)
        inference = RecordedInference.from_config(model, data, config)
    return Classifier(inference, len(names)).__call__, inference.num_recordings, names


def loaded(config, checkpoint, num_classes):
    """Returns the model of a configuration with the weights of a checkpoint."""
    model = build_model(config, num_classes)
    model.load_madry_checkpoint(checkpoint)
    return model


def names_beside(checkpoint, config):
    """Returns the label names on the card beside released weights. Raises UserError."""
    path = os.path.join(os.path.dirname(checkpoint), CARD)
    try:
        names = names_on(read_json(path))
        if len(names) != (len(config['classes']) if config['classes'] else 10):
            raise TypeError
    except (KeyError, TypeError):
        raise UserError(f'{path} names no such classes; expected what export.py wrote') from None
    return names


if __name__ == '__main__':
    run(main, ANY)
