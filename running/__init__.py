"""What keeps long runs whole. Nothing here knows of norm shaping: what it needs is handed in.

The one-line error that every program ends with is here, as every room raises it.
"""
import os

# Before Keras and TensorFlow are imported:
os.environ['KERAS_BACKEND'] = 'tensorflow'
os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '2')  # a quiet start


class UserError(ValueError):
    """A mistake of the user's, told in one line: what is wrong, and what was expected."""


def brief(error):
    """Returns what an error says as one printable line: it may quote an untrusted file."""
    text = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
    return ''.join(c if c.isprintable() else '?' for c in text)
