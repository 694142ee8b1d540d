"""Classifies images: label, probability, and how many of several recordings agree.

    python classify.py --model models/DIR cat.png           # a training's newest checkpoint
    python classify.py --model models/DIR/exported cat.jpg images.npy
    python classify.py --model DIR --resize photo.jpg

An image is a PNG or JPEG file (read by Pillow) or a .npy file, [32, 32, 3] or [n, 32, 32, 3],
pixels in [0, 255]. The answer is that of the inference bn_recorded: each image is classified by
num_votes recordings, the first drawn for it alone, and gets the class that most of them answer.
With --inference pn it is that of the population norms.
What export.py wrote needs no data set, nor do the models under weights/. A training's folder does,
to record the norms first.
"""
import os

from absl import flags
import numpy as np

from config import begin, config_of_model, define_download_flag
from running import UserError, brief, optional
from running.program import ANY, run
from running.untrusted import map_array, read_json

if __name__ == '__main__':  # before TensorFlow is imported: help and mistakes take no time
    flags.DEFINE_string('model', None, 'Folder that export.py made, or of a training. Default: '
                        'model_dir of the configuration.')
    flags.DEFINE_integer('num_votes', None, 'Recordings by which each image is classified. '
                         'Default: 20, or all there are.')
    flags.DEFINE_enum('inference', None, ['bn_recorded', 'pn'], 'The inference that answers. '
                      'Default: bn_recorded, or what was exported.')
    flags.DEFINE_boolean('resize', False, 'Shrink or enlarge images of another size to 32 x 32.')
    define_download_flag()
    begin(__doc__, takes_words=True, configuration=config_of_model)

import running.quiet  # noqa: F401
import tensorflow as tf

from export import CARD, Classifier, load_served, names_on
from model import find_checkpoint
from running.devices import leave_gpus

SIZE = 32
MAX_PIXELS = 2 ** 26   # of a picture: 200 MB once it is read
MAX_IMAGES = 50_000    # of one call: 600 MB
PILLOW_FORMATS = ('PNG', 'JPEG')
EIGHT_BIT = ('1', 'L', 'LA', 'P', 'PA', 'RGB', 'RGBA', 'CMYK', 'YCbCr')  # Pillow's modes


def main(paths):
    # The images: fail now, not after the model is loaded
    if not paths:
        raise UserError('no image is named; expected python classify.py IMAGE...')
    named = []
    for path in paths:
        named += read_images(path, flags.FLAGS.resize, MAX_IMAGES - len(named))

    # The model
    config = config_of_model()
    classify, num_recordings, label_names = (
        load_trained(config, flags.FLAGS.inference or 'bn_recorded', flags.FLAGS.download)
        if config else load_exported(flags.FLAGS.model, flags.FLAGS.inference))
    num_votes = flags.FLAGS.num_votes
    if num_votes is None:
        num_votes = min(20, num_recordings)
    if not 1 <= num_votes <= num_recordings:
        most = f'1 to {num_recordings}, the number of recordings' if num_recordings > 1 else (
            '1, as population norms are one')
        raise UserError(f'--num_votes must be an integer, {most}, got {num_votes}')

    # Classify
    answer = classify(np.stack([image for _, image in named]), num_votes=tf.constant(num_votes))
    for (name, _), label, probabilities, votes in zip(named, *(
            answer[key].numpy() for key in ('label', 'probabilities', 'votes'))):
        agree = f', {votes[label]} of {num_votes} recordings agree' if num_recordings > 1 else ''
        print(f'{name}: {label_names[label]}, probability {probabilities[label]:.2f}{agree}')


# ---- images


def read_images(path, resize, most=MAX_IMAGES):
    """Returns a list of (name, float32 [32, 32, 3]) of the images in a file.

    Args:
        resize: whether an image of another size is resized; else it is refused.
        most: how many are taken at most.

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
        names = [path] if array.ndim == 3 else (f'{path}[{i}]' for i in range(len(array)))
        images = [array] if array.ndim == 3 else array
    else:
        names, images = [path], [read_picture(path, resize)]
    if len(images) > most:
        raise UserError(f'{path} makes it more than {MAX_IMAGES:,} images; expected {MAX_IMAGES:,} '
                        'in one call at most')
    return [(name, checked(name, image, resize)) for name, image in zip(names, images)]


def read_picture(path, resize):
    """Returns the pixels of a PNG or JPEG file, uint8 [h, w, 3]. Raises UserError."""
    optional('PIL', f'{path}: pictures need Pillow', 'pillow')
    from PIL import Image, ImageOps
    try:
        with Image.open(path, formats=PILLOW_FORMATS) as picture:
            if picture.mode not in EIGHT_BIT:
                raise UserError(f'{path} has pixels of kind {picture.mode}; expected 8 bits a '
                                'colour')
            check_size(path, *picture.size, resize)  # before its pixels are unpacked
            return np.asarray(ImageOps.exif_transpose(picture).convert('RGB'))
    except FileNotFoundError:
        raise UserError(f'{path} does not exist; expected a PNG, JPEG or .npy file') from None
    except UserError:
        raise
    except Exception as error:  # a damaged file raises nearly anything
        raise UserError(f'{path} cannot be read as PNG or JPEG: {brief(error)}') from None


def checked(name, image, resize):
    """Returns an image as float32 [32, 32, 3], pixels in [0, 255]. Raises UserError."""
    h, w = image.shape[:2]
    check_size(name, w, h, resize)
    if not (np.isfinite(image).all() and (image >= 0).all() and (image <= 255).all()):
        raise UserError(f'{name} holds pixels that are no finite numbers in [0, 255]')
    image = np.asarray(image, np.float32)
    if (h, w) == (SIZE, SIZE):
        return image
    return np.clip(tf.image.resize(image, [SIZE, SIZE], 'area').numpy(), 0, 255)


def check_size(name, w, h, resize):
    """Raises UserError unless an image has the right size, or one that it may be resized from."""
    if not resize and (w, h) != (SIZE, SIZE):
        raise UserError(f'{name} is {w} x {h} pixels; expected {SIZE} x {SIZE}, or --resize')
    if w * h > MAX_PIXELS:
        raise UserError(f'{name} is {w} x {h} pixels; expected {MAX_PIXELS:,} in all at most')


# ---- models


def load_exported(folder, inference=None):
    """Returns (f(images, num_votes=) -> dict, number of recordings, label names) of an export.

    A SavedModel is a program: load none that you would not run.

    Args:
        inference: which one it must be of; None: any.

    Raises:
        UserError: the folder is not what export.py writes, or is of another inference.
    """
    card = read_json(os.path.join(folder, CARD))
    try:
        names, of_card = names_on(card), card['inference']
        num_recordings = 1 if of_card['mode'] == 'pn' else of_card['num_recordings']
        if type(num_recordings) is not int:
            raise TypeError
        model = tf.saved_model.load(folder)
        model.__call__  # noqa: B018 - or it is another program's
        found = model.signatures['serving_default'].structured_outputs['logits'].shape[-1]
        if found != len(names):
            raise ValueError(f'{CARD} names {len(names)} classes, the model has {found}')
    except (KeyError, TypeError, AttributeError, OSError, ValueError, tf.errors.OpError) as error:
        raise UserError(f'{folder} cannot be read as a model that export.py wrote: '
                        f'{brief(error)}') from None
    if inference not in (None, of_card['mode']):
        raise UserError(f'--inference is {inference}, and {folder} was exported with '
                        f'{of_card["mode"]}; expected no other')
    return model, num_recordings, names


def load_trained(config, inference='bn_recorded', download=False):
    """Returns the same of a training's newest checkpoint; see export.load_served.

    Raises:
        UserError: there is none, or what is beside it is not what export.py writes.
    """
    leave_gpus(config)
    served = load_served(config, find_checkpoint(config, option='--model'), inference, download)
    classifier = Classifier(served.inference, len(served.names))
    return classifier.__call__, classifier.num_recordings, served.names


if __name__ == '__main__':
    run(main, ANY)
