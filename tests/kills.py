"""Kills a training at random moments, starts it again until it is done, and compares the outcome.

    python tests/kills.py --kills 60
    python tests/kills.py --set attack_norms=fixed --set num_validation_examples=40

One training of 300 steps is never stopped. Others, of the same command, are sent SIGKILL, SIGTERM
or SIGINT at random moments from their start on and are started again each time. Each must end with
the same weights, moving averages and velocities bit for bit, and with a log and TensorBoard curves
that hold the same numbers of each step once. A run that was asked to stop must have saved its last
step; one that was killed must have lost num_checkpoint_steps at most.
"""
import argparse
import glob
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
os.environ['CUDA_VISIBLE_DEVICES'] = '-1'
import running.quiet  # noqa: E402, F401
import tensorflow as tf  # noqa: E402

CHECKPOINT_STEPS = 5
SIGNALS = (signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT)


def settings(folder, steps):
    """Returns the settings of a small training on the embedded set."""
    return ['dataset=synthetic', 'num_residual_units=1', 'width_factor=1', 'training_batch_size=16',
            'num_steps=2', 'step_size_schedule=[[0,0.1]]', 'num_output_steps=1',
            'num_summary_steps=4', f'num_checkpoint_steps={CHECKPOINT_STEPS}',
            'num_eval_examples=150', f'max_num_training_steps={steps}', f'model_dir={folder}']


def command(folder, steps, *more):
    """Returns the command of that training, with more settings."""
    return [sys.executable, '-u', os.path.join(ROOT, 'train.py'),
            *(f'--set={setting}' for setting in (*settings(folder, steps), *more))]


def start(arguments, first=lambda: None, **more):
    """Starts a program; `first` is called in its process before it."""
    def before():
        # a shell's background job, which this may be, ignores SIGINT, and so would its child
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        first()
    return subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                            preexec_fn=before, **more)


def weights(folder, step):
    """Returns {name: array} of a checkpoint, velocities and moving averages among them."""
    reader = tf.train.load_checkpoint(os.path.join(folder, f'checkpoint-{step}'))
    return {name: reader.get_tensor(name) for name in reader.get_variable_to_shape_map()}


def log(folder):
    """Returns the log's lines but for the speed, in order."""
    with open(os.path.join(folder, 'log.jsonl'), encoding='utf-8') as f:
        lines = [json.loads(line) for line in f]
    return [{k: v for k, v in line.items() if k != 'examples_per_second'} for line in lines]


def curves(folder):
    """Returns all TensorBoard values in a folder, sorted: (tag, step, value)."""
    found = []
    for path in glob.glob(os.path.join(glob.escape(folder), 'events.out.tfevents.*')):
        for record in tf.data.TFRecordDataset(path).as_numpy_iterator():
            event = tf.compat.v1.Event.FromString(record)
            found += [(value.tag, event.step, value.tensor.SerializeToString())
                      for value in event.summary.value]
    return sorted(found)


def differences(folder, reference, steps):
    """Returns what differs between two trainings' outcomes, as words; none where all agree."""
    found = []
    ours, theirs = weights(folder, steps), weights(reference, steps)
    if set(ours) != set(theirs):
        found.append('names in the checkpoint')
    found += [name for name in ours if ours[name].tobytes() != theirs[name].tobytes()]
    if os.path.exists(os.path.join(reference, 'checkpoint-best.index')):
        ours, theirs = weights(folder, 'best'), weights(reference, 'best')
        found += [f'the best {name}' for name in theirs
                  if ours[name].tobytes() != theirs[name].tobytes()]
    if log(folder) != log(reference):
        found.append('the log')
    if curves(folder) != curves(reference):
        found.append('the curves')
    return found


def last_step(stdout):
    """Returns the last step that a run reported, -1 where there is none."""
    return max((int(line.split()[1].rstrip(':')) for line in stdout.splitlines()
                if line.startswith('Step ') and line.split()[1].endswith(':')), default=-1)


def resumed_from(stdout):
    """Returns the step of the checkpoint that a run went on from, or None."""
    for line in stdout.splitlines():
        if line.startswith('Resuming from '):
            return int(line.rpartition('-')[2])
    return None


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--kills', type=int, default=60)
    parser.add_argument('--steps', type=int, default=300)
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--set', action='append', default=[], help='key=value of the training')
    options = parser.parse_args()
    rng = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as folder:
        reference = os.path.join(folder, 'whole')
        begin, process = time.monotonic(), start(command(
            reference, options.steps, *options.set))
        for line in process.stdout:
            if line.startswith('Step 0:'):
                until_first = time.monotonic() - begin
                break
        process.communicate()
        whole = time.monotonic() - begin
        print(f'{options.steps} steps in {whole:.1f} s, the first one after {until_first:.1f} s',
              flush=True)
        kills, wrong, runs, lost = {s.name: 0 for s in SIGNALS}, [], 0, []
        while sum(kills.values()) < options.kills:
            runs += 1
            run, reached, saved = os.path.join(folder, str(runs)), -1, False
            while True:
                process = start(command(run, options.steps, *options.set))
                number = None
                if sum(kills.values()) < options.kills:
                    try:
                        process.wait(rng.uniform(0, until_first + 0.6 * (whole - until_first)))
                    except subprocess.TimeoutExpired:
                        number = rng.choice(SIGNALS)
                        process.send_signal(number)
                        kills[number.name] += 1
                stdout, stderr = process.communicate()
                name = f'run {runs}, {number.name if number else "left alone"}'
                imports = stderr.endswith('KeyboardInterrupt\n')  # no program has begun yet
                if 'Traceback' in stderr and not imports:
                    wrong.append(f'{name}: {stderr}')
                start_step = resumed_from(stdout)
                if reached >= 0 and start_step is not None:
                    lost.append(reached + 1 - start_step)
                    # One less than none: it was saved, and killed before it was reported
                    if not -1 <= lost[-1] <= (0 if saved else CHECKPOINT_STEPS):
                        wrong.append(f'{name}: went on from {start_step} after step {reached}')
                if last_step(stdout) >= 0:
                    reached, saved = last_step(stdout), process.returncode in (0, 75)
                fits = {None: (0,), signal.SIGKILL: (-9, 0), signal.SIGTERM: (75, 143, -15, 0),
                        signal.SIGINT: (75, 130, -2, 1, 0)}[number]
                if process.returncode not in fits:
                    wrong.append(f'{name}: status {process.returncode}: {stderr}')
                    break
                if process.returncode == 0:
                    break
            found = differences(run, reference, options.steps)
            if found:
                wrong.append(f'run {runs} differs in {", ".join(found)}')
            print(f'{runs} runs, kills {kills}, wrong {len(wrong)}', flush=True)
    print(f'{runs} runs, killed {sum(kills.values())} times ({kills}); steps lost by a stop: '
          f'{max(lost, default=0)} at most')
    print('\n'.join(wrong) or 'all ended as the one that was never stopped, bit for bit')
    sys.exit(bool(wrong))


if __name__ == '__main__':
    main()
