"""
The house stays readable: lines that fit, functions of a screen, few levels inside one another, a README of a few
pages, pictures that exist. A failure names the place and the size of every offender at once.
"""
import ast
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
COLUMNS, LINES, DEPTH, WORDS = 120, 60, 4, 2000

# ---- which files are ours

def is_environment(folder):
    """ does the folder hold installed packages rather than code of ours? """
    marks = [os.path.join(folder, name) for name in ('pyvenv.cfg', 'conda-meta')]
    return os.path.basename(folder) == 'site-packages' or any(map(os.path.exists, marks))

def listed_by_git(root):
    """ paths that git tracks, and new ones that it does not ignore; None where git cannot say """
    if not os.path.exists(os.path.join(root, '.git')) or not shutil.which('git'):
        return None
    command = ['git', '-C', root, 'ls-files', '-z', '--cached', '--others', '--exclude-standard']
    done = subprocess.run(command, capture_output=True, encoding='utf-8', errors='surrogateescape')
    if done.returncode: # such as a folder that belongs to somebody else
        return None
    inside = lambda path: any(is_environment(os.path.join(root, above)) for above in [*Path(path).parents][:-1])
    return [path for path in done.stdout.split('\0') if path and not inside(path)]

def listed_by_walking(root):
    """ paths of everything but hidden folders, installed packages, runs (out*) and what lies deeper than data/NAME """
    found = []
    for folder, inner, names in os.walk(root):
        here = Path(folder).relative_to(root)
        downloaded = here.parts[:1] == ('data',) and len(here.parts) == 2
        inner[:] = [name for name in inner if not name.startswith(('.', 'out')) and not downloaded]
        inner[:] = [name for name in inner if not is_environment(os.path.join(folder, name))]
        found += [(here / name).as_posix() for name in names]
    return found

def files(ending, root=ROOT):
    """ our files with that ending, as sorted paths from root; git may list one that is deleted """
    listed = listed_by_git(root)
    listed = listed_by_walking(root) if listed is None else listed
    return sorted({path for path in listed if path.endswith(ending) and os.path.isfile(os.path.join(root, path))})

def read(path):
    with open(os.path.join(ROOT, path), encoding='utf-8-sig') as f:
        return f.read()

# ---- what is measured. Each check takes a path and its text, and returns sentences that begin with path:line

def long_lines(path, text):
    widths = [len(line.expandtabs()) for line in text.split('\n')] # not splitlines: a string may hold U+2028
    return [f"{path}:{i}: {n} columns" for i, n in enumerate(widths, 1) if n > COLUMNS]

FUNCTIONS = ast.FunctionDef, ast.AsyncFunctionDef
LEVELS = (*FUNCTIONS, ast.If, ast.For, ast.AsyncFor, ast.While, ast.With, ast.AsyncWith, ast.Match, ast.Try,
          getattr(ast, 'TryStar', ast.Try)) # except* came with python 3.11

def long_functions(path, text):
    """ from the first decorator to the last line """
    found = []
    for node in ast.walk(ast.parse(text, path)):
        if isinstance(node, FUNCTIONS):
            first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
            n = node.end_lineno - first + 1
            found += [(node.lineno, f"{path}:{node.lineno}: {node.name} has {n} lines")] * (n > LINES)
    return [sentence for _, sentence in sorted(found)]

def levels(node, depth=0, owner=None):
    """
    Yields (owner, depth, line) for every statement of LEVELS below a node. owner: the outermost function around the
    statement, None at the top level of a module or a class. depth: how many statements of LEVELS inside the owner
    enclose the statement, itself included. An elif is as deep as its if.
    """
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.expr): # no expression contains a statement
            continue
        if owner is None and isinstance(child, FUNCTIONS):
            yield from levels(child, 0, child)
            continue
        is_elif = isinstance(node, ast.If) and isinstance(child, ast.If) and child.col_offset == node.col_offset
        inner = depth + (isinstance(child, LEVELS) and not is_elif)
        if inner > depth:
            yield owner, inner, child.lineno
        yield from levels(child, inner, owner)

def deep_functions(path, text):
    """ one sentence for every owner, at the first of its deepest lines; the top level of train.py is not counted """
    deepest = {}
    for owner, depth, line in levels(ast.parse(text, path)):
        if owner or path != 'train.py':
            deepest[owner] = max(deepest.get(owner, (0, 0)), (depth, -line))
    name = {owner: owner.name if owner else 'the top level' for owner in deepest}
    return [f"{path}:{-line}: depth {depth} in {name[owner]}"
            for owner, (depth, line) in deepest.items() if depth > DEPTH]

PICTURE = r'[^\s"\'`()<>=,]+\.(?:png|jpe?g|gif|svg|webp)\b'

def pictures_of(path, line):
    """ the pictures that a line of a page names, as paths from the root; none of other machines """
    shown = re.findall(rf'(?i)(?:\]\(|\]:\s*)<?({PICTURE})', line)
    for _, attribute in re.findall(r'(?i)(?:src|srcset|href)=(["\'])(.*?)\1', line):
        shown += re.findall(f'(?i){PICTURE}', attribute)
    beside = [name for name in shown if name[0] != '/' and '//' not in name]
    named = [os.path.join(os.path.dirname(path), name) for name in beside]
    named += [name[1:] for name in shown if name[0] == '/' != name[1]]
    if not shown: # a command that makes the picture, or prose
        named += re.findall(rf'(?i)(?<![\w./])assets/{PICTURE}', line)
    return sorted(set(map(os.path.normpath, named)))

def missing_pictures(path, text, root=ROOT):
    """ pictures that a page shows or links to, from its own folder, and those in assets/ that its commands write """
    return [f"{path}:{i}: there is no {picture}" for i, line in enumerate(text.split('\n'), 1)
            for picture in pictures_of(path, line) if not os.path.isfile(os.path.join(root, picture))]

# ---- our files

def check_all(check, ending):
    offenders = [sentence for path in files(ending) for sentence in check(path, read(path))]
    if offenders:
        pytest.fail('\n'.join([f'{len(offenders)} offenders', *offenders]), pytrace=False)

@pytest.mark.parametrize('check', [long_lines, long_functions, deep_functions])
def test_code_is_readable(check):
    assert {'model.py', 'tests/test_style.py', 'tools/runs.py', 'data/text/prepare.py'} <= set(files('.py'))
    check_all(check, '.py')

def test_every_picture_of_a_page_exists():
    assert {'README.md', 'tools/README.md'} <= set(files('.md')) and '](assets/' in read('README.md')
    check_all(missing_pictures, '.md')

def test_readme_is_short():
    n = len(read('README.md').split())
    assert n <= WORDS, f"README.md has {n} words, expected at most {WORDS}"

# ---- the checks themselves

def test_long_lines_are_found():
    text = f"short\n{'x' * 120}\n{'y' * 121}\n\t{'z' * 113}\n# é\u2028{'é' * 200}\n"
    assert long_lines('a.py', text) == ['a.py:3: 121 columns', 'a.py:4: 121 columns', 'a.py:5: 204 columns']
    assert long_lines('a.py', '') == []

def body(n, indent='    '):
    return f'{indent}x = 0\n' * n

@pytest.mark.parametrize('text, found', [
    ('def f():\n' + body(59), []),
    ('def f():\n' + body(60), ['a.py:1: f has 61 lines']),
    ('async def f():\n' + body(70), ['a.py:1: f has 71 lines']),
    ('\n@a\n@b(\n1)\ndef f():\n' + body(57), ['a.py:5: f has 61 lines']),
    ('def f():\n    """\n' + '\n' * 57 + '    """\n    x = 1\n', ['a.py:1: f has 61 lines']),
    ('def f(a,\n      b):\n' + body(59), ['a.py:1: f has 61 lines']),
    ('def f():\n    x = 0\n' + '# between functions\n' * 80, []),
    ('class A:\n' + '    def f(self):\n        pass\n' * 50, []),
    ('class A:\n    def f(self):\n' + body(61, ' ' * 8), ['a.py:2: f has 62 lines']),
    ('def f():\n    def g():\n' + body(60, ' ' * 8) + '    return g\n',
     ['a.py:1: f has 63 lines', 'a.py:2: g has 61 lines']),
    ('if 1:\n' + body(100), []),
])
def test_long_functions_are_found(text, found):
    assert long_functions('a.py', text) == found

def nested(*heads, last='pass'):
    """ statements inside one another, a line each """
    return '\n'.join(f"{' ' * 4 * i}{line}" for i, line in enumerate([*heads, last])) + '\n'

FOUR = 'for i in x:', 'while 1:', 'with x:', 'if 1:'

def one_level(*heads, last='pass'):
    """ a function with one statement of many parts, the last of which holds the last lines """
    lines = [*['pass'] * (len(heads) - 1), last]
    return 'def f():\n' + ''.join(f'    {head}:\n        {line}\n' for head, line in zip(heads, lines))

CODE = { # name: (source, its depth)
    'no function': ('x = 1\n', 0),
    'nothing inside': (nested('def f():'), 0),
    'four': (nested('def f():', *FOUR), 4),
    'five': (nested('def f():', *FOUR, 'if 1:'), 5),
    'asynchronous': (nested('async def f():', 'async for i in x:', 'async with x:'), 2),
    'one function inside': (nested('def f():', 'def g():'), 1),
    'two functions inside': (nested('def f():', 'def g():', 'async def h():'), 2),
    'a class inside': (nested('def f():', 'class A:'), 0),
    'a class with a method inside': (nested('def f():', 'class A:', 'def g(self):', 'if 1:'), 2),
    'methods': ('class A:\n' + '    def f(self):\n        pass\n' * 9, 0),
    'a method of a class in a class': (nested('class A:', 'class B:', 'def f(self):', 'if 1:'), 1),
    'a method below an if': (nested('class A:', 'if 1:', 'def f(self):', 'while 1:'), 1),
    'a function below an if': (nested('if 1:', 'def f():', *FOUR), 4),
    'the top level': (nested('if 1:', 'if 1:', 'if 1:'), 3),
    'elif': (one_level('if 0', *['elif 1'] * 9), 1),
    'elif, else': (one_level('if 0', *['elif 1'] * 9, 'else', last='if 1: pass'), 2),
    'in an elif': (one_level('if 0', *['elif 1'] * 9, last='while 1: pass'), 2),
    'else: if': (nested('def f():', 'if 1:\n        pass\n    else:', 'if 1:', 'if 1:'), 3),
    'else: if, elif': (one_level('if 1', 'else', last='if 1: pass\n        elif 1:\n            if 1: pass'), 3),
    'match': (nested('def f():', 'match x:', 'case 1 if y:'), 1),
    'in a case': (nested('def f():', 'match x:', 'case 1:', 'if 1:'), 2),
    'except': (one_level('try', 'except E'), 1),
    'finally': (one_level('try', 'finally'), 1),
    'in an except': (one_level('try', 'except E', last='if 1: pass'), 2),
    'in an else of try': (one_level('try', 'except E', 'else', last='if 1: pass'), 2),
    'in a finally': (one_level('try', 'except E', 'finally', last='if 1: pass'), 2),
    'in an else of for': (one_level('for i in x', 'else', last='if 1: pass'), 2),
    'expressions': (nested('def f():', last='x = [lambda: (a if a else b) for a in b if a for b in c]'), 0),
}

@pytest.mark.parametrize('name', CODE)
def test_depth_is_what_it_looks_like(name):
    text, depth = CODE[name]
    assert max([found for _, found, _ in levels(ast.parse(text))], default=0) == depth

def test_deep_functions_are_found():
    deep = nested('def f():', *FOUR, 'if 1:', last='pass')
    assert deep_functions('a.py', deep + deep) == ['a.py:6: depth 5 in f', 'a.py:13: depth 5 in f']
    assert deep_functions('a.py', nested('def f():', *FOUR)) == []
    assert deep_functions('a.py', nested('class A:', 'def f(self):', 'def g():', *FOUR)) == ['a.py:7: depth 5 in f']
    twice = nested('def f():', *FOUR, 'if 1:\n' + ' ' * 24 + 'pass\n' + ' ' * 20 + 'else:', 'if 1:', 'if 1:')
    assert deep_functions('a.py', twice + '    ' + deep.replace('\n', '\n    ')) == ['a.py:10: depth 7 in f']
    top = nested(*FOUR, 'if 1:')
    assert deep_functions('a.py', top) == ['a.py:5: depth 5 in the top level']
    assert deep_functions('train.py', top) == [] and deep_functions('train.py', deep) == ['train.py:6: depth 5 in f']

THERE = '''![a](assets/a.png)
[![a](assets/a.png)](README.md)
| ![a](assets/a.png) | ![a](assets/b.png) |
<img src='assets/a.png' width=3>
<img alt="a" src="assets/a.png">
<source srcset="assets/b.png 1x, assets/a.png 2x">
![a](/assets/a.png "a title")
![a](./assets/a.png)
![a](<assets/a.png>)
![a](assets/a.png#gh-dark-mode-only)
![a](assets/a.png?raw=true)
[the curve](assets/a.png)
[curve]: assets/a.png
`assets/a.png` shows the curve
python -m tools.plot --output=assets/a.png'''.split('\n')

NOT_OURS = ['![a](https://example.org/c.png)', '![a](//example.org/assets/c.png)', '`--output=c.png`',
            'a picture, c.png', '[curve]: https://example.org/assets/c.png']

def test_missing_pictures_are_found(tmp_path):
    for name in 'assets/a.png', 'assets/b.png', 'tools/b.GIF':
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b'')
    missing = lambda path, text: [said.split('no ')[1] for said in missing_pictures(path, text, str(tmp_path))]
    assert missing_pictures('README.md', 'a\n![b](c.png)\n', str(tmp_path)) == ['README.md:2: there is no c.png']
    for text in THERE:
        assert missing('README.md', text) == []
        assert missing('README.md', text.replace('a.png', 'c.png')) == ['assets/c.png']
    for text in NOT_OURS:
        assert missing('README.md', text) == []
    assert missing('tools/README.md', '![a](b.GIF) ![a](../assets/a.png) ![a](a.png)') == ['tools/a.png']

def test_which_files_are_ours(tmp_path):
    ours = ['model.py', 'data/text/prepare.py', 'tests/test_x.py', 'tools/é x.py']
    others = ['.venv/lib/a.py', 'env/pyvenv.cfg', 'env/lib/a.py', 'conda/conda-meta/a.py', 'conda/a.py',
              'lib/site-packages/a.py', 'out-run/a.py']
    for path in [*ours, *others, 'data/text/downloaded/a.py', 'notes.txt']:
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text('')
    assert files('.py', str(tmp_path)) == sorted(ours) # no git: as from an archive
    if not shutil.which('git'):
        pytest.skip('needs git')
    git = lambda *args: subprocess.run(['git', '-C', tmp_path, *args], check=True, capture_output=True)
    git('init')
    (tmp_path / '.gitignore').write_text('out*/\n.venv/\ndownloaded/\n')
    git('add', 'model.py', 'tools')
    (tmp_path / 'deleted.py').write_text('')
    git('add', 'deleted.py')
    (tmp_path / 'deleted.py').unlink()
    assert files('.py', str(tmp_path)) == sorted(ours) # tracked or new, neither ignored nor deleted
    (tmp_path / '.git' / 'HEAD').unlink() # git no longer knows it as a repository
    (tmp_path / '.gitignore').unlink()
    assert files('.py', str(tmp_path)) == sorted(ours)
