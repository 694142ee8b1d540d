"""How a program starts and how it ends: options, one-line errors, signals, exit statuses."""
import contextlib
import difflib
import os
import re
import signal
import sys
import textwrap

from absl import flags, logging

from running import UserError, brief

ANY = object()  # `names` of a program that takes words of any kind
FULL_MEMORY = re.compile('(?:OOM when|Out of memory) (.*)')  # TensorFlow's words; XLA's, on a GPU
STOPPED = 75  # exit status of a training that a signal stopped: EX_TEMPFAIL of sysexits.h
HELP = ('--help', '-h', '--helpshort', '--helpfull', '-help', '--h')

# what absl's types of flags expect
EXPECTED = {'bool': 'true or false', 'string': 'a text', 'multi string': 'a text'}

_words = []  # what start() found on the command line beside the options


class Terminated(KeyboardInterrupt):
    """SIGTERM, which a cluster sends before it kills: the same as Ctrl-C, but for the status."""


def start(usage, check=None, keys=(), takes_words=False):
    """Reads the command line; to be called before TensorFlow, whose import takes seconds.

    --help is answered here, and a mistake ends the program here, with one line and status 2. So do
    Ctrl-C and SIGTERM, with a line, until run() is called.

    Args:
        usage: what --help prints above the options: the program's docstring.
        check: called when the options are known; raises UserError, OSError for a mistake in them.
        keys: keys of the configuration, which are no options.
        takes_words: whether the program takes words beside its options.
    """
    name = os.path.basename(sys.argv[0])
    stderr = os.dup(2)  # running.quiet takes the other one away for a while
    for number, status in ((signal.SIGINT, 130), (signal.SIGTERM, 143)):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, lambda *_, status=status: _stop_at_once(stderr, name, status))
    if any(word in HELP for word in sys.argv[1:]):
        with contextlib.suppress(BrokenPipeError):  # of `| head`
            print(help_text(usage, name), flush=True)
        os._exit(0)
    try:
        _words[:] = parse(name, keys)
        if _words and not takes_words:
            raise UserError(f'{_words[0]!r} is not an option; {name} --help lists them')
        if check is not None:
            check()
    except (UserError, OSError) as error:
        print(f'{name}: {in_a_line(error)}', file=sys.stderr)
        sys.exit(2)


def parse(name, keys):
    """Parses the options; returns the words beside them. Raises UserError."""
    try:
        return flags.FLAGS(sys.argv)[1:]
    except flags.UnrecognizedFlagError as error:
        option = error.flagname
        if option == 'model_dir' and 'model' in our_flags():
            raise UserError('--model_dir is not an option; did you mean --model?') from None
        if option in keys:
            raise UserError(f'--{option} is a key of the configuration, not an option; expected '
                            f'--set {option}=VALUE') from None
        near = difflib.get_close_matches(option, our_flags(), 1)
        raise UserError(f'--{option[:200]} is not an option; ' + (
            f'did you mean --{near[0]}?' if near else f'{name} --help lists them')) from None
    except flags.Error as error:
        text = brief(error)
        match = re.match('flag --([a-z_]+)=(.*?): ', text)
        if not match:
            raise UserError(text) from None
        flag = flags.FLAGS[match[1]]
        expected = (f'one of {", ".join(flag.parser.enum_values)}'
                    if isinstance(flag, flags.EnumFlag) else
                    flag.parser.syntactic_help or EXPECTED[flag.flag_type()])
        raise UserError(f'--{match[1]} must be {expected}, got {match[2]!r}') from None


def our_flags():
    """Returns {option: absl's flag} of what the project defines."""
    by_module = flags.FLAGS.flags_by_module_dict()
    return {flag.name: flag for module, defined in sorted(by_module.items())
            if not module.startswith('absl') for flag in defined}


def help_text(usage, name):
    """Returns the usage, then each option that the project defines, with its default."""
    lines = [(usage or name).strip(), '', 'Options:']
    for _, flag in sorted(our_flags().items()):
        text = flag.help.partition(';\n')[0]  # absl adds a line to what may be repeated
        default = f' (default: {flag.default_as_str})' if flag.default else ''
        lines += textwrap.wrap(f'--{flag.name}: {text}{default}', 98, initial_indent='  ',
                               subsequent_indent='      ')
    return '\n'.join(lines)


def in_a_line(error):
    """Returns what a UserError or an OSError (a full disk, a folder that ...) says, in one line."""
    if isinstance(error, UserError):
        return str(error)
    return f'{error.filename or "the system"}: {error.strerror or error}'


def _stop_at_once(stderr, name, status):
    os.write(stderr, f'\n{name}: stopped\n'.encode())
    os._exit(status)


def _terminate(*_):
    raise Terminated


def run(main, names=None):
    """Runs main(); a user's mistake, or full memory, ends it with one line and exit status 2.

    Ctrl-C and SIGTERM end it with one line and a shell's usual status, 130 and 143.

    With `names`, the words that the program takes beside its options, or ANY, it runs main(words
    given).
    """
    if not flags.FLAGS.is_parsed():
        start(None, takes_words=names is not None)
    name = os.path.basename(sys.argv[0])
    logging.set_verbosity(logging.WARNING)
    signal.signal(signal.SIGTERM, _terminate)
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        for word in _words:
            if names is not ANY and word not in names:
                raise UserError(f'{word!r} is none of {", ".join(names)}')
        main() if names is None else main(list(_words))
    except (UserError, OSError) as error:
        print(f'{name}: {in_a_line(error)}', file=sys.stderr)
        sys.exit(2)
    except Exception as error:
        # TensorFlow's; a full disk is of this class, too
        full = FULL_MEMORY.search(str(error))
        if type(error).__name__ != 'ResourceExhaustedError' or full is None:
            raise
        print(f'{name}: memory is full: {brief(full[1])}; expected smaller batches or a smaller '
              'network', file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt as stop:
        print(f'\n{name}: stopped', file=sys.stderr)
        with contextlib.suppress(OSError):  # who reads them may be stopped, too
            sys.stdout.flush()
            sys.stderr.flush()
        # At once: an exit joins threads, which may wait for a network, and takes TensorFlow 1 s
        os._exit(143 if isinstance(stop, Terminated) else 130)
