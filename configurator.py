"""
Defaults in the script, differences in config files, the last word on the command line; read left to right, last wins.
$ python train.py config/train_shakespeare_char.py --objective=bd3lm --max_iters=2e3
An unknown name, a value of another type than its default or a broken file ends in one sentence and exit code 2.
A default of None says nothing about the type, so such a setting is annotated: `top_k: int | None = None`.
A setting may bring more settings along: with `--objective=mine` those of the objective, see own in configure().
"""
import ast
import contextlib
import dataclasses
import difflib
import inspect
import linecache
import os
import re
import sys
import textwrap
import traceback
import typing

def fail(sentence):
    print('error:', ' '.join(sentence.split()), file=sys.stderr)
    raise SystemExit(2)

def print_anything():
    """ from now on stdout and stderr show any text: a character that their encoding lacks is printed as an escape """
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

def one_slip(a, b):
    """ is word a word b with one letter too many, too few or changed, or with two neighbours swapped? """
    start = len(os.path.commonprefix([a, b]))
    end = len(os.path.commonprefix([a[start:][::-1], b[start:][::-1]]))
    a, b = a[start:len(a) - end], b[start:len(b) - end] # where they differ
    if any(letter.isdigit() for letter in a + b): # beta3 is not beta1 typed badly
        return False
    return len(a + b) <= 1 or len(a) == len(b) == 1 or len(a) == 2 and a == b[::-1]

def same_words(a, b):
    """ are the words of list a those of list b, badly typed? A changed letter makes another word of a short one """
    if len(a) != len(b):
        return False
    for x, y in zip(a, b):
        short = min(len(x), len(y)) < 3 or max(len(x), len(y)) < 4 # min is not max, and t is not n
        swapped = sorted(x) == sorted(y) and one_slip(x, y)
        alike = len(x) > 7 and difflib.SequenceMatcher(None, x, y).ratio() > 0.85 # room for two slips
        if x != y and not swapped and (short or not (one_slip(x, y) or alike)):
            return False
    return True

def words_of(name):
    return [word for word in re.split(r'[\W_]+', name.lower()) if word]

def same_name(typed, name):
    """ is `typed` probably `name`, badly typed? """
    a, b = words_of(typed), words_of(name)
    joined, whole = ''.join(a), ''.join(b)
    letter = len(a) <= len(b) and len(joined) > 5 and len(joined) != len(whole) and one_slip(joined, whole)
    return joined == whole or same_words(a, b) or letter # batchSize, n_layers, learningrat

def lacks_a_word(typed, name):
    """ is `typed` most of `name`, but for one of its words? max_tokens for max_new_tokens """
    a, b = words_of(typed), words_of(name)
    most = max(7, 0.65 * len(''.join(b)))
    return len(''.join(a)) > most and any(same_words(a, b[:i] + b[i + 1:]) for i in range(len(b)))

def nearest(word, words):
    """ '; did you mean NAME?' if one of words was probably meant, else '': a wrong guess is worse than none """
    found = [name for name in words if same_name(word, name)]
    if not found:
        found = [name for name in words if lacks_a_word(word, name)]
        found = found if len(found) == 1 else []
    close = difflib.get_close_matches(word, found, n=1, cutoff=0.0)
    return f"; did you mean {close[0]}?" if close else ''

def allowed(name, kind):
    """ the types that a setting of this annotation may have, a tuple """
    kinds = typing.get_args(kind) or (kind,)
    assert set(kinds) != {type(None)}, \
        f"the default of {name} is None: say what else it may be, such as {name}: int | None = None"
    assert set(kinds) <= {bool, int, float, str, type(None)}, \
        f"{name} is annotated as {kind}: a setting is a bool, int, float or str, or one of these or None"
    return kinds

def kinds_of(settings, defaults):
    """ what each setting may be: {name: types}, by its annotation or by its default """
    lazy = settings.get('__annotate__') # where python 3.14 keeps annotations
    annotations = settings.get('__annotations__') or (lazy(1) if lazy else {})
    kinds = {}
    for name, default in defaults.items():
        kind = annotations.get(name, type(default))
        kind = eval(kind, dict(settings)) if isinstance(kind, str) else kind # from __future__ import annotations
        kinds[name] = allowed(name, kind)
    return kinds

def comments(lines, statements):
    """ {name: the comment beside its first assignment}; lines: the text that the statements (syntax trees) stand in """
    found = {}
    for node in statements:
        if isinstance(node, (ast.Assign, ast.AnnAssign)):
            target = node.target if isinstance(node, ast.AnnAssign) else node.targets[0]
            rest = lines[node.end_lineno - 1].encode()[node.end_col_offset:].decode() # ast counts columns in bytes
            found.setdefault(getattr(target, 'id', None), rest.strip('# \n'))
    return found

def settings_of(config_class, besides=()):
    """ the fields of a dataclass as settings, {name: (default, types, comment)}, without those named in besides """
    name = config_class.__name__
    assert '__dataclass_fields__' in vars(config_class) or not inspect.get_annotations(config_class), \
        f"{name} has fields of its own, so it needs @dataclass too"
    fields = [field for field in dataclasses.fields(config_class) if field.init and field.name not in besides]
    if not fields:
        return {}
    found, kinds, said = {}, typing.get_type_hints(config_class), comments_of(config_class)
    for field in fields:
        assert field.default is not dataclasses.MISSING, f"{field.name} of {name} has no default"
        types = allowed(field.name, kinds[field.name])
        types += (type(None),) * (field.default is None and type(None) not in types) # x: int = None may be None
        found[field.name] = field.default, types, said.get(field.name, '')
    return found

def comments_of(config_class):
    """ {field: the comment beside it}, of a dataclass and those that it inherits from """
    said = {}
    for parent in reversed(config_class.__mro__):
        with contextlib.suppress(OSError, TypeError): # a builtin, or a class that was typed into a shell
            text = textwrap.dedent(inspect.getsource(parent))
            said |= comments(text.split('\n'), ast.parse(text).body[0].body)
    return said

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
            assert name not in names, \
                f"{path}, line {line} assigns {name} again, which is a setting: rename one of them"

def assigned(node, inside=False):
    """ the global names that a statement binds, as (line, name); inside: in a function, where `global` says which """
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

def print_help(settings, reading):
    """ the script's docstring, each setting as it stands with the comment beside it, then those that another brings """
    lines = linecache.getlines(settings.get('__file__', '')) # none for `python -c`
    said = comments(lines, ast.parse(''.join(lines)).body)
    said |= {name: comment for name, (_, _, comment) in reading.brought.items()}
    print((settings.get('__doc__') or '').strip() + '\n')
    width = max((len(f"--{k}={shown(v)}") for k, v in reading.values.items()), default=0)
    for name, value in reading.values.items():
        if name == next(iter(reading.brought), None):
            print(f"\nSettings of {reading.by} {reading.values[reading.by]} alone:")
        kinds, comment = reading.kinds[name], said.get(name, '')
        if len(kinds) > 1: # its value does not tell
            comment = f"({in_words(kinds)}) {comment}"
        print(f"{f'--{name}={shown(value)}':{width}}   {comment}".rstrip())
    if reading.others:
        commands = ', '.join(f"--{reading.by}={value} --help" for value in reading.others)
        print(f"\nMore settings: {commands}")

COMMAND_LINE, EARLIER = 'on the command line', 'in the settings of the run'

class Reading:
    """ settings as they stand while one source after another is read """
    def __init__(self, defaults, kinds):
        self.defaults, self.kinds, self.values = defaults, kinds, dict(defaults)
        self.sources = {} # {name: where its value is from}, but for defaults
        self.unknown = {} # {name: (value, source)} of what may be a setting that another one, `by`, brings along
        self.by, self.brought, self.others = None, {}, {} # others: {another value of `by`: what that would bring}
        self.lost = False # does nobody know the value of `by`?

    def put(self, name, value, source):
        """ a value from a file, or the text of one from the command line, None where there was no = """
        if name not in self.kinds:
            self.unknown[name] = value, source
            return
        kinds, default = self.kinds[name], shown(self.defaults[name])
        if source == COMMAND_LINE:
            if value is None:
                fail(f"--{name} needs a value, e.g. --{name}={shown(self.values[name])}")
            value = parse(value, kinds)
        try:
            self.values[name] = converted(value, kinds)
        except ValueError:
            got = f"{type(value).__name__} {shown(value)}"
            fail(f"{name} must be {in_words(kinds)} (default {default}), got {got} {source}")
        self.sources[name] = source

    def read(self, argv):
        """ put what the words of a command line say, and the config files among them; True where one asks for help """
        for before, arg in zip(['', *argv], argv):
            arg = arg.removeprefix('--config=') # the same as the file alone
            key, equals, text = arg.removeprefix('--').partition('=')
            if arg in ('-h', '--help'):
                return True
            if not arg.startswith('-'):
                if before.startswith('--') and '=' not in before and not os.path.exists(arg):
                    fail(f"there is no config file {shown(arg)}; if it is a value, write {before}={shown(arg)}")
                for name, value in run_config(arg, self.values).items():
                    self.put(name, value, f"in config file {shown(arg)}")
            elif arg == '--config':
                fail("--config needs a value, e.g. --config=FILE")
            else:
                self.put(key, text if equals else None, COMMAND_LINE)
        return False

    def bring(self, by, every):
        """ take in the settings that `by` brings along; every: {a value of it: {name: (default, types, comment)}} """
        self.by, self.brought, self.lost = by, every.get(self.values[by], {}), self.values[by] not in every
        self.others = {value: more for value, more in every.items() if more and more != self.brought}
        defaults = {name: default for name, (default, _, _) in self.brought.items()}
        self.defaults, self.values = self.defaults | defaults, self.values | defaults
        self.kinds = self.kinds | {name: kinds for name, (_, kinds, _) in self.brought.items()}
        unknown, self.unknown = self.unknown, {}
        for name, (value, source) in unknown.items():
            if name in self.brought or source != EARLIER: # an earlier run may be another version's, or objective's
                self.put(name, value, source)

    def check_names(self):
        """ a sentence for the first name that is still unknown """
        for name, (_, source) in self.unknown.items():
            owners = [value for value, more in self.others.items() if name in more]
            if owners:
                by, value = self.by, shown(self.values[self.by])
                fail(f"{name} {source} is a setting of {by} {' and '.join(owners)} alone, and {by} is {value}")
            names = [*self.values, *(name for more in self.others.values() for name in more)]
            more = f", and {self.by} is {shown(self.values[self.by])}, which is unknown too" if self.lost else ''
            fail(f"unknown setting {shown(name)} {source}{more}{nearest(name, names)}")

def configure(settings, argv=None, saved={}, given=None, own=None):
    """
    Apply config files and --key=value to the scalars of a script's globals(), in place; returns {name: value}.
    saved: {name: value} of an earlier run, which come before everything in argv; or a function that finds them, told
    what argv alone makes of the settings, {name: value}. given: a dict that receives, for each setting that argv names,
    where: 'on the command line' or 'in config file x.py'.
    own: (name, function), if the setting of that name brings others along. The function is told the settings so far and
    returns {each value of that setting: {name: (default, types, comment)}}, see settings_of. What is brought along is
    read like the script's settings, but it is only in what is returned, not in globals().
    """
    plain = [k for k, v in settings.items() if k[0] != '_' and isinstance(v, (int, float, str, type(None)))]
    names = settings.setdefault('__settings__', plain) # a second call may find more scalars, which are no settings
    defaults = {k: settings[k] for k in names}
    kinds = kinds_of(settings, defaults)
    check_kept(settings, defaults)
    argv = sys.argv[1:] if argv is None else argv
    reading = Reading(defaults, kinds)
    helps = reading.read(argv)
    if callable(saved):
        saved = {} if helps else saved(reading.values)
    if saved:
        reading = Reading(defaults, kinds)
        for name, value in saved.items():
            reading.put(name, value, EARLIER)
        helps = reading.read(argv)
    if own:
        reading.bring(own[0], own[1](reading.values))
    reading.check_names()
    if helps:
        try:
            print_help(settings, reading)
            sys.stdout.flush()
        except BrokenPipeError: # as in `train.py --help | head`: python would complain once more at its end
            os._exit(141)
        raise SystemExit(0)
    if given is not None:
        given.update({name: source for name, source in reading.sources.items() if source != EARLIER})
    settings.update({name: reading.values[name] for name in names})
    return reading.values
