"""What eval.py reports: tables, results.json, TensorBoard curves, pictures, comparisons."""
import json
import math
import os
import textwrap

import numpy as np

from config import BASE, SCHEMA, load_config
import tensorflow as tf

from attacks import ATTACKS, num_examples
from doubts import FLAGS, all_transferred, renewed, settings_of
from model import network_name
from running import UserError, brief, optional
from running.devices import device
from running.files import replacing
from running.outputs import Curves
from running.results import add_results, check_writable, provenance, read_results
from running.unfinished import remove
from shaping import INFERENCE_MODES

# Of a row, what was found, and what says where it comes from. All else says how it was computed.
FOUND = ('accuracy', 'interval', 'right', 'xent', 'seconds', 'num_fooled', 'median_l2', 'spread',
         'range', 'accuracy_all_draws', 'interval_all_draws', 'flags', 'looked_for', 'unreliable',
         'gradients', 'queries', 'number_forward_passes')
ORIGIN = ('checkpoint', 'step', 'library', 'provenance')
DIFFERENCE_TIMES = 10  # in pictures


def identity(row):
    """Returns a text that rows share if one is the other computed again: weights, data, settings.

    The path of the weights does not count, their digest does: a model_dir may be moved.
    """
    return json.dumps({k: v for k, v in row.items() if k not in (*FOUND, *ORIGIN)}, sort_keys=True)


# ---- what is printed


def print_table(results, modes):
    """Prints accuracies in percent with their 95% Wilson intervals: attacks down, modes across.

    Behind an accuracy, t: transferred.
    """
    most = max(r['num_examples'] for r in results)
    print(f'Accuracy in %, [95% Wilson interval], n = {most} test images where no other n is '
          'given;\nt: transferred, made under other norms than those that judge')
    print(f'{"attack":<34}' + ''.join(f'{mode:>24}' for mode in modes))
    notes = []
    for attack in dict.fromkeys(r['attack'] for r in results):
        of_modes = {r['inference']: r for r in results if r['attack'] == attack}
        print(marked(next(iter(of_modes.values())), most)
              + ''.join(f'{in_table(of_modes.get(mode)):>24}' for mode in modes), flush=True)
        for norms, r in {r.get('norms'): r for r in of_modes.values()}.items():
            if r.get('median_l2') is not None:
                queries = f'; {r["queries"]} queries an image' if 'queries' in r else ''
                notes.append(f'{attack}: median L2 of the {r["num_fooled"]} perturbations that '
                             f'fool {norms} {r["median_l2"]:.4f}, pixels in [0, 1]{queries}')
    draws = [r for r in results if 'num_draws' in r]
    if draws:
        print(f'Under {draws[0]["num_draws"]} draws: mean, standard deviation between draws, '
              '[least, greatest], right under all')
        for r in draws:
            low, high = r['range']
            print(f'{marked(r, most)}{r["inference"]:<12}{100 * r["accuracy"]:>8.2f} '
                  f'{100 * r["spread"]:6.2f} '
                  f'[{100 * low:5.2f}, {100 * high:5.2f}] {100 * r["accuracy_all_draws"]:8.2f}')
    for note in notes:
        print(note)


def print_flags(results):
    """Prints what makes results doubtful, a line each; what is transferred is in the table."""
    for flag, meaning in FLAGS.items():
        rows = [r for r in results if flag in r.get('flags', ())]
        if not rows or flag == 'transferred':
            continue
        of = (dict.fromkeys(r['inference'] for r in rows) if flag == 'random answer' else
              [f'{r["attack"]} under {r["inference"]}' for r in rows])
        print(f'Flag, {flag}: {meaning}: {", ".join(of)}')


def in_table(row):
    """Returns a cell of the table, 24 characters or less; a dash where there is no result."""
    return f'{shown(row)} {"t" if "transferred" in row.get("flags", ()) else " "}' if row else '- '


def marked(row, most):
    """Returns the attack's name, with the number of examples if there are fewer than `most`."""
    n = row['num_examples']
    return f'{row["attack"] + (f" (n = {n})" if n < most else ""):<34}'


def shown(row):
    """Returns the accuracy of a row in percent and its interval."""
    low, high = row['interval']
    return f'{100 * row["accuracy"]:.2f} [{100 * low:5.2f}, {100 * high:5.2f}]'


# ---- several results side by side


def print_comparison(paths):
    """Prints several results side by side: attack and inference down, a column for each.

    Of a file with rows of several checkpoints, those of the last run's checkpoint are shown.

    Args:
        paths: folders of trainings, or files of results.

    Raises:
        UserError: one of them has no results.
    """
    if not paths:
        raise UserError('--compare compares folders of trainings or files of results; expected '
                        'eval.py --compare DIR1 DIR2')
    columns, sources = [], []
    for number, path in enumerate(paths, 1):
        file = results_file(path)
        contents, rows = read_results(file), rows_of_last(file)
        columns.append(rows)
        sources.append(f'({number}) {file}, step {brief(contents.get("step"))}')
    lines = {}  # {(attack, inference, settings): {column: row}}
    for number, rows in enumerate(columns):
        # Of those that differ in the examples, or the like, one with the most is shown
        for row in sorted(rows, key=lambda row: (row['num_examples'], date_of(row))):
            key = row['attack'], row['inference'], json.dumps(compared(row), sort_keys=True)
            lines.setdefault(key, {})[number] = row
    print('Accuracy in %, [95% Wilson interval], t where transferred, number of test images. A '
          'dash: not evaluated')
    print(*sources, sep='\n')
    if len({row.get('data') for rows in columns for row in rows}) > 1:
        print('Not all of these are of the same images')
    label = {key: ', '.join([*key[:2], *differences(key, lines)]) for key in ordered(lines)}
    width = max(len(text) for text in label.values())
    print(' ' * width + ''.join(f'({number})'.rjust(32) for number in range(1, len(paths) + 1)))
    for key, text in label.items():
        cells = [lines[key].get(number) for number in range(len(paths))]
        print(text.ljust(width) + ''.join(in_column(row) for row in cells))


def in_column(row):
    """Returns a cell of a comparison, 32 characters."""
    transferred = 't' if row and is_marked(row) else ' '
    return (f'{shown(row)} {transferred}{row["num_examples"]:>7}' if row else '-').rjust(32)


def is_marked(row):
    """Returns whether a row is of transferred attacks alone. Older versions wrote no flags."""
    if 'flags' in row:
        return 'transferred' in row['flags']
    attacks = settings_of(row)
    return isinstance(attacks, dict) and all(
        isinstance(settings, dict) for settings in attacks.values()) and all_transferred(row)


def results_file(path):
    """Returns the file of results that a folder of a training, or a path of a file, names."""
    if not os.path.isdir(path):
        if not os.path.exists(path):
            raise UserError(f'{path} does not exist; expected the folder of a training, or a file '
                            'that eval.py wrote')
        return path
    for inner in (os.path.join('eval', 'results.json'), 'results.json'):
        if os.path.isfile(os.path.join(path, inner)):
            return os.path.join(path, inner)
    if os.path.isdir(os.path.join(path, 'cells')):
        raise UserError(f'{path} holds cells of reproduce.py, which --stored {path} shows; '
                        'expected the folder of a training, or a file that eval.py wrote')
    raise UserError(f'{path} holds no eval/results.json; eval.py --model_dir {path} writes it')


def rows_of_last(path):
    """Returns the rows in a file of results that are of the last run's checkpoint, checked."""
    contents = read_results(path)
    rows = contents['results']
    for row in rows:
        if not is_result(row):
            raise UserError(f'{path}: a row has no attack, inference, accuracy, interval and '
                            'num_examples, or flags or data of another kind; expected a file that '
                            'eval.py wrote')
    if not rows:
        raise UserError(f'{path} holds no rows; expected a file that eval.py wrote')
    last = contents.get('checkpoint'), contents.get('step')
    of_last = [row for row in rows
               if (row.get('checkpoint', last[0]), row.get('step', last[1])) == last] or rows
    weights = max(of_last, key=date_of).get('checkpoint_digest')
    # A folder may have been moved since, and others were trained there before: the digest counts
    return [row for row in (rows if weights else of_last)
            if row.get('checkpoint_digest') == weights]


def date_of(row):
    """Returns when a row was computed, '' where it does not say."""
    where = row.get('provenance')
    return str(where.get('date', '')) if isinstance(where, dict) else ''


def is_result(row):
    """Returns whether a dict has what each row of results has."""
    def number(value):
        return type(value) in (int, float) and math.isfinite(value)
    interval, data = row.get('interval'), row.get('data')
    return (isinstance(row.get('flags', []), list) and (data is None or isinstance(data, str))
            and all(isinstance(row.get(key), str) and row[key].isprintable() and len(row[key]) < 100
                for key in ('attack', 'inference'))
            and number(row.get('accuracy')) and isinstance(interval, list) and len(interval) == 2
            and all(map(number, interval)) and type(row.get('num_examples')) is int)


def compared(row):
    """Returns the settings in which rows of different trainings must agree to stand in one line.

    Those of a worst case are the settings of its attacks, such as 'pgd.num_steps'.
    """
    settings = {key: value for key, value in row.items() if key not in (
        *FOUND, *ORIGIN, 'checkpoint_digest', 'data', 'np_random_seed', 'num_examples',
        'eval_batch_size', 'num_validation_examples', 'precision')}
    of_attacks = settings.pop('attack_settings', {})
    for attack, of_attack in of_attacks.items() if isinstance(of_attacks, dict) else ():
        if isinstance(of_attack, dict):
            settings |= {f'{attack}.{key}': value for key, value in of_attack.items()}
    return settings


def ordered(lines):
    """Returns the keys of lines, in the order of the attacks and of the inference modes."""
    def place(name, names):
        return names.index(name) if name in names else len(names)
    return sorted(lines, key=lambda key: (place(key[0], list(ATTACKS)), key[0],
                                          place(key[1], INFERENCE_MODES), key))


def differences(key, lines):
    """Returns in what the settings of a line differ from those of others of its attack and mode."""
    alike = [json.loads(other[2]) for other in lines if other[:2] == key[:2]]
    mine = json.loads(key[2])
    return [f'{brief(name)}={brief(json.dumps(mine.get(name)))[:60]}'
            for name in dict.fromkeys(name for settings in alike for name in settings)
            if any(s.get(name) != mine.get(name) for s in alike)]


# ---- what is written


class Outputs:
    """Where the results of an evaluation go: results.json, and what is written beside it.

    Args:
        config: the configuration. output: a file that takes the place of MODEL_DIR/eval/
            results.json; nothing is then written in model_dir, and no curves. pictures: the path
            of a .png file, or None.

    Raises:
        UserError: one of them cannot be written, or holds something else. Nothing is made yet.
    """

    def __init__(self, config, output=None, pictures=None):
        self.model_dir, self.pictures = config['model_dir'], pictures
        self.folder = os.path.join(self.model_dir, 'eval')
        self.path = output or os.path.join(self.folder, 'results.json')
        self.unfinished = f'{output}.unfinished' if output else os.path.join(self.folder,
                                                                            'unfinished')
        self.with_curves, self._curves = not output, None
        check_writable(self.path, 'a file in a folder that can be written, --output PATH')
        try:
            read_results(self.path)
        except UserError as error:
            raise UserError(f'{error}; move it away, or name another file with --output') from None
        if pictures:
            if not pictures.endswith('.png'):
                raise UserError(f'--pictures is {pictures}; expected the path of a .png file')
            check_writable(pictures, '--pictures PATH.png in a folder that can be written')
            pyplot()

    def write(self, config, origin, results, samples, data, kept):
        """Adds the rows of a checkpoint to the file of results; then curves and pictures.

        Prints what makes the rows doubtful, as they now stand in the file.

        Args:
            config: the configuration.
            origin: what each row says of weights and data: checkpoint, step, digests.
            results, samples: as `evaluate` found them. data: a CIFAR10Data.
            kept: paths of finished batches, which are removed once the results are written.
        """
        checkpoint, step = origin['checkpoint'], origin['step']
        common = {**origin, **{key: config[key] for key in ('np_random_seed', 'precision')},
                  'provenance': {**provenance(), 'device': device()}}
        head = {'checkpoint': checkpoint, 'step': step, 'config': config, **described(config)}
        rows = add_results(self.path, head, [{**r, **common} for r in results], identity, renewed)
        remove(kept)
        print_flags(rows)
        print(f'Written to {self.path}', flush=True)
        own = os.path.realpath(os.path.dirname(checkpoint)) == os.path.realpath(self.model_dir)
        if self.with_curves and own:
            self._curves = self._curves or Curves(self.folder)
            with self._curves.writing():
                write_summaries(results, samples, data, step, config, self._usual())
        if self.pictures:
            draw_pictures(self.pictures, samples, data, f'{checkpoint}, step {step}')
            print(f'Written to {self.pictures}', flush=True)

    def _usual(self):
        """Returns the configuration whose results have the original's tags: the training's.

        Read when it is used: --watch may have begun before the training.
        """
        stored = os.path.join(self.model_dir, 'config.json')
        return load_config(stored if os.path.isfile(stored) else BASE)


def described(config):
    """Returns what RobustBench's model_info/*.json say of a model, under their names.

    That leaderboard takes deterministic models alone, as its attack must meet the same answer
    twice: a defence that draws cannot enter it. Its 'clean_acc' is our row `clean`; it has no word
    for a row under `adaptive`, as its 'autoattack_acc' is of AutoAttack's standard version.
    """
    return {'dataset': config['dataset'], 'additional_data': False,
            'architecture': network_name(config), 'eps': f'{config["epsilon"]:g}/255'}


def write_summaries(results, samples, data, step, config, usual):
    """Writes TensorBoard scalars of each row; samples of each attack, and what was answered.

    Rows with the usual settings have the original's tags, too: PN's clean and PGD's.

    Args:
        results, samples: as `evaluate` found them. data: a CIFAR10Data.
        config: the configuration. usual: that of the training.
    """
    for r in results:
        settings = tag_settings(r, config, usual)
        tf.summary.scalar(f'accuracy {r["attack"]} {r["inference"]}{settings}', r['accuracy'], step)
        if 'xent' in r:
            tf.summary.scalar(f'xent {r["attack"]} {r["inference"]}{settings}', r['xent'], step)
        if r['inference'] == 'pn' and r['attack'] in ('clean', 'pgd') and not settings:
            for tag in ('{} nat',) if r['attack'] == 'clean' else ('{} adv', '{} adv eval'):
                tf.summary.scalar(tag.format('accuracy'), r['accuracy'], step)
                tf.summary.scalar(tag.format('xent'), r['xent'], step)
    for label, (x_adv, answers, _) in samples.items():
        row = next(r for r in results
                   if label in (r['attack'], f'{r["attack"]} through {r["inference"]}'))
        tag = f'{label} eval' + tag_settings(row, config, usual)
        tf.summary.image(f'images {tag}', panels(data.eval_data.xs, x_adv) / 255, step,
                         max_outputs=len(x_adv), description=
                         f'clean, adversarial, difference times {DIFFERENCE_TIMES}')
        heads = ['label', *(mode for mode, _ in answers)]
        rows = zip(data.eval_data.ys, *answers.values())
        tf.summary.text(f'answers {tag}', '\n'.join(
            ['|'.join(heads), '|'.join('-' * len(heads)),
             *('|'.join(data.label_names[y] for y in row) for row in rows)]), step)


def tag_settings(row, config, usual):
    """Returns what a curve's tag says of settings: those that the configuration has not usually."""
    changed = {}
    for name, settings in settings_of(row).items():
        changed |= {key: value for key, value in {**row, **settings}.items() if key in SCHEMA
                    and value == config[key] != usual[key]}
        changed |= {key: config[key] for key in SCHEMA
                    if name in SCHEMA[key].attacks and config[key] != usual[key]}
    names = row.get('attacks', [row['attack']])
    if row['num_examples'] != min(num_examples(name, usual) for name in names):
        changed['num_examples'] = row['num_examples']
    if 'num_draws' in row:
        changed['num_draws'] = row['num_draws']
    of = ' of ' + '+'.join(names) if 'attacks' in row else ''
    return of + ''.join(f' {key}={value}' for key, value in sorted(changed.items()))


# ---- pictures


def panels(images, x_adv):
    """Returns clean images, their adversarial versions and differences, [k, 32, 96, 3] in [0, 255].

    Args:
        images: clean ones, from the first. x_adv: [k, 32, 32, 3], of the first k of them.
    """
    x_nat = images[:len(x_adv)].astype(np.float32)
    difference = np.clip(127.5 + DIFFERENCE_TIMES * (x_adv - x_nat), 0, 255)
    return np.concatenate([x_nat, x_adv, difference], axis=2)


def pyplot():
    """Returns matplotlib's pyplot, which draws to files. Raises UserError: it is not installed."""
    matplotlib = optional('matplotlib', 'pictures need matplotlib')
    matplotlib.use('Agg')
    from matplotlib import pyplot
    return pyplot


def save_figure(figure, path):
    """Writes a figure to path, a .png file, and closes it."""
    try:
        os.makedirs(os.path.dirname(path) or '.', exist_ok=True)
        with replacing(path, 'wb') as f:
            figure.savefig(f, format='png', dpi=150, bbox_inches='tight')
    finally:
        pyplot().close(figure)


def draw_pictures(path, samples, data, title):
    """Draws samples, as `gallery` does, into a file.

    Args:
        path: of the .png file. samples: see gallery. data: a CIFAR10Data.
    """
    images, labels = data.eval_data.xs, data.eval_data.ys
    save_figure(gallery(images, labels, data.label_names, samples, title), path)


def answer(names, label, probability, y):
    """Returns 'frog 93': an answer and its probability in percent; '*' where it is not y."""
    return f'{names[label]} {100 * probability:.0f}{"" if label == y else " *"}'


def gallery(images, labels, names, samples, title):
    """Draws one sample a row: clean, then adversarial and the difference times 10 of each attack.

    Below an image stands what each inference answers, with its probability in percent, '*' where it
    is wrong.

    Args:
        images, labels: of the test, from the first. names: of the classes.
        samples: {attack: (x_adv [k, 32, 32, 3], {judge: labels [k]}, {judge: float [k]})}.

    Returns:
        a matplotlib figure.
    """
    plt, nothing = pyplot(), (None, {}, {})
    attacks = [name for name in samples if name != 'clean']
    k, columns = min(len(x_adv) for x_adv, _, _ in samples.values()), 1 + 2 * len(attacks)
    num_lines = 1 + max(len(answers) for _, answers, _ in samples.values())
    figure, axes = plt.subplots(k, columns, squeeze=False, figsize=(
        max(1.5 * columns, 4), k * (1.3 + 0.13 * num_lines) + 0.8), layout='constrained')

    def draw(axis, image, head, sample, y, i):
        _, answers, sure = sample
        axis.imshow(np.clip(image, 0, 255) / 255)
        axis.set_xticks([])
        axis.set_yticks([])
        if i == 0:
            axis.set_title(head.replace(' ', '\n', 1), fontsize=7)
        lines = [f'{judge[0]}: {answer(names, of[i], sure[judge][i], y)}'
                 for judge, of in answers.items()]
        axis.set_xlabel('\n'.join(lines), fontsize=6)

    for i, y in enumerate(labels[:k]):
        draw(axes[i, 0], images[i], 'clean', samples.get('clean', nothing), y, i)
        axes[i, 0].set_ylabel(names[y], fontsize=7)
        for column, name in enumerate(attacks):
            image = panels(images, samples[name][0])[i]
            draw(axes[i, 1 + 2 * column], image[:, 32:64], name, samples[name], y, i)
            draw(axes[i, 2 + 2 * column], image[:, 64:],
                 f'difference x {DIFFERENCE_TIMES}', nothing, y, i)
    caption = (f'{title}\nleft: the label; below: what each inference answers, with its '
               'probability in %, * if wrong')
    figure.suptitle('\n'.join(textwrap.wrap(caption, 22 * columns + 30,
                                            replace_whitespace=False)), fontsize=7)
    return figure
