"""What is trained for the tables, and train.py as a process of its own that does it."""
import json
import os
import shlex
import signal
import subprocess
import sys

from config import SCHEMA, load_config
from model import newest_intact
from paper.published import ADV_ONLY
from running import UserError
from running.arriving import step_of
from running.program import STOPPED, Terminated
import train


# Before a command: the kernel sends it SIGTERM when its parent is gone (PR_SET_PDEATHSIG)
ENDS_WITH_ITS_PARENT = [] if sys.platform != 'linux' else [
    sys.executable, '-c', 'import ctypes, os, sys; ctypes.CDLL(None).prctl(1, 15); '
    'os.execvp(sys.argv[1], sys.argv[1:])']


def until(config, part):
    """Returns the changed keys of a training that ends after a part of its steps.

    Replays start from its last checkpoints, so these are close to one another.
    """
    steps = int(part * config['max_num_training_steps'])
    return {'max_num_training_steps': steps, 'num_checkpoint_steps': max(1, steps // 6)}


def longer(config, times):
    """Returns the changed keys of a training that takes `times` as long, cuts included."""
    return {'max_num_training_steps': max(1, round(times * config['max_num_training_steps'])),
            'step_size_schedule': [[round(times * step), rate]
                                   for step, rate in config['step_size_schedule']]}


def one_step(config):
    """Returns the changed keys of a training whose attack is FGSM: one step, from the image."""
    return {'num_steps': 1, 'step_size': config['epsilon'], 'random_start': False}


# What may differ from the trainings of the tables: {name: configuration -> changed keys}. The table
# `variations` has them; their names are part of what kept numbers are known by.
VARIANTS = {
    'half': lambda config: until(config, 1 / 2),
    'three_quarters': lambda config: until(config, 3 / 4),
    'third': lambda config: longer(config, 1 / 3),
    'longer': lambda config: longer(config, 8),
    'fitted': lambda config: longer(config, 8) | {'data_augmentation': False},
    'w32': lambda config: {'num_residual_units': 5},
    'width2': lambda config: {'width_factor': 2},
    'width4': lambda config: {'width_factor': 4},
    'other_norms': lambda config: {
        'attack_norms': 'fixed' if config['attack_norms'] == 'batch' else 'batch'},
    'bfloat16': lambda config: {'precision': 'mixed_bfloat16'},
    'one_step': one_step,
    'width4_one_step': lambda config: one_step(config) | {'width_factor': 4},
}


def name_of(training, config):
    """Returns a training's name: its folder in model_dir, and what its kept numbers begin with."""
    name = f'{training.adversary}_{training.mode}'
    if training.mode.startswith('shaping'):
        name += f'_{training.ratio or config["shaping_ratio"]}to1'
    name += f'_{training.variant}' if training.variant else ''
    return name + (f'_seed{training.seed}' if training.seed else '')


def config_of(training, config):
    """Returns the configuration of a training.

    Where training_batch_size is no multiple of n + 1, the next smaller multiple is taken (63 for
    2:1; the paper does not say what it did). attack_norms is that of shaped batches; adversarial-
    only training always has `batch`, as the paper's default.

    Args:
        training: a published.Training. config: the configuration that the trainings vary.

    Raises:
        UserError: training_batch_size is too small for the ratio.
    """
    size, ratio = config['training_batch_size'], training.ratio or config['shaping_ratio']
    of_training = {**config, 'adversary': training.adversary, 'training_mode': training.mode,
                   'model_dir': os.path.join(config['model_dir'], name_of(training, config))}
    if training.adversary == 'pgd':
        of_training |= {'trades_beta': 0., 'trades_xent': 'attacked'}  # of trades alone
    if training.mode == ADV_ONLY:  # `fixed` would be another default than the paper's
        of_training['attack_norms'] = 'batch'
    if training.mode.startswith('shaping'):
        if size <= ratio:
            raise UserError(f'training_batch_size must be at least {ratio + 1} for a ratio of '
                            f'{ratio}:1, got {size}')
        of_training |= {'shaping_ratio': ratio,
                        'training_batch_size': size // (ratio + 1) * (ratio + 1)}
    if training.variant:
        of_training |= VARIANTS[training.variant](config)
    for key in ('tf_random_seed', 'np_random_seed'):
        of_training[key] += training.seed
    return of_training


def changes_nothing(training, config):
    """Returns whether a variant is the training that it varies, or an earlier variant of it.

    So are w32-1 where the depth is that already, and FGSM's at width 4 where FGSM's has width 4.
    """
    if not training.variant:
        return False
    earlier = ['', *VARIANTS][:1 + [*VARIANTS].index(training.variant)]
    mine, *theirs = ({**config_of(training._replace(variant=variant), config), 'model_dir': ''}
                     for variant in (training.variant, *earlier))
    return mine in theirs


def is_trained(of_training):
    """Returns whether the model of a training's configuration is there.

    A finished one may have been trained in another precision: its weights are float32 in any.

    Raises:
        UserError: the folder holds another training, or a longer one.
    """
    model_dir, steps = of_training['model_dir'], of_training['max_num_training_steps']
    newest = newest_intact(model_dir)
    done = step_of(newest) if newest else 0
    if done > steps:
        raise UserError(f'max_num_training_steps must be at least {done}, the steps that '
                        f'{model_dir} holds, got {steps}; or choose another model_dir')
    if done == steps:
        as_trained = {**of_training, 'precision': trained_precision(of_training)}
        train.check_same_run(as_trained, os.path.join(model_dir, 'config.json'), newest)
    return done == steps


def trained_precision(of_training):
    """Returns the precision in which a training's folder was trained, or will be."""
    path = os.path.join(of_training['model_dir'], 'config.json')
    return (load_config(path) if os.path.exists(path) else of_training)['precision']


def train_if_missing(name, of_training, config, options=()):
    """Runs train.py in a process of its own, unless the model is there already.

    Args:
        name: of the training. of_training: its configuration.
        config: the configuration that `options`, the --config and --set of the command line, make.
            Where the training's differs, train.py gets one more --set.

    Raises:
        UserError: the folder holds another training, or train.py failed.
        SystemExit: train.py was stopped; with its exit status.
    """
    if is_trained(of_training):
        trained_in, precision = trained_precision(of_training), of_training['precision']
        if trained_in != precision:
            print(f'{name} was trained in {trained_in}; what is missing is evaluated in '
                  f'{precision}', flush=True)
        return
    arguments = [*options]
    for key in SCHEMA:
        if of_training[key] != config[key]:
            arguments += ['--set', f'{key}={json.dumps(of_training[key])}']
    print(f'\nTraining {name}:\n    {shlex.join(["python", "train.py", *arguments])}', flush=True)
    status = run_to_its_end([sys.executable, os.path.abspath(train.__file__), *arguments])
    if status == STOPPED:
        print(f'reproduce.py: the training of {name} was stopped; the same command resumes it',
              file=sys.stderr)
        sys.exit(STOPPED)
    if status:
        raise UserError(f'the training of {name} exited with status {status}; the same command '
                        'resumes from its newest checkpoint')


def run_to_its_end(command):
    """Runs a command that saves and exits at a first signal; returns its exit status.

    A signal that would stop this program is passed on as SIGTERM, and the command is waited for. It
    has a session of its own, so that a terminal's Ctrl-C does not reach it as well: at a second
    signal it would exit at once. Two signals to this program are two to the command. Where this
    program is killed, the command gets SIGTERM (on Linux).

    Raises:
        KeyboardInterrupt: this program got SIGINT; the command has exited.
        Terminated: the same, but SIGTERM, or SIGHUP of a closed terminal.
    """
    signals = ForwardedSignals()
    try:
        signals.catch()
        process = subprocess.Popen([*ENDS_WITH_ITS_PARENT, *command], start_new_session=True)
        signals.forward_to(process)
        status = process.wait()
    finally:
        signals.release()
    if signals.received:
        raise KeyboardInterrupt if signals.received[0] == signal.SIGINT else Terminated
    return status


class ForwardedSignals:
    """Signals that would stop this program, each passed on to a process as SIGTERM instead."""

    def __init__(self):
        self.received, self.num_sent = [], 0
        self.process, self.handlers = None, {}

    def catch(self):
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) not in (signal.SIG_IGN, None):  # nohup, a background job
                self.handlers[number] = signal.signal(number, self.receive)

    def release(self):
        for number, handler in self.handlers.items():
            signal.signal(number, handler)

    def receive(self, number, _):
        self.received.append(number)
        self.forward()

    def forward_to(self, process):
        """Says which process it is, and passes on what came before it started."""
        self.process = process
        self.forward()

    def forward(self):
        while self.process is not None and self.num_sent < len(self.received):
            self.num_sent += 1
            self.process.terminate()
