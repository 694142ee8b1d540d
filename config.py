"""The configuration that all programs share: config.json, --config FILE, --set key=value.

`config.json` holds every key; another file overrides some of them or all; `--set` overrides both.
A configuration is a plain dict, as in the original. SCHEMA below is the one place that knows a key:
what it may hold, and what it is part of.
"""
from collections.abc import Callable
import difflib
import json
import os
import sys
from typing import NamedTuple
import unicodedata

from absl import flags

from running import UserError
from running.files import replacing
from running.program import start
from running.untrusted import parse_json, read_json

BASE = os.path.join(os.path.dirname(os.path.abspath(__file__)), 'config.json')
SAVED_MODEL = 'saved_model.pb'  # TensorFlow's name for an exported model's file
ONNX_MODEL = 'model.onnx'
MAX_INTEGER = 2 ** 31 - 1
TRAINING_MODES = ('natural', 'adv_only', 'shaping_in_training', 'shaping_in_attack_and_training')
ADVERSARIES = ('pgd', 'trades')
ATTACK_NORMS = ('batch', 'fixed')
DISTRIBUTIONS = ('none', 'mirrored', 'multi_worker')
BATCH_NORMS = ('per_replica', 'synchronized')
PRECISIONS = ('float32', 'mixed_bfloat16')
LOSS_FUNCS = ('xent', 'cw')
INFERENCE_MODES = ('bn', 'pn', 'bn_shaping', 'bn_recorded')

flags.DEFINE_string('config', None, 'Configuration file; its keys override those of config.json.')
flags.DEFINE_multi_string('set', [], 'key=value: overrides one key of the configuration.')


def _text(value):
    # no path holds control characters, halves of characters and line breaks, which would not print
    return (isinstance(value, str) and value.strip() != ''
            and not any(unicodedata.category(c) in ('Cc', 'Cs', 'Zl', 'Zp') for c in value))


def _npy_path(value):  # pgd_attack.py writes there: a stranger's file shall not lead to any other
    return _text(value) and value.endswith('.npy')


def _boolean(value):
    return isinstance(value, bool)


def _integer(low, high=MAX_INTEGER):
    def check(value):
        return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high
    return check, f'an integer, {low} to {high}'


def _number(low, high=None, above=False):
    top = sys.float_info.max if high is None else high  # neither infinite nor an int past floats

    def check(value):
        return (isinstance(value, (int, float)) and not isinstance(value, bool)
                and (value > low if above else value >= low) and value <= top)
    return check, (f'a number {"above" if above else "from"} {low}'
                   + (f' to {high}' if high is not None else ''))


def _choice(*values):
    return (lambda value: value in values and isinstance(value, str)), 'one of ' + ', '.join(values)


def _schedule(value):
    step_ok, rate_ok = _integer(0)[0], _number(0, above=True)[0]
    return (isinstance(value, list) and len(value) > 0
            and all(isinstance(pair, list) and len(pair) == 2 and step_ok(pair[0])
                    and rate_ok(pair[1]) for pair in value)
            and value[0][0] == 0
            and all(a[0] < b[0] for a, b in zip(value, value[1:])))


def _classes(value):
    return value is None or (isinstance(value, list) and len(value) >= 2
                             and all(_text(name) for name in value)
                             and len(set(value)) == len(value))


def _num_attack_examples(value):  # attacks.check_names knows the names
    return isinstance(value, dict) and all(map(_integer(1)[0], value.values()))


class Key(NamedTuple):
    """What the schema says of one key of the configuration."""
    check: Callable   # value -> bool
    expected: str     # what it may hold, in words
    part: str         # what it is part of: see PARTS
    attacks: tuple = ()  # where part is 'attack': the names of those attacks
    before: object = None  # of a younger key: the value that all numbers had before there was one


# What a key is part of decides whether it may change when a training is resumed, and whether the
# accuracies of a checkpoint depend on it.
PARTS = {
    'training': 'what is trained, and so every accuracy',
    'devices': 'what is trained: how the devices share it. An evaluation runs on one device',
    'evaluation': 'how, on what and at which step a checkpoint is evaluated',
    'attack': 'the attacks named beside it, and no other accuracy',
    'output': 'neither: where things are, what is reported when, what computes it'}

_SEED = _integer(0)
_PATH = _text, 'the path of a folder'
_FLAG = _boolean, 'true or false'

# In the order of config.json.
SCHEMA = {
    'model_dir': Key(*_PATH, 'output'),
    'data_path': Key(*_PATH, 'output'),
    'tf_random_seed': Key(*_SEED, 'training'),
    'np_random_seed': Key(*_SEED, 'training'),
    'max_num_training_steps': Key(*_integer(1), 'evaluation'),
    'num_output_steps': Key(*_integer(1), 'output'),
    'num_summary_steps': Key(*_integer(1), 'output'),
    'num_checkpoint_steps': Key(*_integer(1), 'output'),
    'training_batch_size': Key(*_integer(2), 'training'),
    'step_size_schedule': Key(
        _schedule, '[step, learning rate] pairs such as [[0, 0.1], [40000, 0.01]]: the first step '
        '0, steps growing, rates above 0', 'training'),
    'weight_decay': Key(*_number(0), 'training'),
    'momentum': Key(*_number(0, 1), 'training'),
    'num_eval_examples': Key(*_integer(1), 'evaluation'),
    'eval_batch_size': Key(*_integer(1), 'evaluation'),
    'eval_on_cpu': Key(*_FLAG, 'output'),
    'epsilon': Key(*_number(0, 255), 'training'),
    'num_steps': Key(*_integer(1), 'training'),
    'step_size': Key(*_number(0, 255), 'training'),
    'random_start': Key(*_FLAG, 'training'),
    'loss_func': Key(*_choice(*LOSS_FUNCS), 'training'),
    'store_adv_path': Key(_npy_path, 'the path of a .npy file', 'output'),
    'training_mode': Key(*_choice(*TRAINING_MODES), 'training'),
    'attack_norms': Key(*_choice(*ATTACK_NORMS), 'training', before='batch'),
    'adversary': Key(*_choice(*ADVERSARIES), 'training'),
    'trades_beta': Key(*_number(0), 'training'),
    'trades_xent': Key(*_choice('attacked', 'natural'), 'training', before='attacked'),
    'shaping_ratio': Key(*_integer(1), 'training'),
    'inference_shaping_ratio': Key(*_integer(0), 'evaluation'),
    'shaping_batch_size': Key(*_integer(2), 'evaluation'),
    'num_recordings': Key(*_integer(1), 'evaluation', before=100),
    'recorded_samples': Key(*_integer(2), 'evaluation', before=90),
    'dataset': Key(*_choice('cifar10', 'synthetic'), 'training'),
    'classes': Key(_classes, 'null, or a list of two or more different label names', 'training'),
    'num_validation_examples': Key(*_integer(0), 'training', before=0),
    'data_augmentation': Key(*_FLAG, 'training'),
    'num_residual_units': Key(*_integer(1), 'training'),
    'width_factor': Key(*_integer(1), 'training'),
    'precision': Key(*_choice(*PRECISIONS), 'training'),
    'xla': Key(*_choice('auto', 'on', 'off'), 'output'),
    'distribution': Key(*_choice(*DISTRIBUTIONS), 'devices'),
    'batch_norms': Key(*_choice(*BATCH_NORMS), 'devices'),
    'fgsm_epsilon': Key(*_number(0, 255), 'attack', ('fgsm',)),
    'apgd_num_steps': Key(*_integer(1), 'attack', (
        'apgd', 'adaptive', 'retry', 'apgd_eot', 'transfer')),
    'num_restarts': Key(*_integer(1), 'attack', ('apgd', 'adaptive', 'retry', 'transfer'),
                        before=1),
    'eot_draws': Key(*_integer(1), 'attack', ('apgd_eot',)),
    'square_queries': Key(*_integer(1), 'attack', ('square',)),
    'transfer_from': Key(lambda value: value == '' or _text(value),
                         'the path of a folder or checkpoint, or "": none', 'output'),
    'num_attack_examples': Key(
        _num_attack_examples, 'an object such as {"cw": 200}: on how many examples, 1 or more, an '
        'attack is run', 'output'),
}
FLOATS = ('weight_decay', 'momentum', 'epsilon', 'step_size', 'trades_beta', 'fgsm_epsilon')


def may_change(key):
    """Returns whether a key may change when a training is resumed: it leaves the training as is."""
    return SCHEMA[key].part not in ('training', 'devices')


def of_training(config):
    """Returns the keys of a configuration that may not change when its training is resumed."""
    return {key: value for key, value in config.items() if not may_change(key)}


def relevant(config, attack=None):
    """Returns the keys of a configuration that the accuracies under an attack depend on, a dict.

    A key at the value that it had before it was a key is left out: stored numbers stay known.

    Args:
        attack: an attack's name, or None: none of those with keys of their own.
    """
    return {key: config[key] for key, known in SCHEMA.items()
            if (known.part in ('training', 'evaluation') or attack in known.attacks)
            and (known.before is None or config[key] != known.before)}


def _shown(value):
    """Returns a value as JSON, shortened where that would be more than a line."""
    try:
        text = json.dumps(value)
    except RecursionError:
        text = f'a deeply nested {type(value).__name__}'
    return text if len(text) <= 200 else text[:200] + '...'


def parse_setting(setting):
    """Returns (key, value) of 'key=value'; the value is JSON, or text where the key wants text."""
    key, equals, text = setting.partition('=')
    if not equals:
        raise UserError(f'--set {setting[:200]!r}: expected key=value')
    try:
        value = parse_json(text)
    except (ValueError, RecursionError):
        return key, text
    check = SCHEMA[key].check if key in SCHEMA else lambda _: True
    return key, text if check(text) and not check(value) else value


def check_config(config):
    """Raises UserError unless every key is known, present and holds a value that can work."""
    for key, value in config.items():
        if key not in SCHEMA:
            near = difflib.get_close_matches(key[:200], SCHEMA, 1, 0.5)
            raise UserError(f'unknown key {key[:200]!r}; '
                            + (f'did you mean {near[0]}?' if near else
                               'docs/configuration.md lists the keys, from model_dir on'))
        if not SCHEMA[key].check(value):
            raise UserError(f'{key} must be {SCHEMA[key].expected}, got {_shown(value)}')
    for key in SCHEMA:
        if key not in config:
            raise UserError(f'{key} is missing; expected {SCHEMA[key].expected}')
    for size, ratio in (('training_batch_size', 'shaping_ratio'),
                        ('shaping_batch_size', 'inference_shaping_ratio')):
        if size == 'training_batch_size' and not config['training_mode'].startswith('shaping'):
            continue
        try:
            check_ratio(config[size], config[ratio])
        except UserError as error:
            raise UserError(
                f'{size} is {config[size]} and {ratio} {config[ratio]}: {error}') from None
    if config['trades_beta'] > 0 and config['adversary'] != 'trades':
        raise UserError(f'trades_beta is {config["trades_beta"]} and adversary '
                        f'{config["adversary"]}, which does not use it; expected adversary trades, '
                        'or trades_beta 0')
    if config['trades_xent'] == 'natural' and config['trades_beta'] == 0:
        raise UserError('trades_xent is natural and trades_beta 0: no attacked image would be '
                        'trained on; expected trades_beta above 0, or trades_xent attacked')
    queries = config['shaping_batch_size'] // (config['inference_shaping_ratio'] + 1)
    if queries > config['eval_batch_size']:
        raise UserError(f'shaping_batch_size is {config["shaping_batch_size"]} and '
                        f'inference_shaping_ratio {config["inference_shaping_ratio"]}: {queries} '
                        'test samples in a batch; expected at most eval_batch_size, '
                        f'{config["eval_batch_size"]}')


def check_ratio(batch_size, ratio):
    """Raises UserError, saying which sizes are possible, unless a batch can be divided n:1."""
    if ratio < 0 or batch_size < 1 or ratio * batch_size % (ratio + 1):
        possible = max(1, batch_size // (ratio + 1)) * (ratio + 1) if ratio >= 0 else 1
        raise UserError(f'a batch of {batch_size} cannot be divided {ratio}:1; expected a multiple '
                        f'of {ratio + 1}, such as {possible} or {possible + ratio + 1}')


def load_config(path=None, settings=(), base=BASE, values=()):
    """Returns the effective configuration, checked: config.json, then the file, then the settings.

    Args:
        path: a configuration file, full or partial, or None.
        settings: 'key=value' strings.
        values: a dict of keys, which override those of the file.

    Raises:
        UserError: a file that cannot be read, an unknown key, a value that cannot work.
    """
    config = read_json(base)
    if path is not None:
        config.update(read_json(path))
    config.update(values)
    for setting in settings:
        key, value = parse_setting(setting)
        config[key] = value
    check_config(config)
    config = {key: config[key] for key in SCHEMA}
    for key in FLOATS:
        config[key] = float(config[key])  # JSON's 8 is 8.0 here, as TensorFlow wants it
    config['step_size_schedule'] = [[step, float(r)] for step, r in config['step_size_schedule']]
    return config


def define_download_flag():
    """Defines --download, of the programs that load the data."""
    flags.DEFINE_boolean('download', False, 'Download CIFAR-10 (160 MB) into data_path where it is '
                         "not there yet. config.json's own data_path needs no --download.")


def define_model_flags():
    """Defines the flags of the programs that take a trained model."""
    define_download_flag()
    flags.DEFINE_string('model_dir', None,
                        'Folder of a training; its own config.json is then used.')
    flags.DEFINE_string('checkpoint', None, 'Prefix of a checkpoint, of this project or of the '
                        "original's. Default: the newest in model_dir.")
    flags.DEFINE_enum('select', 'last', ['best', 'last'], 'Which checkpoint in model_dir: the last '
                      'one, or the best by validation images (num_validation_examples).')


def begin(usage, takes_words=False, configuration=None, **choices):
    """Reads the command line of a program that takes a configuration, and checks it.

    To be called before TensorFlow is imported: a mistake is reported at once. See program.start.

    Args:
        configuration: f() -> the configuration, or None where none is taken. Default:
            config_from_flags.
        choices: the names that a flag may hold, by flag; see choice.
    """
    def check():
        for flag, known in choices.items():
            choice(flag, flags.FLAGS[flag].value, known)
        config = (configuration or config_from_flags)()
        doubt = config and epsilon_doubt(config['epsilon'])
        if doubt:
            print(f'{os.path.basename(sys.argv[0])}: warning: {doubt}', file=sys.stderr, flush=True)

    start(usage, check, SCHEMA, takes_words)


def choice(flag, value, known):
    """Returns the names in a comma-separated flag, 'all' being all of them, in the order known."""
    names = [name.strip() for name in value.split(',')]
    for name in names:
        if name != 'all' and name not in known:
            raise UserError(f'--{flag} is {name!r}; expected {", ".join(known)} or all')
    return [name for name in known if name in names or 'all' in names]


def config_from_flags():
    """Returns the configuration that the command line asks for.

    --model_dir DIR, where a program has it, takes the configuration stored in DIR.
    """
    model_dir = flags.FLAGS.model_dir if 'model_dir' in flags.FLAGS else None
    path, settings = flags.FLAGS.config, flags.FLAGS.set
    if model_dir is not None:
        if path is not None:
            raise UserError('--config and --model_dir each name a configuration; expected one of '
                            'them, with --set for single keys')
        return config_in(model_dir, settings)
    return load_config(path, settings)


def config_in(folder, settings):
    """Returns the configuration of the training in a folder, with that folder as its model_dir.

    Raises:
        UserError: a setting names another model_dir; the configuration cannot work.
    """
    for key, value in map(parse_setting, settings):
        if key == 'model_dir' and os.path.normpath(str(value)) != os.path.normpath(folder):
            raise UserError(f'{folder} and --set model_dir={value} each name a folder; expected '
                            'one of them')
    path = os.path.join(folder, 'config.json')
    if not os.path.isfile(path):
        fault = 'holds no config.json' if os.path.isdir(folder) else 'is no folder'
        raise UserError(f'{folder} {fault}; expected the folder of a training, or one in weights/ '
                        '(eval.py takes a checkpoint alone by --checkpoint)')
    return load_config(path, [*settings, f'model_dir={json.dumps(folder)}'])


def config_of_model():
    """Returns the configuration of the training that --model names; None: it names an export.

    Without --model, that of config_from_flags.

    Raises:
        UserError: --config beside it, --set beside an export, a configuration that cannot work.
    """
    folder, settings = flags.FLAGS.model, flags.FLAGS.set
    if not folder:
        return config_from_flags()
    if flags.FLAGS.config:
        raise UserError('--model and --config each name a configuration; expected one of them')
    if not os.path.isfile(os.path.join(folder, SAVED_MODEL)):
        if os.path.isfile(os.path.join(folder, ONNX_MODEL)):
            raise UserError(f'{folder} is an ONNX export, which classify.py does not run; expected '
                            'a SavedModel, or the folder of a training')
        return config_in(folder, settings)
    if settings:
        raise UserError(f'--set changes nothing in {folder}, which is an exported model; expected '
                        '--model of a training beside it')
    return None


def epsilon_doubt(epsilon):
    """Returns a line that asks whether epsilon is meant on the [0, 1] scale, or None."""
    if epsilon == 0 or epsilon >= 1:
        return None
    pixels = 255 * epsilon
    meant = f'{pixels:.0f}' if pixels >= 1 else f'{pixels:.2g}'
    return (f'epsilon is {epsilon:g}, in pixels of [0, 255]: less than one pixel; if {epsilon:g} '
            f'of [0, 1] is meant, set epsilon={meant}')


def store_config(config, path):
    """Writes a configuration as JSON, a key a line, replacing the file at once."""
    lines = [f'  {json.dumps(key)}: {json.dumps(value)}' for key, value in config.items()]
    with replacing(path) as f:
        f.write('{\n' + ',\n'.join(lines) + '\n}\n')
