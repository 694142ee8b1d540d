"""Transfer: the strongest examples made on another model of the same shape, judged on this one.

Where they leave less than `adaptive`, which goes through the model itself, that one cannot be
trusted: its gradients are masked.
"""
from attacks.apgd import adaptive
from model import build_model, find_checkpoint
from running import UserError
from running.unfinished import checkpoint_digest
from shaping import make_inference


def source_of(config):
    """Returns the prefix of the checkpoint that transfer_from names.

    Raises:
        UserError: it names none, or one that was trained with another network or other classes.
    """
    if not config['transfer_from']:
        raise UserError('transfer makes its examples on another model, and transfer_from is ""; '
                        'expected --set transfer_from=DIR, the folder of another training or a '
                        'checkpoint')
    return find_checkpoint(config, config['transfer_from'], option='transfer_from')


def transfer(inference, data, config, num_draws):
    """Returns `adaptive` through the same inference of another model; see attacks.make_attack.

    The draws are those that will answer; recordings of the same images are made with the other
    model's weights. Unlike in `adaptive`, an image that the other model answers wrongly is attacked
    in every run all the same: the one that judges may answer it rightly.

    Raises:
        UserError: see source_of; also weights of another network.
    """
    source = source_of(config)
    model = build_model(config, data.num_classes)
    model.load_madry_checkpoint(source)
    through = make_inference(model, inference.mode, data, config)
    attack, settings = adaptive(through, data, config, num_draws, until_wrong=False)
    return attack, {**settings, 'transfer_from': checkpoint_digest(source)[:16]}
