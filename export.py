"""Exports a trained model with its recordings: a SavedModel that needs neither Keras nor our code.

    python export.py --model_dir DIR                   # newest checkpoint, to DIR/exported
    python export.py --checkpoint PREFIX --output DIR
    python export.py --model_dir DIR --inference pn    # by population norms: nothing is drawn
    python export.py --model_dir DIR --format onnx     # needs tf2onnx: pip install tf2onnx
    python export.py --model_dir DIR --format weights  # for eval.py, classify.py and the original

What is exported is the inference bn_recorded: weights, and the statistics of num_recordings times
recorded_samples clean training images, but no image. Where recordings lie beside the weights, as in
weights/, they are taken, and no data set is needed. A request is answered for each image by a
recording drawn for it alone; no seed is stored, so no two processes draw the same. In Python:

    classify = tf.saved_model.load(DIR)
    answer = classify(images)                     # [b, 32, 32, 3], uint8 or float32, in [0, 255]
    answer['label'], answer['probabilities'], answer['logits']
    classify(images, num_votes=20)['votes']       # how many of 20 recordings answer each class
    classify(images, recording=answer['recording'])          # the same answer again

`weights` are the checkpoint without velocities, config.json and the recordings: a folder like those
under weights/. classify.py needs no data set for it.

Beside the model stands card.json: the training, its digest, accuracies, the threat model, the
input. Its accuracies are those in MODEL_DIR/eval/results.json of this very checkpoint, so first

    python eval.py --model_dir DIR --inference bn_recorded --attack clean,pgd,adaptive,apgd_eot

or, of released weights, those on the card beside them.
"""
import copy
import json
import os
import shutil
import sys
from typing import NamedTuple

from absl import flags

from config import (ONNX_MODEL, PRECISIONS, SAVED_MODEL, begin, config_from_flags,
                    define_model_flags, load_config, of_training, store_config)
from running.program import run

if __name__ == '__main__':  # before TensorFlow is imported: help and mistakes take no time
    define_model_flags()
    flags.DEFINE_string('output', None, 'Folder that is made. Default: MODEL_DIR/exported.')
    flags.DEFINE_enum('format', 'savedmodel', ['savedmodel', 'onnx', 'weights'],
                      'What is written.')
    flags.DEFINE_enum('inference', 'bn_recorded', ['bn_recorded', 'pn'],
                      'The inference that is exported.')
    begin(__doc__)

import running.quiet  # noqa: F401
import numpy as np
import tensorflow as tf

from cifar10_input import CIFAR10Data, load_data
from model import build_model, find_checkpoint, network_name
from running import UserError, brief, optional
from running.devices import leave_gpus
from running.files import replacing
from running.outputs import without_deprecations
from running.resume import in_one_line
from running.results import check_writable, provenance, read_results
from running.unfinished import checkpoint_digest, data_digest, file_digest
from running.untrusted import map_array, read_json
from shaping import Inference, RecordedInference, form_of

FORMATS = {'savedmodel': SAVED_MODEL, 'onnx': ONNX_MODEL, 'weights': 'checkpoint'}
AT_ONCE = 250  # images in one pass: a bound on memory, not on a request
CARD = 'card.json'
RECORDINGS = '.recordings.npy'  # behind the checkpoint's prefix
TEMPORARY, FORMER = '.tmp', '.former'  # behind the folder's name, while one export replaces another
WRITTEN = {*FORMATS.values(), CARD, 'variables', 'assets', 'fingerprint.pb', 'config.json'}


def main():
    # The checkpoint and the output: fail now, not after the recordings
    config, form, mode = config_from_flags(), flags.FLAGS.format, flags.FLAGS.inference
    checkpoint = find_checkpoint(config, flags.FLAGS.checkpoint, flags.FLAGS.select)
    trained = config_beside(checkpoint)
    if form == 'weights':
        check_same_training(config, trained, checkpoint)
        if mode == 'pn':
            raise UserError('--format weights is for every inference; expected no --inference')
    output = os.path.normpath(flags.FLAGS.output or os.path.join(config['model_dir'], 'exported'))
    folder = os.path.abspath(output)
    check_output(folder, checkpoint)
    if form == 'onnx':
        config['precision'] = 'float32'  # the weights are; ONNX Runtime has no CPU kernels else
        find_converter()

    # The model and its norms
    leave_gpus(config)
    digest = checkpoint_digest(checkpoint)
    served = load_served(config, checkpoint, mode, flags.FLAGS.download)
    if checkpoint_digest(checkpoint) != digest:
        raise UserError(f'{checkpoint} was written anew meanwhile, by its training; the same '
                        'command starts again')

    # Write the model and its card, beside the folder, then in its place
    origin = {'checkpoint': checkpoint, 'step': served.step, 'checkpoint_digest': digest[:16],
              'data': data_digest(served.data)[:16] if served.data else None}
    card = make_card(config, trained, served, origin, form)
    temporary, former = folder + TEMPORARY, folder + FORMER
    shutil.rmtree(temporary, ignore_errors=True)
    os.makedirs(temporary)
    with in_one_line(folder):
        if form == 'onnx':
            save_onnx(served.inference, os.path.join(temporary, FORMATS[form]))
        elif form == 'weights':
            card |= save_weights(served.inference, {**config, 'model_dir': output}, served.step,
                                 temporary)
        else:
            save(served.inference, len(served.names), temporary)
    with replacing(os.path.join(temporary, CARD)) as f:
        json.dump(card, f, indent=1)
    shutil.rmtree(former, ignore_errors=True)
    if os.path.exists(folder):
        os.replace(folder, former)
    os.replace(temporary, folder)
    shutil.rmtree(former, ignore_errors=True)
    print(f'Checkpoint {checkpoint}, step {served.step}: written to {output}')
    if not card['results']:
        print(f'{CARD} has no accuracies: no row of eval.py --inference {mode} is of this '
              'checkpoint with these recordings, precision and images', file=sys.stderr)
    elif not card['robust_accuracy']:
        print(f'{CARD} has no robust accuracy: Auto-PGD through the norms that answer was not run '
              'on this checkpoint, or a flag says that it failed; expected eval.py --attack '
              f'adaptive --inference {mode} before', file=sys.stderr)


def check_same_training(config, trained, checkpoint):
    """Raises UserError where a configuration is not that of the training, but for the precision.

    It is written beside the weights, which are float32 in any precision.
    """
    if trained is None:
        raise UserError(f'no config.json lies beside {checkpoint}, and --format weights writes the '
                        "training's beside the weights; expected it there, or another --format")
    for key, value in of_training(trained).items():
        if value != config[key] and key != 'precision':
            raise UserError(f'{key} is {config[key]}, and {checkpoint} was trained with {value}: '
                            'the configuration is written beside the weights; expected '
                            f'--model_dir {os.path.dirname(checkpoint)}, {key} not set')


def check_output(folder, checkpoint):
    """Raises UserError unless the folder can be written, and holds nothing but a former export.

    Nor may it hold the checkpoint that is exported, or be the working folder: it would be removed.
    What lies beside it under the names that are used on the way is looked at, too.
    """
    check_writable(os.path.join(folder, CARD), 'a folder that can be written, --output DIR')
    in_use = os.path.realpath(folder) in map(os.path.realpath, (os.path.dirname(checkpoint),
                                                               os.curdir))
    for place in (folder, folder + TEMPORARY, folder + FORMER):
        names = os.listdir(place) if os.path.isdir(place) else []
        written = all(name in WRITTEN or name.startswith('checkpoint-') for name in names)
        finished = place == folder + TEMPORARY or CARD in names  # a kill may have left a part
        if (os.path.islink(place) or os.path.isfile(place) or in_use
                or names and not (written and finished)):
            raise UserError(f'{place} holds something else than an exported model; expected '
                            'another folder, --output DIR')


# ---- what is exported


class Served(NamedTuple):
    """A checkpoint as it is served."""
    inference: Inference
    names: list  # of the classes
    step: int
    data: CIFAR10Data | None  # None: it was not needed
    card: dict   # the one beside released weights, else {}


def load_served(config, checkpoint, mode, download=False):
    """Returns a checkpoint with the inference `mode`, bn_recorded or pn, a Served.

    Its norms are recorded now, unless `--format weights` wrote them beside it.

    Raises:
        UserError: what is beside it is not what `--format weights` wrote.
    """
    path, card, data = f'{checkpoint}{RECORDINGS}', {}, None
    if os.path.exists(path):
        card = card_beside(checkpoint, config)
        names = card['classes']
    else:
        data = load_data(config, download)
        names = list(data.label_names)
    model = build_model(config, len(names))
    step = model.load_madry_checkpoint(checkpoint)
    if mode == 'pn':
        inference = Inference(model, 'pn')
    elif card:
        samples = (config_beside(checkpoint) or config)['recorded_samples']
        if config['recorded_samples'] != samples:
            raise UserError(f'recorded_samples is {config["recorded_samples"]}, but {path} are of '
                            f'{samples} training images each; expected no other number')
        inference = RecordedInference(
            model, read_recordings(model, path, config['num_recordings']),
            config['inference_shaping_ratio'], config['np_random_seed'])
    else:
        print(f'{checkpoint}: recording {config["num_recordings"]} times '
              f'{config["recorded_samples"]} training images', file=sys.stderr, flush=True)
        inference = RecordedInference.from_config(model, data, config)
    return Served(inference, names, step, data, card)


class Classifier(tf.Module):
    """The inference bn_recorded with its recordings, or pn, as TensorFlow functions.

    Called with (images, num_votes=1, recording=[]): see `answer`. Under pn, what is said of
    recordings is said of one: the population norms.

    Args:
        inference: a RecordedInference, or an Inference by pn. num_classes: of its logits.
    """

    def __init__(self, inference, num_classes):
        super().__init__()
        self.num_classes = num_classes
        self.num_recordings = 1 if inference.mode == 'pn' else inference.num_recordings
        self.logits = inference.logits
        once, unknown = tf.constant(1), tf.zeros([0], tf.int32)

        def classify(images, num_votes=once, recording=unknown):
            return self.answer(images, num_votes, recording)

        self.__call__ = tf.function(classify)

    def answer(self, images, num_votes, recording):
        """Returns the answers to a request, a dict of tensors.

        Args:
            images: [b, 32, 32, 3], pixels in [0, 255].
            num_votes: by how many recordings each image is classified, 1 to num_recordings.
            recording: int32 [b], the number of each image's first recording; the votes go through
                it and those that follow. [0]: drawn, for each image on its own.

        Returns:
            logits [b, classes], means over the votes; probabilities, likewise; votes [b, classes],
            how many answer each class; label [b], the class of most votes, among equals the more
            probable one; recording [b], with which the same request gets the same answer.

        Raises:
            InvalidArgumentError (when it runs): pixels that are NaN, infinite or not in [0, 255],
            or other arguments than these.
        """
        images, b = tf.cast(images, tf.float32), tf.shape(images)[0]
        given, n = tf.size(recording), self.num_recordings
        checks = [  # no comparison holds for NaN
            tf.debugging.Assert(tf.reduce_all((images >= 0) & (images <= 255)), [
                'images must be finite numbers in [0, 255]']),
            tf.debugging.Assert((num_votes >= 1) & (num_votes <= n), [
                'num_votes must be 1 to', n, 'and is', num_votes]),
            tf.debugging.Assert((given == 0) | (given == b), [
                'recording must hold a number for each image, or none']),
            tf.debugging.Assert(tf.reduce_all((recording >= 0) & (recording < n)), [
                'recording must hold numbers from 0, below', n])]
        with tf.control_dependencies(checks):
            # The raw op, its seeds zero: others take up what seed is set where this is traced
            drawn = tf.raw_ops.RandomUniformInt(shape=[b], minval=0, maxval=n, seed=0, seed2=0)
            first = tf.cond(given > 0, lambda: recording, lambda: drawn)
            images = tf.identity(images)
        logits = probabilities = tf.zeros([b, self.num_classes])
        votes = tf.zeros([b, self.num_classes], tf.int32)
        for vote in tf.range(num_votes):
            z = self._in_parts(images, (first + vote) % n)
            logits += z / tf.cast(num_votes, tf.float32)
            probabilities += tf.nn.softmax(z) / tf.cast(num_votes, tf.float32)
            votes += tf.one_hot(tf.argmax(z, 1), self.num_classes, dtype=tf.int32)
        label = tf.argmax(tf.cast(votes, tf.float32) + 0.5 * probabilities, 1, tf.int32)
        return {'logits': logits, 'probabilities': probabilities, 'label': label, 'votes': votes,
                'recording': first}

    def _in_parts(self, images, drawn):
        """Returns the logits of images, AT_ONCE at a time."""
        shape, b = [*images.shape[:1], self.num_classes], tf.shape(images)[0]
        one_more = tf.cast(b == 0, tf.int32)  # TensorFlow's kernels fail on an empty batch
        images = tf.pad(images, [[0, one_more], [0, 0], [0, 0], [0, 0]])
        drawn = tf.pad(drawn, [[0, one_more]])
        parts = tf.TensorArray(tf.float32, size=0, dynamic_size=True, infer_shape=False,
                               element_shape=[None, self.num_classes])
        for i in tf.range(-(-(b + one_more) // AT_ONCE)):
            part = slice(i * AT_ONCE, (i + 1) * AT_ONCE)
            parts = parts.write(i, self.logits(images[part], drawn[part]))
        return tf.ensure_shape(parts.concat()[:b], shape)


def save(inference, num_classes, folder):
    """Writes a SavedModel of bn_recorded or pn; see this file's top, and docs/export.md."""
    classifier = Classifier(inference, num_classes)
    votes = (tf.TensorSpec([], tf.int32, 'num_votes'),
             tf.TensorSpec([None], tf.int32, 'recording'))
    float_images, byte_images = (tf.TensorSpec([None, 32, 32, 3], dtype, 'images')
                                 for dtype in (tf.float32, tf.uint8))
    of_floats = classifier.__call__.get_concrete_function(float_images, *votes)
    classifier.__call__.get_concrete_function(byte_images, *votes)
    classifier.weights = list(of_floats.variables)  # stored are those of an attribute
    once, unknown = tf.constant(1), tf.zeros([0], tf.int32)
    classifier.in_full = tf.function(  # of a concrete function, no defaults would be stored
        lambda images, num_votes=once, recording=unknown:
        classifier.__call__(images, num_votes, recording), input_signature=[float_images, *votes])
    alone = tf.function(lambda images: classifier.__call__(images))
    tf.saved_model.save(classifier, folder, {
        'serving_default': alone.get_concrete_function(float_images),
        'serving_uint8': alone.get_concrete_function(byte_images),
        'serving_votes': classifier.in_full})


def find_converter():
    """Returns tf2onnx. Raises UserError: it is not installed."""
    return optional('tf2onnx', '--format onnx needs tf2onnx')


def save_onnx(inference, path):
    """Writes an ONNX model: (images float32 [b, 32, 32, 3], recording int32 [b]) -> a dict, below.

    Which recording answers is up to the caller: draw it, evenly, for each image of a request. Under
    pn there is no such input.
    """
    constant = copy.copy(inference)
    inputs = [tf.TensorSpec([None, 32, 32, 3], tf.float32, 'images')]
    if inference.mode != 'pn':
        inputs.append(tf.TensorSpec([None], tf.int32, 'recording'))
        # tf2onnx would make inputs of tensors
        constant.recordings = {name: [values.numpy() for values in pair]
                               for name, pair in inference.recordings.items()}

    def classify(images, recording=None):
        logits = constant.logits(images, recording)
        return {'logits': logits, 'probabilities': tf.nn.softmax(logits),
                'label': tf.argmax(logits, 1, tf.int32)}

    find_converter().convert.from_function(tf.function(classify), inputs, opset=17,
                                           output_path=path)


# ---- weights


def save_weights(inference, config, step, folder):
    """Writes a checkpoint that the original can restore, its recordings and its configuration.

    Returns:
        {entry of the card: digest} of the two files, which are known by them.
    """
    prefix = os.path.join(folder, f'checkpoint-{step}')
    with without_deprecations():
        inference.model.save_madry_checkpoint(prefix, global_step=step)
    write_recordings(inference.recordings, f'{prefix}{RECORDINGS}')
    with replacing(os.path.join(folder, FORMATS['weights'])) as f:
        f.write(f'model_checkpoint_path: "checkpoint-{step}"\n')
    paths = {'data_path': load_config()['data_path']}  # the data may lie elsewhere where it is read
    store_config({**config, **paths}, os.path.join(folder, 'config.json'))
    return digests_of(prefix)


def write_recordings(recordings, path):
    """Writes recordings as a .npy file, float32 [num_recordings, 2 * all channels].

    The means and the variances of each normalization stand side by side, in the network's order.
    """
    with replacing(path, 'wb') as f:
        np.save(f, np.concatenate([values for pair in recordings.values() for values in pair], 1))


def read_recordings(model, path, num_recordings):
    """Returns the recordings that write_recordings wrote for this network.

    Raises:
        UserError: the file holds no recordings of this network.
    """
    table, of_one_image = map_array(path), model.record(tf.zeros([1, 32, 32, 3]))
    sizes = [len(values) for pair in of_one_image.values() for values in pair]
    if table.ndim == 2 and len(table) != num_recordings:
        raise UserError(f'num_recordings is {num_recordings}, and {path} holds {len(table)}; '
                        'expected no other number')
    if table.dtype != np.float32 or table.shape != (num_recordings, sum(sizes)):
        raise UserError(f'{path} holds an array {list(table.shape)} of {table.dtype}; expected '
                        f'float32 [{num_recordings}, {sum(sizes)}]')
    parts = [tf.constant(part) for part in np.split(table, np.cumsum(sizes)[:-1], axis=1)]
    if not all(np.isfinite(part).all() for part in parts) or any(
            (variances < 0).numpy().any() for variances in parts[1::2]):
        raise UserError(f'{path} holds no statistics; expected finite means, variances from 0')
    return dict(zip(of_one_image, zip(parts[::2], parts[1::2])))


# ---- its card


def config_beside(checkpoint):
    """Returns the configuration that a training stored beside its checkpoint, or None."""
    path = os.path.join(os.path.dirname(checkpoint), 'config.json')
    return load_config(path) if os.path.isfile(path) else None


def card_beside(checkpoint, config):
    """Returns the card beside released weights, a dict.

    Raises:
        UserError: it names no classes, or is of other weights or other recordings.
    """
    path = os.path.join(os.path.dirname(checkpoint), CARD)
    card = read_json(path)
    try:
        if len(names_on(card)) != (len(config['classes']) if config['classes'] else 10):
            raise TypeError
    except (KeyError, TypeError):
        raise UserError(f'{path} names no such classes; expected what export.py wrote') from None
    for key, digest in digests_of(checkpoint).items():
        if card.get(key, digest) != digest:
            raise UserError(f'{path} has the {key} {brief(card[key])}, and that of {checkpoint} '
                            f'is {digest}; expected the files that export.py wrote together')
    return card


def digests_of(checkpoint):
    """Returns {entry of the card: digest} of released weights and of the recordings beside them.

    The weights' is not that of the training's checkpoint, which holds velocities, too.
    """
    return {'weights_digest': checkpoint_digest(checkpoint)[:16],
            'recordings_digest': file_digest(f'{checkpoint}{RECORDINGS}')[:16]}


def names_on(card):
    """Returns the label names on a card. Raises KeyError or TypeError: it has none."""
    names = card['classes']
    if not isinstance(names, list) or not all(
            isinstance(name, str) and name.isprintable() for name in names):
        raise TypeError
    return names


def make_card(config, trained, served, origin, form):
    """Returns what stands beside the model: training, accuracies, threat model, input; a dict.

    Beside released weights, the accuracies are those of their card, if the inference is the one
    that they are of; `results_precision` says in which precision.

    Args:
        config: of the evaluation. trained: of the training, None if unknown. served: a Served.
    """
    mode = served.inference.mode
    if served.card:
        same_form = form_of(mode, config) == form_of(mode, trained or config)
        rows = rows_on(served.card, mode) if same_form else []
        precision = precision_on(served.card)
    else:
        rows, precision = results_of(config, origin, mode), config['precision']
    clean = max((r for r in rows if r['attack'] == 'clean'),
                key=lambda row: row['num_examples'], default=None)
    robust = min((r for r in rows if is_robust(r, config, mode)), key=worst_first, default=None)
    recorded = mode == 'bn_recorded'
    return {
        'format': form, 'file': FORMATS[form],
        'architecture': f'{network_name(config)}, pre-activation wide ResNet with batch '
                        'normalization',
        'dataset': config['dataset'], 'classes': served.names, **origin,
        'input': input_of(form, served.inference),
        'inference': {'mode': mode, **form_of(mode, config),
                      **({'np_random_seed': config['np_random_seed']} if recorded else {})},
        'threat_model': {
            'norm': 'L-infinity', 'epsilon': config['epsilon'], 'pixels': '[0, 255]',
            'attacker_knows': 'the weights, the recordings, the training images; adaptive also '
                              'which recording a query draws' if recorded else 'the weights',
            'words': 'robust accuracy is at most what the strongest attack that was tried leaves; '
                     'nothing here is a certificate'},
        'clean_accuracy': clean, 'robust_accuracy': robust, 'results': rows,
        'results_from': served.card.get('made_by', 'the card beside the weights')
                        if served.card else 'eval.py',
        'results_precision': precision if rows else None,
        'precision': config['precision'], 'training': trained and of_training(trained),
        'provenance': provenance()}


def input_of(form, inference):
    """Returns what a format's model takes, {name: what it is}."""
    dtype = 'float32' if form == 'onnx' else 'float32 or uint8'
    found = {'images': f'[b, 32, 32, 3], RGB, {dtype}, pixels in [0, 255]; the model standardizes '
                       'each image'}
    if form == 'onnx':
        found['checks'] = 'none: the caller checks pixels and recording'
        if inference.mode != 'pn':
            found['recording'] = (f'int32 [b], 0 to {inference.num_recordings - 1}, which the '
                                  'caller draws for each image')
    return found


def rows_on(card, mode):
    """Returns the rows of an inference on the card beside released weights.

    Raises:
        UserError: the card is not what export.py or tests/cards.py writes.
    """
    try:
        if 'results' in card:
            return card['results'] if card['inference']['mode'] == mode else []
        epsilon = card['epsilon']
        return [{'attack': attack, 'epsilon': None if attack == 'clean' else epsilon, **row}
                for attack, row in card['accuracy'].get(mode, {}).items()]
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f'the card beside the weights has no accuracies: {brief(error)}; expected '
                        'what export.py wrote') from None


def precision_on(card):
    """Returns the precision of the rows on the card beside released weights, None if unknown."""
    training = card.get('training')
    stated = card.get('results_precision') or card.get('precision') or (
        training.get('precision') if isinstance(training, dict) else None)
    return stated if stated in PRECISIONS else None


def results_of(config, origin, mode):
    """Returns the rows that eval.py has of this checkpoint, these images and recordings."""
    folders = dict.fromkeys(map(os.path.abspath, (
        config['model_dir'], os.path.dirname(origin['checkpoint']))))
    same = {'inference': mode, **{key: config[key] for key in ('np_random_seed', 'precision')},
            **form_of(mode, config),
            **{key: origin[key] for key in ('checkpoint_digest', 'data')}}
    shown = ('attack', 'accuracy', 'interval', 'num_examples', 'epsilon', 'norms', 'attacks',
             'num_draws', 'accuracy_all_draws', 'interval_all_draws', 'num_steps', 'flags',
             'unreliable')
    return [{key: row[key] for key in shown if key in row}
            for folder in folders
            for row in read_results(os.path.join(folder, 'eval', 'results.json'))['results']
            if all(row.get(key) == value for key, value in same.items())]


def is_robust(row, config, mode='bn_recorded'):
    """Returns whether a row is of Auto-PGD through the norms that answer, or of several with it.

    What weaker attacks leave, or transferred ones, or those that look for the smallest
    perturbation, is no robust accuracy; nor is what a flag calls unreliable.
    """
    attacks = row.get('attacks', [row['attack']])
    strong = {'adaptive', 'apgd_eot', *(('apgd',) if mode == 'pn' else ())}
    return (row.get('epsilon') == config['epsilon'] and not row.get('unreliable')
            and bool(set(attacks) & strong))


def worst_first(row):
    """Orders rows by the upper ends of their intervals: a few unlucky images do not count."""
    return row['interval'][1], row['attack'] != 'worst in ball'


if __name__ == '__main__':
    run(main)
