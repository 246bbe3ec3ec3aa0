"""
What the tools share: how contenders are written, how settings are checked, and how a table is saved.
"""
import contextlib
import inspect
import itertools
import json
import math
import os
import sys

import torch

import model as models
import prepare
from configurator import fail, nearest
from model import UserError, check
from prepare import PrepareError, provider

@contextlib.contextmanager
def sentences():
    """ an error that the person at the keyboard can mend, such as too little memory, ends in a sentence """
    try:
        yield
    except (PrepareError, UserError) as e:
        fail(str(e))
    except (MemoryError, RuntimeError) as e:
        said = "can't allocate memory", 'Storage size calculation overflowed'
        if not isinstance(e, (MemoryError, torch.OutOfMemoryError)) and not any(words in str(e) for words in said):
            raise
        fail("out of memory: ask for less at once, such as a smaller batch_size or fewer samples")

def as_command(main):
    """ run main of a tool as a command. It ends quietly if the reader of its output has ended, or on Ctrl-C """
    try:
        try:
            main()
        finally:
            print(end='', flush=True) # flush here, where a BrokenPipeError can be caught
    except BrokenPipeError: # the program that reads our output, such as head, has ended
        os._exit(141) # the exit code of SIGPIPE; at once, because python would flush again and complain
    except KeyboardInterrupt:
        print(file=sys.stderr)
        sys.exit(130)

def check_sizes(settings, **least):
    """
    A UserError if a setting is out of range. settings: {name: value}; least: the smallest value of some of them. Seed
    and threads have the same limits in all tools.
    """
    limits = {name: (low, 10 ** 9) for name, low in least.items()}
    limits |= {'threads': (0, 1024), 'seed': (0, 2 ** 64 - 1)} # what torch can take
    for name, (low, high) in limits.items():
        if settings.get(name) is not None:
            check(low <= settings[name] <= high, f"{name} is {settings[name]}, expected {low:,} to {high:,}")

def value(text):
    """ the value of an option as typed: a number, None, True or False if it reads as one, else the text """
    for kind in int, float:
        try:
            return kind(text)
        except ValueError:
            pass
    return {'None': None, 'True': True, 'False': False}.get(text, text)

def contenders(names):
    """ ['run,steps=8|16', ...] -> [('run,steps=8', 'run', {'steps': 8}), ...] """
    found = []
    for name in names:
        folder, *options = name.split(',')
        keys = [option.partition('=')[0] for option in options]
        for i, option in enumerate(options):
            if '=' not in option or not keys[i]:
                fail(f"{name}: {option!r} is no option, expected key=value, or key=a|b for a row each")
            if keys[i] in keys[:i]:
                fail(f"{name}: {keys[i]} is given twice, expected key=a|b for a row each")
        if not folder:
            fail(f"{name!r} names no run, expected its folder, then options")
        for choice in itertools.product(*(option.partition('=')[2].split('|') for option in options)):
            label = ','.join([folder, *(f'{k}={v}' for k, v in zip(keys, choice))])
            found.append((label, folder, {k: value(v) for k, v in zip(keys, choice)}))
    return found

def split_view(name):
    """ 'folder' or 'folder:view' -> (folder, view or None), ~ resolved. An existing folder of that name has no view """
    folder, colon, view = os.path.expanduser(name).rpartition(':')
    if not colon or os.path.isdir(os.path.expanduser(name)):
        return os.path.expanduser(name), None
    return folder, view or None

def load(name, where='cpu', ckpt='best', weights='ema', view=None):
    """ 'folder' or 'folder:view' of a run -> (model, its checkpoint as a dict); view: the objective to read it as """
    folder, named = split_view(name)
    path = os.path.join(folder, f'ckpt_{ckpt}.pt')
    state = models.read_checkpoint(path)
    settings, _ = (models.entry(state, k, path) for k in ('settings', 'meta')) # load_checkpoint needs neither
    dataset = models.entry(settings, 'dataset', f"'settings' of {path}", str)
    return models.load_checkpoint(state, where, weights, provider(dataset).get('OBJECTIVES', {}), view or named)

def check_options(name, model, objective, options, ours):
    """ a UserError unless all options are arguments of generate, with values that it can use. ours: set by the tool """
    parameters = inspect.signature(model.generate).parameters
    anything = any(p.kind is p.VAR_KEYWORD for p in parameters.values()) # **more: another function will judge them
    takes = [k for k in (options if anything else parameters) if k not in ours]
    for option in options:
        close = nearest(option, takes)
        check(option in takes, f"{name}: {objective} has no use for {option}, only for {', '.join(takes)}{close}")
    models.check_options(options)

def check_data(folder, meta, corpus, *more):
    """
    A UserError if the dataset is no longer what the run was trained on. folder, meta: of the run and its checkpoint;
    more: keys of meta that must be equal, besides the tokenizer's.
    """
    for k in 'tokenizer', 'chars', *more:
        was, now = meta.get(k), corpus.meta.get(k)
        check(was == now, f"{folder} was trained on other data than {corpus.folder} has now: "
              f"{k} was {was!r} and is {now!r}; prepare it as it was")

def check_output(path):
    """ a UserError if no file can be written at path: said before the work rather than after it """
    path = os.path.abspath(os.path.expanduser(path))
    check(not os.path.isdir(path), f"cannot write {path}: it is a folder, expected a file")
    folder = os.path.dirname(path)
    while not os.path.exists(folder): # such folders will be made
        folder = os.path.dirname(folder)
    check(os.path.isdir(folder), f"cannot write {path}: {folder} is no folder")
    check(os.access(folder, os.W_OK), f"cannot write {path}: no permission to write into {folder}")

def write_json(path, content):
    """ write the file completely or not at all. nan and infinities, which JSON does not have, become null """
    with prepare.replacing(os.path.expanduser(path)) as (temporary,), open(temporary, 'w', encoding='utf-8') as f:
        json.dump(finite(content), f, indent=2, allow_nan=False)

def finite(content):
    """ the same lists and dicts, with None in place of nan and infinities """
    if isinstance(content, dict):
        return {k: finite(v) for k, v in content.items()}
    if isinstance(content, (list, tuple)):
        return [finite(v) for v in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content

def with_error(number, error, digits):
    """ '1.23 +- 0.04', or '1.23' if the error is nan, as for a single text """
    return f'{number:.{digits}f}' + (f' +- {error:.{digits}f}' if math.isfinite(error) else '')
