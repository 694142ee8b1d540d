"""Downloads a model that MadryLab released with the CIFAR-10 challenge and unpacks it.

    python fetch_model.py secret                              # to models/secret
    python fetch_model.py natural --models_dir DIR            # to DIR/natural
    python fetch_model.py adv_trained --url ADDRESS --sha256 HEX

A partial download is resumed when the same command is given again. A MODELS_DIR/NAME.zip that
lies there, from a browser for example, is unpacked instead. The addresses are those of the
original's fetch_model.py; the SHA-256 digest of secret.zip is from its README.
"""
import hashlib
import os
import re
import shlex

from absl import flags

from running import UserError
from running.download import check_url, download
from running.program import run, start
from running.untrusted import MAX_BYTES, check_plain, find_checkpoints, unpack

# name: (address, SHA-256 of the archive or None where it was not published)
MODELS = {
    'natural': ('https://www.dropbox.com/s/cgzd5odqoojvxzk/natural.zip?dl=1', None),
    'adv_trained': ('https://www.dropbox.com/s/g4b6ntrp8zrudbz/adv_trained.zip?dl=1', None),
    'secret': ('https://www.dropbox.com/s/ywc0hg8lr5ba8zd/secret.zip?dl=1',
               '555be6e892372599380c9da5d5f9802f9cbd098be8a47d24d96937a002305fd4'),
}


def main(words):
    if len(words) != 1:
        raise UserError(f'{len(words)} models named; expected one of {", ".join(MODELS)}')
    url, sha256 = MODELS[words[0]]
    url, sha256 = flags.FLAGS.url or url, flags.FLAGS.sha256 or sha256
    check_url(url)
    if sha256 and not re.fullmatch('[0-9a-fA-F]{64}', sha256):
        raise UserError(f'--sha256 must be 64 hexadecimal digits, got {sha256!r}')
    folder = os.path.join(flags.FLAGS.models_dir or '.', words[0])
    path = f'{folder}.zip'
    if find_checkpoints(folder):
        if flags.FLAGS.sha256:
            raise UserError(f'{folder} is there already, and the archive that it came from is not: '
                            'its digest cannot be checked; remove the folder, or leave --sha256 '
                            'out')
        print(f'{folder} is there already: neither downloaded nor checked again')
    else:
        for end in ('', '.unpacking', '.zip', '.zip.part', '.zip.part.json', '.zip.part.json.tmp'):
            if os.path.islink(folder + end):
                raise UserError(f'{folder}{end} is a link, which nothing is written through; '
                                'remove it, or name another --models_dir')
            if '.zip' in end and os.path.lexists(folder + end):
                check_plain(folder + end, MAX_BYTES)
        if os.path.lexists(folder):
            raise UserError(f'{folder} is there and holds no checkpoint; move it away, or name '
                            'another --models_dir')
        # Download the model
        if os.path.exists(path):
            print(f'{path} is there already: not downloaded again', flush=True)
        else:
            download(url, path, checked=bool(sha256))
        try:
            # Compute its hash
            with open(path, 'rb') as f:
                digest = hashlib.file_digest(f, 'sha256').hexdigest()
            print(f'{path}: {os.path.getsize(path):,} bytes, SHA-256 {digest}', flush=True)
            if not sha256:
                print('No digest was published for it: --sha256 can require this one next time')
            elif digest != sha256.lower():
                raise UserError(f'has the SHA-256 digest {digest}; expected {sha256.lower()}')
            # Extract the model
            unpack(path, folder)
        except UserError as error:
            os.replace(path, f'{path}.bad')
            raise UserError(f'{path} {error}. It is {path}.bad now; the same command starts '
                            'afresh') from None
        os.remove(path)
        print(f'Unpacked to {folder}; {path} removed')
    print('To evaluate it:\n    ' + shlex.join([
        'python', 'eval.py', '--checkpoint', find_checkpoints(folder)[-1],
        '--set', f'model_dir={folder}']))


if __name__ == '__main__':
    flags.DEFINE_string('url', None, "Address of the archive, in place of the original's.")
    flags.DEFINE_string('models_dir', 'models', 'The model is unpacked into a folder of this one.')
    flags.DEFINE_string('sha256', None, 'Digest that the archive must have.')
    start(__doc__, takes_words=True)
    run(main, tuple(MODELS))
