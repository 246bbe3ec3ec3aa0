""" defaults decide types, the last word wins, and whatever comes in, a sentence and never a traceback goes out """
import os
import subprocess
import sys
import pytest
from configurator import configure

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
SCRIPT = '''""" Trains nothing.
$ python script.py --seed=1
"""
import math
out_dir = 'runs/#1' # where the run lives
learning_rate = 1e-3 # peak
seed = 1337
max_iters = 200 # iterations
compile = True # torch.compile
start = ''
tags: str | None = None # anything
_hidden = 3
widths = [1, 2]
seed = seed # not the comment of seed
# -----
from configurator import configure
config = configure(globals())
print(config)
'''

@pytest.fixture
def go(tmp_path, monkeypatch):
    """ go(args, **files): write the files as <name>.py, configure the settings of SCRIPT, return the config """
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'script.py').write_text(SCRIPT)
    def run(*args, **files):
        for name, text in files.items():
            (tmp_path / f'{name}.py').write_bytes(text if isinstance(text, bytes) else text.encode())
        settings = {'__file__': str(tmp_path / 'script.py')}
        exec(SCRIPT.split('# -----')[0], settings)
        config = configure(settings, list(args))
        assert all(settings[k] is v for k, v in config.items()) # in place, and the same
        return config
    return run

@pytest.fixture
def refused(go, capsys):
    """ refused(args, **files): the one sentence on stderr """
    def run(*args, **files):
        with pytest.raises(SystemExit) as e:
            go(*args, **files)
        out, err = capsys.readouterr()
        assert e.value.code == 2 and out == '' and err.startswith('error: ') and err.count('\n') == 1, err
        return err
    return run

def test_the_settings_are_the_plain_scalars_in_order(go):
    assert list(go()) == ['out_dir', 'learning_rate', 'seed', 'max_iters', 'compile', 'start', 'tags']

def test_the_last_word_wins(go):
    files = dict(a='seed = 2\nmax_iters = 7', b='seed = 3')
    assert go('--seed=1', 'a.py', **files)['seed'] == 2
    assert go('a.py', '--seed=1')['seed'] == 1
    assert list(go('a.py', '--config=b.py').values())[2:4] == [3, 7]

def test_a_config_sees_the_settings_so_far_and_may_hold_code(go):
    text = ('from __future__ import annotations\nimport os, math as m\nfrom math import pi as p, floor\n_two = 2\n'
            'def twice(x): return x * _two\nclass Thing: pass\nseed = twice(max_iters) + floor(p)')
    assert go('--max_iters=5', 'a.py', a=text)['seed'] == 13

@pytest.mark.parametrize('key, text, value', [
    ('learning_rate', '1', 1.0), ('learning_rate', 'inf', float('inf')), ('learning_rate', '-2e-3', -2e-3),
    ('max_iters', '2e3', 2000), ('max_iters', '-1', -1), ('compile', 'False', False), ('compile', 'false', False),
    ('start', '123', '123'), ('start', '"a"', '"a"'), ('start', 'a=b', 'a=b'), ('start', '', ''),
    ('start', 'None', 'None'), ('tags', '3', '3'), ('tags', 'None', None), ('tags', 'abc', 'abc'),
    ('tags', 'true', 'true'), ('tags', '[1]', '[1]')])
def test_the_default_decides_the_type(go, key, text, value):
    in_file = f'{key} = {value!r}'.replace('inf', 'float("inf")')
    for config in go(f'--{key}={text}'), go('a.py', a=in_file):
        assert config[key] == value and type(config[key]) is type(value)

def test_a_file_widens_like_the_command_line(go):
    config = go('a.py', a='learning_rate = 1\nmax_iters = 2e3')
    assert repr(config['learning_rate']) == '1.0' and repr(config['max_iters']) == '2000'
    assert type(go('a.py', a='import numpy as np\nlearning_rate = np.sqrt(2)')['learning_rate']) is float
    assert go('a.py', a=b'\xef\xbb\xbfseed = 2')['seed'] == 2 # a byte order mark
    assert go('a.py', '--tags=x', a='tags = "3"')['tags'] == 'x' and go('a.py', '--tags=none', a='tags = "3"')['tags'] is None

DEFAULTS = {'max_iters': ('200', 'int'), 'learning_rate': ('0.001', 'float'), 'compile': ('True', 'bool')}

@pytest.mark.parametrize('key, texts', [('max_iters', ['2.5', 'True', 'abc', '', 'None', 'inf', '1e999']),
                                        ('learning_rate', ['True', 'abc', '']), ('compile', ['1', 'yes', '', 'TRUE'])])
def test_a_wrong_type_is_refused(refused, key, texts):
    for text in texts:
        err = refused(f'--{key}={text}').replace('inf', text) # 1e999 is read, and shown, as inf
        assert all(word in err for word in (key, text or "''", *DEFAULTS[key], 'command line')), err

@pytest.mark.parametrize('line', ['seed = [1]', 'seed = "1"', 'seed = True', 'seed = float("nan")', 'seed = len',
                                  'compile = 0', 'start = 3', 'start = None', 'learning_rate = 10**5000'])
def test_a_wrong_type_in_a_file_is_refused(refused, line):
    err = refused('a.py', a=line)
    assert f'{line.split()[0]} must be' in err and 'a.py' in err

def test_an_unknown_key_names_its_source_and_the_nearest(refused):
    for arg, source in ('--learnin_rate=1', 'command line'), ('a.py', 'a.py'):
        err = refused(arg, a='learnin_rate = 1')
        assert 'learnin_rate' in err and source in err and 'mean learning_rate?' in err
    assert 'zzz' in refused('a.py', a='zzz = [1]') and 'mean' not in refused('--zzz=1')
    assert '_hidden' in refused('--_hidden=1')

def test_malformed_arguments_are_refused(refused):
    assert '--compile needs a value, e.g. --compile=True' in refused('--compile')
    assert '--max_iters needs a value, e.g. --max_iters=200' in refused('--max_iters', '7')
    assert '--config needs a value' in refused('--config', 'a.py')
    assert 'unknown setting -x' in refused('-x') and '-5' in refused('-5')
    assert refused('--') and refused('') and refused('--config=')

def test_a_broken_file_is_refused_with_its_line(refused, tmp_path):
    assert 'mean train.py?' in refused('trian.py', train='') and 'nowhere/a.py' in refused('--config=nowhere/a.py')
    (tmp_path / 'folder').mkdir()
    assert 'irectory' in refused('folder') and 'utf-8' in refused('a.py', a=b'\xff\xfe')
    assert 'a.py, line 2' in refused('a.py', a='seed = 1\nseed = = 2')
    err = refused('a.py', a='seed = 1\ndef f():\n    return sede\nf()')
    assert 'a.py, line 3' in err and 'sede' in err
    assert refused('a.py', a='raise SystemExit(0)') and refused('a.py', a='\0') and refused('\0')

@pytest.mark.parametrize('flag', ['-h', '--help'])
def test_help_shows_each_setting_as_it_stands(go, capsys, flag):
    with pytest.raises(SystemExit) as e:
        go('--seed=7', flag, '--no_such=1')
    assert e.value.code == 0 and capsys.readouterr().out.splitlines() == [
        'Trains nothing.', '$ python script.py --seed=1', '',
        "--out_dir=runs/#1       where the run lives", "--learning_rate=0.001   peak", "--seed=7",
        "--max_iters=200         iterations", "--compile=True          torch.compile", "--start=''",
        "--tags=None             (str or None) anything"]
    with pytest.raises(SystemExit):
        go(f'--max_iters=0x{"f" * 5000}', flag) # python refuses to print an int this long, help does not mind

def test_a_real_script_reads_sys_argv(tmp_path):
    (tmp_path / 'script.py').write_text(SCRIPT)
    env = {**os.environ, 'PYTHONPATH': ROOT}
    good, bad = [subprocess.run([sys.executable, 'script.py', arg], cwd=tmp_path, env=env, text=True,
                                capture_output=True) for arg in ('--seed=3', '--sed=3')]
    assert good.returncode == 0 and "'seed': 3" in good.stdout and good.stderr == ''
    assert bad.returncode == 2 and bad.stdout == '' and bad.stderr.count('\n') == 1 and 'mean seed?' in bad.stderr

def test_never_a_traceback(go):
    hypothesis = pytest.importorskip('hypothesis')
    st = hypothesis.strategies
    keys = st.sampled_from(['out_dir', 'learning_rate', 'seed', 'compile', 'start', 'tags', 'sed', 'config', '', '_x'])
    nasty = st.sampled_from(['((((' * 99, '9' * 5000, '0x' + 'f' * 5000, '[1', '1j', "b'x'", '-' * 9999 + '1'])
    values = st.one_of(st.text(), st.floats().map(repr), st.integers().map(repr), nasty)
    words = st.sampled_from(['a.py', '.', '-h', '--help', '-'])
    args = st.lists(st.one_of(st.text(), st.builds('--{}={}'.format, keys, values), words), max_size=4)
    code = st.sampled_from(['import os', 'def f(', '1/0'])
    lines = st.one_of(st.text(), st.builds('{} = {}'.format, keys, values), code)
    files = st.one_of(st.binary(), st.lists(lines, max_size=4).map(lambda x: '\n'.join(x).encode('utf-8', 'replace')))

    @hypothesis.settings(max_examples=300, deadline=None, database=None)
    @hypothesis.given(args, files)
    def law(args, text):
        try:
            go(*args, a=text)
        except SystemExit as e:
            assert e.code in (0, 2)
    law()
