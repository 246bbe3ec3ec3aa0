"""
Defaults in the script, differences in config files, the last word on the command line; read left to right, last wins.
$ python train.py config/train_shakespeare_char.py --objective=bd3lm --max_iters=2e3
An unknown name, a value of another type than its default or a broken file ends in one sentence and exit code 2.
A default of None says nothing about the type, so such a setting is annotated: `top_k: int | None = None`.
"""
import ast
import difflib
import linecache
import os
import sys
import traceback
import typing

def fail(sentence):
    print('error:', ' '.join(sentence.split()), file=sys.stderr)
    raise SystemExit(2)

def print_anything():
    """ from now on stdout and stderr show any text: what their encoding has no character for is printed as an escape """
    for name in 'stdout', 'stderr':
        stream = getattr(sys, name) or open(os.devnull, 'w') # None: it was closed
        setattr(sys, name, stream)
        if hasattr(stream, 'reconfigure'): # a test may have put something else there
            stream.reconfigure(errors='backslashreplace')

def shown(value):
    """ a value as one would type it; never an exception, though ints of more than 4300 digits have no repr """
    try:
        return value if isinstance(value, str) and value and value.isprintable() else repr(value)
    except Exception:
        return 'something unprintable'

def nearest(word, words):
    return ''.join(f"; did you mean {close}?" for close in difflib.get_close_matches(word, words, n=1))

def kinds_of(settings, defaults):
    """ what each setting may be: {name: types}, by its annotation or by its default """
    lazy = settings.get('__annotate__') # where python 3.14 keeps annotations
    annotations = settings.get('__annotations__') or (lazy(1) if lazy else {})
    kinds = {}
    for name, default in defaults.items():
        kind = annotations.get(name, type(default))
        kind = eval(kind, dict(settings)) if isinstance(kind, str) else kind # from __future__ import annotations
        kinds[name] = typing.get_args(kind) or (kind,)
        assert set(kinds[name]) != {type(None)}, \
            f"the default of {name} is None: say what else it may be, such as {name}: int | None = None"
        assert set(kinds[name]) <= {bool, int, float, str, type(None)}, \
            f"{name} is annotated as {kind}: a setting is a bool, int, float or str, or one of these or None"
    return kinds

def in_words(kinds):
    return ' or '.join('None' if kind is type(None) else kind.__name__ for kind in kinds)

def parse(text, kinds):
    """ what was typed, read as one of its kinds; what makes no sense stays text, to be judged like other values """
    if type(None) in kinds and text.lower() == 'none':
        return None
    if str in kinds:
        return text
    read = float if float in kinds else ast.literal_eval # float, unlike a literal, knows inf and nan
    try:
        return read(text.capitalize() if bool in kinds and text.islower() else text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return text

def converted(value, kinds):
    """
    The value as the first of its kinds that changes nothing about it: 2e3 is an int, 2.5 is none, and a bool is no
    number. A ValueError if there is no such kind.
    """
    for kind in kinds:
        try:
            if type(value) is kind or bool not in (kind, type(value)) and bool(kind(value) == value):
                return value if value is None else kind(value)
        except (TypeError, ValueError, OverflowError): # what cannot even be compared is another kind
            pass
    raise ValueError(f"{value!r} is no {in_words(kinds)}")

def check_kept(settings, names):
    """
    A programming error if the script assigns one of its settings (names) again, after configure: whoever adds a
    setting would see it in --help, and another value of the same name at work.
    """
    path = settings.get('__file__', '')
    body = ast.parse(''.join(linecache.getlines(path))).body
    is_call = lambda node: isinstance(node, ast.Call) and getattr(node.func, 'id', None) == 'configure'
    calls = [i for i, node in enumerate(body) if not isinstance(node, (ast.FunctionDef, ast.ClassDef))
             and any(map(is_call, ast.walk(node)))]
    for node in body[calls[0] + 1:] if calls else []:
        for line, name in assigned(node):
            assert name not in names, f"{path}, line {line} assigns {name} again, which is a setting: rename one of them"

def assigned(node, inside=False):
    """ the global names that a statement binds, as (line, name); inside: a function, where only `global` reaches out """
    if isinstance(node, ast.Global):
        yield from ((node.lineno, name) for name in node.names)
    elif isinstance(node, (ast.FunctionDef, ast.ClassDef, ast.Lambda, ast.ListComp, ast.DictComp, ast.SetComp,
                           ast.GeneratorExp)):
        if not inside and hasattr(node, 'name'):
            yield node.lineno, node.name
        inside = True
    elif not inside and isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
        yield node.lineno, node.id
    elif not inside and isinstance(node, ast.alias):
        yield node.lineno, node.asname or node.name
    elif not inside and isinstance(node, ast.ExceptHandler) and node.name:
        yield node.lineno, node.name
    for child in ast.iter_child_nodes(node):
        yield from assigned(child, inside)

def run_config(path, config):
    """ run a config file that sees the settings so far; returns what it sets, {name: value}, its own code left out """
    if not os.path.exists(path):
        folder = os.path.dirname(path) or '.'
        files = os.listdir(folder) if os.path.isdir(folder) and os.access(folder, os.R_OK) else []
        fail(f"there is no config file {shown(path)}{nearest(os.path.basename(path), files)}")
    names = {**config, '__file__': path}
    try:
        with open(path, encoding='utf-8-sig') as f:
            tree = ast.parse(f.read(), path)
        exec(compile(tree, path, 'exec'), names)
    except (Exception, SystemExit) as e:
        lines = [n for frame, n in traceback.walk_tb(e.__traceback__) if frame.f_code.co_filename == path]
        line = [getattr(e, 'lineno', None), *lines][-1] # a syntax error has no frame in the file, a directory no line
        fail(f"config file {shown(path)}{line and f', line {line}' or ''}: {traceback.format_exception_only(e)[-1]}")
    imported = {node.asname or node.name for node in ast.walk(tree) if isinstance(node, ast.alias)}
    code = {k for k, v in names.items() if k in imported or callable(v) or isinstance(v, type(ast))} - set(config)
    bound = {name for _, name in assigned(tree)} # also to the value that it had
    return {k: v for k, v in names.items() if k not in code and not k.startswith('_')
            and (k in bound or k not in config or v is not config[k])}

def print_help(settings, config):
    """ the script's docstring, then each setting as it stands, with the comment beside its first assignment """
    lines = linecache.getlines(settings.get('__file__', '')) # none for `python -c`
    assigns = [node for node in ast.parse(''.join(lines)).body if isinstance(node, (ast.Assign, ast.AnnAssign))]
    target = lambda node: node.target if isinstance(node, ast.AnnAssign) else node.targets[0]
    nodes = {getattr(target(node), 'id', None): node for node in reversed(assigns)}
    kinds = kinds_of(settings, config)
    print((settings.get('__doc__') or '').strip() + '\n')
    width = max((len(f"--{k}={shown(v)}") for k, v in config.items()), default=0)
    for key, value in config.items():
        node = nodes.get(key) # ast counts columns in bytes
        comment = lines[node.end_lineno - 1].encode()[node.end_col_offset:].decode().strip('# \n') if node else ''
        if len(kinds[key]) > 1: # its value does not tell
            comment = f"({in_words(kinds[key])}) {comment}"
        print(f"{f'--{key}={shown(value)}':{width}}   {comment}".rstrip())

def configure(settings, argv=None, saved={}, given=None):
    """
    Apply config files and --key=value to the scalars of a script's globals(), in place; returns {name: value}.
    saved: {name: value} of an earlier run, which come before everything in argv. given: a dict that receives, for each
    setting that argv names, where: 'on the command line' or 'in config file x.py'.
    """
    plain = [k for k, v in settings.items() if k[0] != '_' and isinstance(v, (int, float, str, type(None)))]
    names = settings.setdefault('__settings__', plain) # a second call must not take what was computed since for settings
    defaults = {k: settings[k] for k in names}
    kinds, config = kinds_of(settings, defaults), dict(defaults)
    check_kept(settings, defaults)
    def put(key, value, source):
        if key not in defaults:
            fail(f"unknown setting {shown(key)} {source}{nearest(key, defaults)}")
        try:
            config[key] = converted(value, kinds[key])
        except ValueError:
            fail(f"{key} must be {in_words(kinds[key])} (default {shown(defaults[key])}), "
                 f"got {type(value).__name__} {shown(value)} {source}")
        if given is not None:
            given[key] = source
    for name, value in saved.items():
        put(name, value, "in the settings of the run")
    if given is not None:
        given.clear() # by now it names what the run had
    for arg in sys.argv[1:] if argv is None else argv:
        arg = arg.removeprefix('--config=') # the same as the file alone
        key, equals, text = arg.removeprefix('--').partition('=')
        if arg in ('-h', '--help'):
            try:
                print_help(settings, config)
                sys.stdout.flush()
            except BrokenPipeError: # as in `train.py --help | head`: python would complain once more at its end
                os._exit(141)
            raise SystemExit(0)
        elif not arg.startswith('-'):
            for name, value in run_config(arg, config).items():
                put(name, value, f"in config file {shown(arg)}")
        elif not equals and key in (*defaults, 'config'):
            fail(f"--{key} needs a value, e.g. --{key}={shown(config.get(key, 'FILE'))}")
        else:
            put(key, parse(text, kinds.get(key, (str,))), 'on the command line')
    settings.update(config)
    return config
