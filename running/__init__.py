"""What keeps long runs whole. Nothing here knows of norm shaping: what it needs is handed in.

The one-line error that every program ends with is here, as every room raises it.
"""
import importlib
import os

# Before Keras and TensorFlow are imported:
os.environ['KERAS_BACKEND'] = 'tensorflow'
os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '2')  # a quiet start
# oneDNN's kernels on every CPU. TensorFlow uses them unasked only where there is AVX512: elsewhere
# a training step would take two to three times as long, and round otherwise.
os.environ.setdefault('TF_ENABLE_ONEDNN_OPTS', '1')


class UserError(ValueError):
    """A mistake of the user's, told in one line: what is wrong, and what was expected."""


def optional(package, needs, install=None):
    """Returns a package that is imported where it is used, and not installed everywhere.

    Args:
        package: its name. needs: the message's words, such as 'A needs B'. install: what pip is
            given, where it is not the package's name.

    Raises:
        UserError: it is not installed.
    """
    try:
        return importlib.import_module(package)
    except ImportError:
        raise UserError(f'{needs}: pip install {install or package}') from None


def brief(error):
    """Returns what an error says as one printable line: it may quote an untrusted file."""
    text = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
    return ''.join(c if c.isprintable() else '?' for c in text)
