"""
Defaults in the script, differences in config files, the last word on the command line; read left to right, last wins.
$ python train.py config/train_shakespeare_char.py --objective=bd3lm --max_iters=2e3
An unknown name, a value of another type than its default or a broken file ends in one sentence and exit code 2.
"""
import ast
import difflib
import linecache
import os
import sys
import traceback

def fail(sentence):
    print('error:', ' '.join(sentence.split()), file=sys.stderr)
    raise SystemExit(2)

def shown(value):
    """ a value as one would type it; never an exception, though ints of more than 4300 digits have no repr """
    try:
        return value if isinstance(value, str) and value and value.isprintable() else repr(value)
    except Exception:
        return 'something unprintable'

def nearest(word, words):
    return ''.join(f"; did you mean {close}?" for close in difflib.get_close_matches(word, words, n=1))

def parse(text, default):
    """ what was typed, read as its default suggests; what makes no sense stays text, to be judged like other values """
    read = {str: str, float: float}.get(type(default), ast.literal_eval) # float, unlike a literal, knows inf and nan
    try:
        return read(text.capitalize() if isinstance(default, bool) and text.islower() else text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return text

def run_config(path, config):
    """ run a config file that sees the settings so far; returns {name: value}, its own code left out """
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
    return {k: v for k, v in names.items() if k not in code and not k.startswith('_')}

def print_help(settings, config):
    """ the script's docstring, then each setting as it stands, with the comment beside its first assignment """
    lines = linecache.getlines(settings.get('__file__', '')) # none for `python -c`
    assigns = [node for node in ast.parse(''.join(lines)).body if isinstance(node, ast.Assign)]
    nodes = {getattr(node.targets[0], 'id', None): node for node in reversed(assigns)}
    print((settings.get('__doc__') or '').strip() + '\n')
    width = max((len(f"--{k}={shown(v)}") for k, v in config.items()), default=0)
    for key, value in config.items():
        node = nodes.get(key) # ast counts columns in bytes
        comment = lines[node.end_lineno - 1].encode()[node.end_col_offset:].decode().strip('# \n') if node else ''
        print(f"{f'--{key}={shown(value)}':{width}}   {comment}".rstrip())

def configure(settings, argv=None):
    """ apply config files and --key=value to the scalars of a script's globals(), in place; returns {name: value} """
    defaults = {k: v for k, v in settings.items() if k[0] != '_' and isinstance(v, (int, float, str, type(None)))}
    config = dict(defaults)
    def put(key, value, source):
        if key not in defaults:
            fail(f"unknown setting {shown(key)} {source}{nearest(key, defaults)}")
        kind, got, default = type(defaults[key]), type(value), shown(defaults[key])
        try: # a value fits if the type of the default changes nothing about it: 2e3 is an int, 2.5 and True are not
            fits = kind in (got, type(None)) or bool not in (kind, got) and bool(kind(value) == value)
        except (TypeError, ValueError, OverflowError):
            fits = False
        if not fits:
            fail(f"{key} must be {kind.__name__} (default {default}), got {got.__name__} {shown(value)} {source}")
        config[key] = value if kind is type(None) else kind(value)
    for arg in sys.argv[1:] if argv is None else argv:
        arg = arg.removeprefix('--config=') # the same as the file alone
        key, equals, text = arg.removeprefix('--').partition('=')
        if arg in ('-h', '--help'):
            print_help(settings, config)
            raise SystemExit(0)
        elif not arg.startswith('-'):
            for name, value in run_config(arg, config).items():
                put(name, value, f"in config file {shown(arg)}")
        elif not equals and key in (*defaults, 'config'):
            fail(f"--{key} needs a value, e.g. --{key}={shown(config.get(key, 'FILE'))}")
        else:
            put(key, parse(text, defaults.get(key)), 'on the command line')
    settings.update(config)
    return config
