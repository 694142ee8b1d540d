"""The configuration that all programs share: config.json, --config FILE, --set key=value.

`config.json` holds every key; another file overrides some of them or all; `--set` overrides both.
A configuration is a plain dict, as in the original. FIELDS below says what each key may hold.
"""
import json
import os
import signal
import stat
import sys
import unicodedata

from absl import app, flags, logging

from files import replacing

# Before Keras and TensorFlow are imported:
os.environ['KERAS_BACKEND'] = 'tensorflow'
os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '2')  # a quiet start

BASE = os.path.join(os.path.dirname(os.path.abspath(__file__)), 'config.json')
MAX_INTEGER = 2 ** 31 - 1
MAX_JSON_BYTES = 2 ** 22  # of a JSON file; config.json has 1,500
STOPPED = 75  # exit status of a training that a signal stopped: EX_TEMPFAIL of sysexits.h
TRAINING_MODES = ('natural', 'adv_only', 'shaping_in_training', 'shaping_in_attack_and_training')
ADVERSARIES = ('pgd', 'trades')
DISTRIBUTIONS = ('none', 'mirrored', 'multi_worker')
ATTACKS = ('clean', 'fgsm', 'pgd', 'cw', 'deepfool', 'shaping', 'adaptive', 'adaptive_weak', 'apgd',
           'apgd_eot', 'random')

flags.DEFINE_string('config', None, 'Configuration file; its keys override those of config.json.')
flags.DEFINE_multi_string('set', [], 'key=value: overrides one key of the configuration.')


class UserError(ValueError):
    """A mistake of the user's, told in one line: what is wrong and what would fit."""


class Terminated(KeyboardInterrupt):
    """SIGTERM, which a cluster sends before it kills: the same as Ctrl-C, but for the status."""


def _terminate(*_):
    raise Terminated


def run(main, names=None):
    """Runs main() as an absl program; a user's mistake ends it with one line and exit status 2.

    Ctrl-C and SIGTERM end it with one line and a shell's usual status, 130 and 143.

    With `names`, the words that the program takes beside its options, it runs main(words given).
    """
    name = os.path.basename(sys.argv[0])

    def guarded(argv):
        logging.set_verbosity(logging.WARNING)
        try:
            for word in argv[1:]:
                if names is None:
                    raise UserError(f'{word!r} is not an option; {name} --help lists them')
                if word not in names:
                    raise UserError(f'{word!r} is none of {", ".join(names)}')
            main() if names is None else main(argv[1:])
        except UserError as error:
            print(f'{name}: {error}', file=sys.stderr)
            sys.exit(2)
        except OSError as error:  # a full disk, a folder that may not be written, ...
            print(f'{name}: {error.filename or "the system"}: {error.strerror or error}',
                  file=sys.stderr)
            sys.exit(2)
        except KeyboardInterrupt as stop:
            print(f'\n{name}: stopped', file=sys.stderr)
            sys.exit(143 if isinstance(stop, Terminated) else 130)

    signal.signal(signal.SIGTERM, _terminate)
    app.run(guarded)


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


def _num_attack_examples(value):
    return isinstance(value, dict) and all(
        name in ATTACKS and _integer(1)[0](n) for name, n in value.items())


SEED = _integer(0)
FOLDER = _text, 'the path of a folder'

# key: (check, what would fit). In the order of config.json.
FIELDS = {
    'model_dir': FOLDER,
    'data_path': FOLDER,
    'tf_random_seed': SEED,
    'np_random_seed': SEED,
    'max_num_training_steps': _integer(1),
    'num_output_steps': _integer(1),
    'num_summary_steps': _integer(1),
    'num_checkpoint_steps': _integer(1),
    'training_batch_size': _integer(2),
    'step_size_schedule': (_schedule, '[step, learning rate] pairs such as [[0, 0.1], [40000, '
                           '0.01]]: the first step 0, steps growing, rates above 0'),
    'weight_decay': _number(0),
    'momentum': _number(0, 1),
    'num_eval_examples': _integer(1),
    'eval_batch_size': _integer(1),
    'eval_on_cpu': (_boolean, 'true or false'),
    'epsilon': _number(0, 255),
    'num_steps': _integer(1),
    'step_size': _number(0, 255),
    'random_start': (_boolean, 'true or false'),
    'loss_func': _choice('xent', 'cw'),
    'store_adv_path': (_npy_path, 'the path of a .npy file'),
    'training_mode': _choice(*TRAINING_MODES),
    'adversary': _choice(*ADVERSARIES),
    'trades_beta': _number(0),
    'shaping_ratio': _integer(1),
    'inference_shaping_ratio': _integer(0),
    'shaping_batch_size': _integer(2),
    'dataset': _choice('cifar10', 'synthetic'),
    'classes': (_classes, 'null, or a list of two or more different label names'),
    'data_augmentation': (_boolean, 'true or false'),
    'num_residual_units': _integer(1),
    'width_factor': _integer(1),
    'precision': _choice('float32', 'mixed_bfloat16'),
    'xla': _choice('auto', 'on', 'off'),
    'distribution': _choice(*DISTRIBUTIONS),
    'batch_norms': _choice('per_replica', 'synchronized'),
    'fgsm_epsilon': _number(0, 255),
    'apgd_num_steps': _integer(1),
    'eot_draws': _integer(1),
    'num_attack_examples': (_num_attack_examples, 'an object such as {"cw": 200}: how many '
                            f'examples, 1 or more, an attack is run on; of {", ".join(ATTACKS)}'),
}


def _shown(value):
    """Returns a value as JSON, shortened where that would be more than a line."""
    try:
        text = json.dumps(value)
    except RecursionError:
        text = f'a deeply nested {type(value).__name__}'
    return text if len(text) <= 200 else text[:200] + '...'


def _pairs(pairs):
    """json.loads's object_pairs_hook: refuses a key given twice, drops the original's _comment."""
    result = {}
    for key, value in pairs:
        if key in result:
            raise UserError(f'the key {key[:200]!r} is given twice')
        if key != '_comment':
            result[key] = value
    return result


def brief(error):
    """Returns what an error says as one printable line: it may quote a stranger's file."""
    text = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
    return ''.join(c if c.isprintable() else '?' for c in text)


def check_plain(path, most=None):
    """Raises UserError unless path is a plain file, of `most` bytes or fewer.

    To be called before a file is opened: a pipe would block for ever, a device may never end.
    """
    try:
        status = os.stat(path)
    except OSError as error:
        raise UserError(f'{path} cannot be read: {error.strerror}') from None
    if stat.S_ISDIR(status.st_mode):
        raise UserError(f'{path} cannot be read: Is a directory')
    if not stat.S_ISREG(status.st_mode):
        raise UserError(f'{path} cannot be read: it is no plain file')
    if most is not None and status.st_size > most:
        raise UserError(f'{path} has {status.st_size:,} bytes; {most:,} at most would fit')


def read_bytes(path, most):
    """Returns the contents of a plain file of `most` bytes or fewer. Raises UserError."""
    check_plain(path, most)
    try:
        with open(path, 'rb') as f:
            return f.read(os.fstat(f.fileno()).st_size)
    except OSError as error:
        raise UserError(f'{path} cannot be read: {error.strerror}') from None


def read_json(path):
    """Returns the dict in a JSON file. Raises UserError, with one line, when there is none."""
    raw = read_bytes(path, MAX_JSON_BYTES)
    try:
        value = json.loads(raw.decode('utf-8'), object_pairs_hook=_pairs)
    except UserError as error:
        raise UserError(f'{path}: {error}') from None
    except (UnicodeDecodeError, RecursionError) as error:
        raise UserError(f'{path} cannot be read: {type(error).__name__}') from None
    except ValueError as error:
        raise UserError(f'{path} is not JSON: {brief(error)}') from None
    if not isinstance(value, dict):
        raise UserError(f'{path} holds {type(value).__name__}; an object of keys would fit')
    return value


def parse_setting(setting):
    """Returns (key, value) of 'key=value'; the value is JSON, or text where the key wants text."""
    key, equals, text = setting.partition('=')
    if not equals:
        raise UserError(f'--set {setting[:200]!r}: key=value would fit')
    try:
        value = json.loads(text, object_pairs_hook=_pairs)
    except (ValueError, RecursionError):
        return key, text
    wants_text = key in FIELDS and FIELDS[key][0](text) and not FIELDS[key][0](value)
    return key, text if wants_text else value


def check_config(config):
    """Raises UserError unless every key is known, present and holds a value that can work."""
    for key, value in config.items():
        if key not in FIELDS:
            raise UserError(f'unknown key {key[:200]!r}; the keys are {", ".join(FIELDS)}')
        check, fits = FIELDS[key]
        if not check(value):
            raise UserError(f'{key} is {_shown(value)}; {fits} would fit')
    for key, (_, fits) in FIELDS.items():
        if key not in config:
            raise UserError(f'{key} is missing; {fits} would fit')
    from shaping import num_clean
    for size, ratio in (('training_batch_size', 'shaping_ratio'),
                        ('shaping_batch_size', 'inference_shaping_ratio')):
        if size == 'training_batch_size' and not config['training_mode'].startswith('shaping'):
            continue
        try:
            num_clean(config[size], config[ratio])
        except ValueError as error:
            raise UserError(
                f'{size} is {config[size]} and {ratio} {config[ratio]}: {error}') from None


def load_config(path=None, settings=(), base=BASE):
    """Returns the effective configuration, checked: config.json, then the file, then the settings.

    Args:
        path: a configuration file, full or partial, or None.
        settings: 'key=value' strings.

    Raises:
        UserError: a file that cannot be read, an unknown key, a value that cannot work.
    """
    config = read_json(base)
    if path is not None:
        config.update(read_json(path))
    for setting in settings:
        key, value = parse_setting(setting)
        config[key] = value
    check_config(config)
    config = {key: config[key] for key in FIELDS}
    for key in ('weight_decay', 'momentum', 'epsilon', 'step_size', 'trades_beta', 'fgsm_epsilon'):
        config[key] = float(config[key])  # JSON's 8 is 8.0 here, as TensorFlow wants it
    config['step_size_schedule'] = [[step, float(r)] for step, r in config['step_size_schedule']]
    return config


def define_model_flags():
    """Defines the flags of the programs that take a trained model."""
    flags.DEFINE_string('model_dir', None,
                        'Folder of a training; its own config.json is then used.')
    flags.DEFINE_string('checkpoint', None, 'Prefix of a checkpoint, of this project or of the '
                        "original's. Default: the newest in model_dir.")


def config_from_flags():
    """Returns the configuration that the command line asks for.

    --model_dir DIR, where a program has it, takes the configuration stored in DIR.
    """
    model_dir = flags.FLAGS.model_dir if 'model_dir' in flags.FLAGS else None
    if model_dir is None:
        return load_config(flags.FLAGS.config, flags.FLAGS.set)
    if flags.FLAGS.config is not None:
        raise UserError('--config and --model_dir each name a configuration; one of them, with '
                        '--set for single keys, would fit')
    stored = os.path.join(model_dir, 'config.json')
    return load_config(stored, [*flags.FLAGS.set, f'model_dir={json.dumps(model_dir)}'])


def store_config(config, path):
    """Writes a configuration as JSON, a key a line, replacing the file at once."""
    lines = [f'  {json.dumps(key)}: {json.dumps(value)}' for key, value in config.items()]
    with replacing(path) as f:
        f.write('{\n' + ',\n'.join(lines) + '\n}\n')
