"""What the cells of the tables show: evaluations of one training, each kept in a JSON file."""
import glob
import hashlib
import json
import os

import numpy as np

from config import relevant
from attacks import DIRECT, make_attack, num_examples
from eval import (WORST_CASE, WORST_OF_SLOW, Judged, as_digits, evaluate_attack, make_judges,
                  worst_cases)
from model import build_model
from paper.population_norms import NUM_BATCHES, set_population_norms
from paper.published import DEFAULT, INFERENCES, PAPER_ATTACKS, SHAPED
from paper.trainings import name_of
from report import is_result
from running import UserError
from running.devices import device
from running.files import replacing
from running.results import provenance
from running.unfinished import checkpoint_digest, path_of, remove, shards_of
from running.untrusted import read_json
from shaping import FORMS

JUDGES = (*INFERENCES, 'bn_recorded')  # the paper's inference modes and ours
# Beyond those of Tables I and II
OWN_ATTACKS = ('apgd', 'adaptive', 'adaptive_pgd')
SLOW_ATTACKS = ('apgd_eot', 'square')  # hours through bn_shaping: on the two headline trainings
NUM_DRAWS = 5  # under which transferred examples are classified, for the rows a claim rests on


class Evaluations:
    """The evaluations of one training, each computed once and kept in a folder.

    An evaluation is known by the configuration, by the checkpoint's index (it holds a checksum of
    every weight) and by the images. The code is no part of it: after a change to an attack, remove
    its files by hand.

    Args:
        name: of the training. config: its configuration.
        data: a CIFAR10Data. data_digest: of its images and labels.
        model: a model.Model, the same for all trainings of one network: see networks.
        folder: where the evaluations are kept; model_dir/cells.
    """

    shard = None  # (first, last) examples, where an attack is run on these alone: cluster.py

    def __init__(self, name, config, data, data_digest, model, folder):
        self.name, self.config, self.data, self.folder = name, config, data, folder
        self.model = model
        self.checkpoint = os.path.join(config['model_dir'],
                                       f'checkpoint-{config["max_num_training_steps"]}')
        self.digests = [checkpoint_digest(self.checkpoint), data_digest]

    def load(self):
        """Returns the model with this training's weights."""
        self.model.load_madry_checkpoint(self.checkpoint)
        return self.model

    def twin(self):
        """Returns another model with this training's weights, to use beside `model`."""
        twin = build_model(self.config, self.data.num_classes)
        twin.load_madry_checkpoint(self.checkpoint)
        return twin

    def get(self, what, identity, compute, other_digests=()):
        """Returns the evaluation `what`, a dict: the one that is kept, or compute(path).

        Args:
            identity: JSON of what it depends on, beside weights and data.
            other_digests: of other weights that it depends on than this training's.
            compute: f(path) -> a dict, to be kept as JSON. Finished batches are kept in the file
                `path`, whose name depends on the code as well, and which is removed in the end.
        """
        identity = json.dumps([self.name, what, *self.digests, *other_digests, identity],
                              sort_keys=True)
        digest = hashlib.sha256(identity.encode()).hexdigest()[:12]
        path = os.path.join(self.folder, f'{self.name}-{what}-{digest}.json')
        if os.path.exists(path):
            return read_json(path)
        return self.missing(what, identity, path, compute)

    def missing(self, what, identity, path, compute):
        """Returns the evaluation `what`, which is not kept yet: computed, and kept in `path`."""
        print(f'Computing {self.name}: {what}', flush=True)
        unfinished = self.unfinished(what, identity)
        found = compute(unfinished)
        evaluation = {'identity': json.loads(identity),
                      'provenance': {**provenance(), 'device': device()}, **found}
        os.makedirs(self.folder, exist_ok=True)
        with replacing(path) as f:
            json.dump(evaluation, f)
        remove([unfinished, *shards_of(unfinished).values()])
        return evaluation

    def unfinished(self, what, identity):
        """Returns the path in which the finished batches of an evaluation are kept."""
        return path_of(os.path.join(self.folder, 'unfinished'), f'{self.name}-{what}', identity)

    def attack(self, name, inferences=JUDGES, ratios=None, norms='trained', num_draws=None,
               source=None, **settings):
        """Returns the evaluation under one attack: 'results', as eval.py has them, and 'right'.

        A direct attack is made anew, and kept, for each of several inference modes. It knows the
        one draw that judges it, or stays clear of that; how much its accuracy differs from draw to
        draw is not measured, as each draw would need the attack once more.

        Args:
            inferences: inference modes that judge it, one result for each.
            ratios: inference shaping ratios, one result for each; see eval.make_judges.
            norms: how the population norms are estimated; one of population_norms.RULES.
            num_draws: under how many draws a mode that draws classifies the examples of an attack
                that is not direct. Default: NUM_DRAWS; with `settings` 1, as no claim rests on it.
            source: of `transfer`: the Evaluations of the training whose model makes the examples.
            settings: keys of the configuration that are changed for this attack.
        """
        if name in DIRECT:
            return joined([self.judged(name, (inference,), ratios, norms, 1, source, **settings)
                           for inference in inferences])
        if not set(FORMS) & set(inferences):
            num_draws = 1
        elif num_draws is None:
            num_draws = 1 if settings else NUM_DRAWS
        return self.judged(name, inferences, ratios, norms, num_draws, source, **settings)

    def judged(self, name, inferences, ratios, norms, num_draws, source=None, **settings):
        """Returns the evaluation under one attack, its examples made once; see attack."""
        config = {**self.config, **settings}
        identity = {**relevant(config, name), 'num_examples': num_examples(name, config),
                    'modes': list(inferences), 'ratios': ratios}
        if num_draws > 1:
            identity['num_draws'] = num_draws
        what = name + ('-ratios' if ratios else '') + ''.join(
            f'-{key}-{value}' for key, value in settings.items())
        if norms != 'trained':
            identity['population_norms'] = [norms, NUM_BATCHES]
            what += f'-norms-{norms.replace(" ", "_")}'
        if source is not None:
            identity['transfer_from'] = source.name
            what += f'-from-{source.name}'

        def compute(unfinished):
            model, data = self.load(), self.data
            if source is not None:
                config['transfer_from'] = source.checkpoint
            set_population_norms(model, data, self.config, norms)
            judges = make_judges(model, data, config, inferences, ratios)
            attack = make_attack(name, model, data, config, num_draws,
                                 next(iter(judges.values())))
            results, found = evaluate_attack(
                name, attack, data, config, judges, num_draws, unfinished, shard=self.shard)
            return kept_of(results, found.in_ball)

        return self.get(what, identity, compute, source.digests[:1] if source is not None else ())

    def has(self, name=None):
        """Whether there is any evaluation, or one under an attack, or it can be made."""
        return True

    def numbers_of_images(self):
        """Returns [how many test images there are]; of stored ones, each number that one is of."""
        return [self.data.eval_data.n]

    def judges_of(self, name):
        """Returns those of JUDGES under which an attack is judged."""
        return JUDGES

    def if_kept(self, get, *args, **settings):
        """Returns get(*args, **settings), or None where that is not kept.

        Here whatever is missing is computed.
        """
        return get(*args, **settings)

    def experiment(self, measure, identity, summarize, **settings):
        """Returns the evaluation by an in-text experiment.

        Args:
            measure: one of experiments.py, f(model, data, config, path) -> {name: sizes [n]}.
            identity: as `get` takes it. summarize: f(what measure returns) -> what is kept, a dict.
            settings: keys of the configuration that are changed for it; `identity` has them, too.
        """
        return self.get(measure.__name__, identity, lambda unfinished: summarize(
            measure(self.load(), self.data, {**self.config, **settings}, unfinished)))


def networks(num_classes):
    """Returns f(config) -> the model.Model of a configuration, one for each network."""
    made = {}

    def network(config):
        key = tuple(config[each] for each in ('num_residual_units', 'width_factor', 'precision'))
        if key not in made:
            made[key] = build_model(config, num_classes)
        return made[key]

    return network


class NotKept(UserError):
    """A folder of stored evaluations does not hold the one that is asked for."""


class StoredEvaluations(Evaluations):
    """The evaluations of one training that a folder holds: without weights, images or training.

    Args:
        name: of the training. config: its configuration. folder: where the evaluations are kept.

    Raises:
        UserError: some are of other weights or images than others.
    """

    def __init__(self, name, config, folder):
        self.name, self.config, self.folder, self.kept = name, config, folder, {}
        self.digests = []
        for path in sorted(glob.glob(os.path.join(glob.escape(folder), f'{name}-*.json'))):
            evaluation = read_json(path)
            if not is_evaluation(evaluation):
                raise UserError(f'{path} is not what reproduce.py keeps of an evaluation; expected '
                                'it elsewhere')
            of_training, what, *digests, identity = evaluation['identity']
            if of_training != name:  # the name of another one begins alike
                continue
            self.digests = self.digests or digests[:2]  # of the weights and the images
            key = json.dumps([name, what, identity], sort_keys=True)
            if digests[:2] != self.digests or key in self.kept:
                raise UserError(f'{folder} holds evaluations of more than one model or data set '
                                f'named {name}, {os.path.basename(path)} for one; expected those '
                                'of one: remove the others')
            self.kept[key] = evaluation

    def has(self, name=None):
        if name in (None, *DIRECT):
            return any(name in (None, json.loads(key)[1]) for key in self.kept)
        return self.if_kept(self.attack, name) is not None

    def numbers_of_images(self):
        identities = [json.loads(key)[2] for key in self.kept]
        return sorted({identity['num_eval_examples'] for identity in identities
                       if isinstance(identity, dict) and 'num_eval_examples' in identity})

    def judges_of(self, name):
        """Returns those of JUDGES that a direct attack is kept under; all for one made once."""
        if name not in DIRECT:
            return JUDGES
        kept = tuple(judge for judge in JUDGES if self.if_kept(self.attack, name, (judge,)))
        return kept or JUDGES  # none: the one who asks is told what is missing

    def if_kept(self, get, *args, **settings):
        try:
            return get(*args, **settings)
        except NotKept:
            return None

    def get(self, what, identity, compute, other_digests=()):
        """Returns the evaluation `what` that is kept, of whatever weights and images.

        Raises:
            NotKept: none with this identity is kept.
            UserError: one with another model's examples is.
        """
        key = json.dumps([self.name, what, identity], sort_keys=True)
        if key not in self.kept:
            raise NotKept(f'{self.folder} holds no {what} of {self.name}; expected one with its '
                          'configuration')
        of_others = self.kept[key]['identity'][4:-1]
        if other_digests and of_others != list(other_digests):
            raise UserError(f'{self.folder} holds {what} of {self.name}, made with another model '
                            'than the one whose evaluations it holds; expected it of this one')
        return self.kept[key]


def is_evaluation(evaluation):
    """Returns whether a file's JSON is what Evaluations.get keeps."""
    if not isinstance(evaluation, dict):
        return False
    identity = evaluation.get('identity')
    if not (isinstance(identity, list) and len(identity) >= 5
            and all(isinstance(each, str) for each in identity[:-1])):
        return False
    if 'results' not in evaluation:  # of an experiment
        return True
    results, right = evaluation['results'], evaluation.get('right')
    return (isinstance(results, list) and isinstance(right, list) and len(results) == len(right)
            and all(isinstance(result, dict) and is_result(result) for result in results)
            and all(isinstance(each, str) for each in (*right, evaluation.get('in_ball'))))


# ---- Tables I and II


def available(trainings, config, evaluations):
    """Yields those of some trainings that have accuracies on clean images: some may not be stored.

    One after the other, so that Ray computes what is asked of the first while others are trained.

    Raises:
        UserError: there is none.
    """
    any_is_there = False
    for training in trainings:
        if evaluations[name_of(training, config)].has('clean'):
            any_is_there = True
            yield training
    if not any_is_there:
        raise UserError('nothing is stored of '
                        f'{" or ".join(name_of(training, config) for training in trainings)}')


def attacks_on(training, config, evaluations):
    """Returns {attack: evaluation} of all attacks that Tables I and II show of a training."""
    of_training = evaluations[name_of(training, config)]
    attacks = PAPER_ATTACKS + OWN_ATTACKS
    if training in (DEFAULT, SHAPED):
        attacks += SLOW_ATTACKS
    return {a: of_training.attack(a, of_training.judges_of(a)) for a in attacks
            if a == 'clean' or of_training.has(a)}


def worst_cases_of(by_attack, config):
    """Returns the results of the worst cases over {attack: evaluation}, as eval.py has them.

    Under the inference modes that each attack on all images is judged by; those over all attacks,
    the slow ones among them, under the modes that each is judged by.
    """
    judged = {attack: [result['inference'] for result in evaluation['results']]
              for attack, evaluation in by_attack.items()}
    sizes = {attack: len(evaluation['in_ball']) for attack, evaluation in by_attack.items()}
    judges = [judge for judge in JUDGES if all(
        judge in judged[attack] for attack in by_attack if sizes[attack] == max(sizes.values()))]

    worst = worst_cases({(judge, None): {
        attack: Judged(right_of(evaluation, judge)[None], from_digits(evaluation['in_ball']),
                       result_of(evaluation, judge))
        for attack, evaluation in by_attack.items() if judge in judged[attack]}
        for judge in judges}, config)
    return [result for result in worst if result['attack'] not in (WORST_CASE, WORST_OF_SLOW)
            or len(result['attacks']) == len(by_attack)]


# ---- what an evaluation says


def kept_of(results, in_ball):
    """Returns what eval.evaluate_attack found, as it is kept: who was right stands beside results.

    Args:
        results: a list of results, one a judge. in_ball: bool [n].
    """
    right = [result['right'] for result in results]
    evaluation = {'results': [{k: v for k, v in r.items() if k != 'right'} for r in results],
                  'right': [first for first, *_ in right], 'in_ball': as_digits(in_ball)}
    if max(map(len, right)) > 1:
        evaluation['right_in_other_draws'] = [others for _, *others in right]
    return evaluation


def joined(evaluations):
    """Returns the evaluations of one attack, each under other inference modes, as one."""
    together = {key: [each for one in evaluations for each in one[key]]
                for key in ('results', 'right')}
    in_ball = np.all([from_digits(one['in_ball']) for one in evaluations], axis=0)
    return {**together, 'in_ball': as_digits(in_ball)}


def result_of(evaluation, inference, ratio=None):
    """Returns the result under an inference mode; with its inference shaping ratio, if given."""
    return evaluation['results'][_place(evaluation, inference, ratio)]


def right_of(evaluation, inference):
    """Returns which examples an inference mode classified right, bool [n]; under the first draw."""
    return from_digits(evaluation['right'][_place(evaluation, inference)])


def right_in_draws(evaluation, inference, ratio=None):
    """Returns which examples an inference mode classified right, under each draw: bool [draws, n].

    What draws nothing, and what was judged under a single draw, has one.
    """
    place = _place(evaluation, inference, ratio)
    others = evaluation.get('right_in_other_draws')
    return np.stack([from_digits(digits) for digits in
                     [evaluation['right'][place], *(others[place] if others else [])]])


def _place(evaluation, inference, ratio=None):
    for i, result in enumerate(evaluation['results']):
        if result['inference'] == inference and ratio in (
                None, result.get('inference_shaping_ratio')):
            return i
    raise KeyError((inference, ratio))


def from_digits(digits):
    """Returns the bool [n] that as_digits made into text."""
    return np.array(list(digits)) == '1'
