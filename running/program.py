"""How a program starts and how it ends: options, one-line errors, signals, exit statuses."""
import contextlib
import os
import signal
import sys

from absl import app, logging

from running import UserError

STOPPED = 75  # exit status of a training that a signal stopped: EX_TEMPFAIL of sysexits.h


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
            with contextlib.suppress(OSError):  # who reads them may be stopped, too
                sys.stdout.flush()
                sys.stderr.flush()
            # at once: an exit joins threads, which may wait for a network, and takes TensorFlow 1 s
            os._exit(143 if isinstance(stop, Terminated) else 130)

    signal.signal(signal.SIGTERM, _terminate)
    app.run(guarded)
