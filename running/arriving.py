"""The checkpoints of a training, one after another, while it writes them."""
import os
import sys
import time

WATCH_SECONDS = 10.


def arriving(folder, checkpoints, damage, plan):
    """Yields the prefix of every checkpoint in a folder, in order, as it comes, until the last.

    Says what it waits for, and which checkpoints were removed while the caller was busy.

    Args:
        folder: of the training, which may not have begun yet.
        checkpoints: f(folder) -> prefixes of its checkpoints, '...-STEP', the newest first.
        damage: f(prefix) -> what is wrong with a checkpoint, or None.
        plan: f() -> (steps between checkpoints, the last step), None for what is not known. It is
            asked each time: a training may begin later, or be told to take more steps.
    """
    done, told = [], set()
    while True:
        prefix = _oldest(folder, checkpoints, damage, done, told)
        every, last = plan()
        if prefix is None:
            if done and last is not None and max(done) >= last:
                print(f'Step {last} is the last of this training', flush=True)
                return
            print(_waits_for(folder, done, last), flush=True)
            while prefix is None:
                time.sleep(WATCH_SECONDS)
                prefix = _oldest(folder, checkpoints, damage, done, told)
        step = step_of(prefix)
        missed = _missed(done, step, every)
        if missed:
            print(f'Missed: checkpoints {", ".join(map(str, missed[:20]))}; the training keeps the '
                  'newest only, and removed them while others were evaluated', flush=True)
        done.append(step)
        yield prefix


def step_of(prefix):
    """Returns the step in the name of a checkpoint."""
    return int(prefix.rpartition('-')[2])


def _oldest(folder, checkpoints, damage, done, told):
    """Returns the oldest intact checkpoint whose step is not done, or None.

    Damaged ones are named on stderr, once: `told` is the set of those that were.
    """
    for prefix in reversed(checkpoints(folder)):
        if step_of(prefix) in done:
            continue
        fault = damage(prefix)
        if fault is None:
            return prefix
        if prefix not in told and os.path.exists(f'{prefix}.index'):  # else it was just removed
            print(f'{prefix} is damaged and skipped: {fault}', file=sys.stderr, flush=True)
            told.add(prefix)
    return None


def _waits_for(folder, done, last):
    until = f'until step {last}' if last else 'until its config.json says which step is the last'
    after = f'the next checkpoint in {folder}, after step {max(done)}' if done else (
        f'the first checkpoint in {folder}')
    return f'Waiting for {after}, {until}'


def _missed(done, step, every):
    """Returns the steps between the last one done and `step` that should have had a checkpoint."""
    if not done or not every:
        return []
    return [n for n in range((max(done) // every + 1) * every, step, every) if n not in done]
