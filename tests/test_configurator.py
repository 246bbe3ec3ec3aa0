""" defaults decide types, the last word wins, and whatever comes in, a sentence and never a traceback goes out """
import ast
import dataclasses
import os
import subprocess
import sys
import pytest
from configurator import configure, nearest, settings_of

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
from configurator import configure, nearest, settings_of
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
    assert go('a.py', '--tags=x', a='tags = "3"')['tags'] == 'x' \
        and go('a.py', '--tags=none', a='tags = "3"')['tags'] is None

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

# ---- suggestions

def settings_at_the_top(script):
    """ names of the settings of one of our scripts """
    found = []
    for node in ast.parse(open(os.path.join(ROOT, script), encoding='utf-8').read()).body:
        if isinstance(node, (ast.Assign, ast.AnnAssign)):
            if not isinstance(node.value, (ast.Constant, ast.UnaryOp)):
                break
            found.append((node.target if isinstance(node, ast.AnnAssign) else node.targets[0]).id)
    return found

SETTINGS = {script: settings_at_the_top(script) for script in ('train.py', 'sample.py', 'prepare.py')}

@pytest.mark.parametrize('typed, script, meant', [
    ('learningrate', 'train.py', 'learning_rate'), ('learnin_rate', 'train.py', 'learning_rate'),
    ('laerning_rate', 'train.py', 'learning_rate'), ('learningrat', 'train.py', 'learning_rate'),
    ('n_layers', 'train.py', 'n_layer'), ('n_heads', 'train.py', 'n_head'), ('n_embed', 'train.py', 'n_embd'),
    ('batchsize', 'train.py', 'batch_size'), ('batch-size', 'train.py', 'batch_size'),
    ('batchSize', 'train.py', 'batch_size'), ('BATCH_SIZE', 'train.py', 'batch_size'),
    ('max_iter', 'train.py', 'max_iters'), ('maxiters', 'train.py', 'max_iters'),
    ('max_itres', 'train.py', 'max_iters'), ('eval_iter', 'train.py', 'eval_iters'),
    ('max_epoch', 'train.py', 'max_epochs'),
    ('drop_out', 'train.py', 'dropout'), ('dropuot', 'train.py', 'dropout'), ('droppout', 'train.py', 'dropout'),
    ('wieght_decay', 'train.py', 'weight_decay'), ('sed', 'train.py', 'seed'), ('objectiv', 'train.py', 'objective'),
    ('gradient_acumulation_step', 'train.py', 'gradient_accumulation_steps'), ('devise', 'train.py', 'device'),
    ('accumulation_steps', 'train.py', 'gradient_accumulation_steps'), ('outdir', 'train.py', 'out_dir'),
    ('muon_learningrate', 'train.py', 'muon_learning_rate'), ('pso', 'train.py', 'pos'),
    ('temprature', 'sample.py', 'temperature'), ('tempreture', 'sample.py', 'temperature'),
    ('topk', 'sample.py', 'top_k'), ('max_tokens', 'sample.py', 'max_new_tokens'),
    ('num_sample', 'sample.py', 'num_samples'), ('confidence_treshold', 'sample.py', 'confidence_threshold'),
    ('plan_ln', 'prepare.py', 'plan_len'), ('varlength', 'prepare.py', 'var_length')])
def test_a_slip_is_recognised(typed, script, meant):
    assert nearest(typed, SETTINGS[script]) == f'; did you mean {meant}?'

@pytest.mark.parametrize('typed', '''
    use_diffusion_forcing training_mode question_len plan_len exec_len use_hdp_attention hidden_size num_layers
    max_seq_length min_mask_ratio max_mask_ratio schedule_type num_steps num_iterations first_hitting var_length
    save_every_n_steps save_every_n_epochs logging_steps max_iterations noise_start noise_end stages
    use_all_stages_for_training dataset_partial_targets insert_ratio_start delete_margin delete_lambda
    min_iters n_max max beta3 betas top_n checkpoint interval diffusion vocab_size num_workers model_name mask_ratio
    gen_length block_length hidden_dim num_heads embed_dim max_steps eval_steps warmup_steps lr_scheduler_type
    ema_decay lr steps_per_block noise_schedule _ -- é 123'''.split())
def test_another_name_for_something_is_no_slip(typed):
    """ what people know from elsewhere, and names that share letters with ours: a wrong guess is worse than none """
    for script, names in SETTINGS.items():
        assert typed in names or nearest(typed, names) == '', script

def test_of_several_guesses_the_nearest_is_made_and_none_where_a_word_is_missing():
    assert nearest('n_lyer', ['n_layers', 'n_layer']) == '; did you mean n_layer?'
    assert nearest('train_shakespeare', ['train_shakespeare_char', 'train_shakespeare_10m']) == ''
    assert nearest('shakespear', ['python_docs', 'shakespeare_char']) == '; did you mean shakespeare_char?'
    assert nearest('vraag', ['плàн', 'vragg']) == '; did you mean vragg?' and nearest('план', ['плана']) != ''

# ---- settings that another setting brings along

@dataclasses.dataclass
class Shared:
    size: int = 1 # of everything
    seed: int = 0 # a setting of the script
    text_size: int = 0 # computed

@dataclasses.dataclass
class Wide(Shared):
    """ is not shown """
    width: int = 8 # columns, é
    rate: float = 0.5
    limit: int = None # rows
    kind: str = 'plain' # plain | fancy
    derived: int = dataclasses.field(default=3, init=False) # no setting

KINDS = {'plain': Shared, 'wide': Wide, 'wider': Wide}

@pytest.fixture
def bring(tmp_path, monkeypatch):
    """ bring(args, saved, **files): configure a script whose setting `kind_of` brings the fields of one of KINDS """
    monkeypatch.chdir(tmp_path)
    source = "kind_of = 'plain' # a row of KINDS\nseed = 1 # of chance\nsize = 2\n"
    (tmp_path / 'script.py').write_text(source)
    def run(*args, saved={}, **files):
        for name, text in files.items():
            (tmp_path / f'{name}.py').write_text(text)
        settings, given = {'__file__': str(tmp_path / 'script.py')}, {}
        exec(source, settings)
        own = lambda values: {k: settings_of(kind, {*values, 'text_size'}) for k, kind in KINDS.items()}
        config = configure(settings, list(args), saved, given, own=('kind_of', own))
        assert not {'width', 'rate', 'limit', 'kind'} & settings.keys() # in what is returned, and nowhere else
        return config, given
    return run

def said(capsys, call, *args, **more):
    """ the sentence in which a call ends """
    with pytest.raises(SystemExit) as e:
        call(*args, **more)
    out, err = capsys.readouterr()
    assert e.value.code == 2 and out == '' and err.count('\n') == 1, err
    return err.removeprefix('error: ').strip()

def test_the_choice_brings_its_settings(bring):
    plain = {'kind_of': 'plain', 'seed': 1, 'size': 2}
    wide = plain | {'kind_of': 'wide', 'width': 8, 'rate': 0.5, 'limit': None, 'kind': 'plain'}
    assert bring()[0] == plain and bring('--kind_of=wide')[0] == wide
    args = '--width=2e1', '--rate=1', '--limit=none', '--kind=fancy'
    for order in (*args, '--kind_of=wide'), ('--kind_of=wide', *args):
        config, given = bring(*order)
        assert config == wide | {'width': 20, 'rate': 1.0, 'kind': 'fancy'} and type(config['rate']) is float
        assert given == dict.fromkeys(['kind_of', 'width', 'rate', 'limit', 'kind'], 'on the command line')
    assert bring('--limit=3', '--kind_of=wider')[0]['limit'] == 3

def test_the_last_word_on_the_choice_counts(bring, capsys):
    files = dict(a="width = 5\nkind_of = 'wide'", b='width = 6')
    assert bring('a.py', **files)[0]['width'] == 5
    assert bring('b.py', 'a.py', **files)[0]['width'] == 5 and bring('a.py', 'b.py', **files)[0]['width'] == 6
    assert bring('--kind_of=plain', 'a.py', **files)[1]['width'] == 'in config file a.py'
    assert said(capsys, bring, 'a.py', '--kind_of=plain', **files) == \
        'width in config file a.py is a setting of kind_of wide and wider alone, and kind_of is plain'

@pytest.mark.parametrize('args, sentence', [
    (['--width=3'], 'width on the command line is a setting of kind_of wide and wider alone, and kind_of is plain'),
    (['--kind_of=wide', '--width=x'], 'width must be int (default 8), got str x on the command line'),
    (['--width=2.5', '--kind_of=wide'], 'width must be int (default 8), got float 2.5 on the command line'),
    (['--limit=x', '--kind_of=wide'], 'limit must be int or None (default None), got str x on the command line'),
    (['--width', '--kind_of=wide'], '--width needs a value, e.g. --width=8'),
    (['--kind', '--kind_of=wide'], '--kind needs a value, e.g. --kind=plain'),
    (['--kind_of=wide', '--widht=3'], 'unknown setting widht on the command line; did you mean width?'),
    (['--widht=3'], 'unknown setting widht on the command line; did you mean width?'),
    (['--kind_of=wide', '--text_size=3'], 'unknown setting text_size on the command line'),
    (['--kind_of=wide', '--derived=3'], 'unknown setting derived on the command line'),
    (['--kind_of=nothing', '--zzz=3'],
     'unknown setting zzz on the command line, and kind_of is nothing, which is unknown too')])
def test_a_wrong_setting_of_a_choice_is_a_sentence(bring, capsys, args, sentence):
    assert said(capsys, bring, *args) == sentence

def test_an_earlier_run_may_have_what_is_no_setting_any_more(bring, capsys):
    """ of another version, or of another choice; what it has of this one comes before the command line """
    saved = {'kind_of': 'wide', 'seed': 7, 'width': 4, 'gone': 1}
    assert bring(saved=saved)[0] | {'seed': 0} == bring('--kind_of=wide', '--width=4')[0] | {'seed': 0}
    config, given = bring('--width=5', saved=saved)
    assert config['width'] == 5 and config['seed'] == 7 and given == {'width': 'on the command line'}
    assert 'width' not in bring('--kind_of=plain', saved=saved)[0]
    assert said(capsys, bring, saved=saved | {'width': 'x'}) == \
        'width must be int (default 8), got str x in the settings of the run'
    asked = lambda values: saved if values['seed'] == 3 else {}
    assert bring('--seed=3', '--width=6', saved=asked)[0]['width'] == 6
    assert 'width' not in bring('--seed=4', saved=asked)[0]

def test_help_shows_what_a_choice_brings(bring, capsys):
    def shown(*args):
        with pytest.raises(SystemExit):
            bring(*args)
        return capsys.readouterr().out.split('\n\n')
    script = '--kind_of=plain   a row of KINDS\n--seed=1          of chance\n--size=2'
    assert shown('--help') == ['', script, 'More settings: --kind_of=wide --help, --kind_of=wider --help\n']
    assert shown('--width=3', '--kind_of=wide', '-h')[1:] == [
        '--kind_of=wide   a row of KINDS\n--seed=1         of chance\n--size=2',
        'Settings of kind_of wide alone:\n--width=3        columns, é\n--rate=0.5\n'
        '--limit=None     (int or None) rows\n--kind=plain     plain | fancy\n']

def test_a_class_that_cannot_be_read_as_settings_is_a_bug():
    class Forgot(Shared): # its field would silently be none
        width: int = 3
    with pytest.raises(AssertionError, match='Forgot has fields of its own, so it needs @dataclass too'):
        settings_of(Forgot)
    typed = dataclasses.make_dataclass('Typed', [('widths', list, dataclasses.field(default_factory=list))])
    with pytest.raises(AssertionError, match='widths of Typed has no default'):
        settings_of(typed)
    with pytest.raises(AssertionError, match='a setting is a bool, int, float or str'):
        settings_of(dataclasses.make_dataclass('Typed', [('pair', tuple, (1, 2))]))
    assert settings_of(dataclasses.make_dataclass('Typed', [('n', int, 3)])) == {'n': (3, (int,), '')} # no source

@pytest.mark.parametrize('argv, hint', [
    (['--nothing', '3'], 'write --nothing=3'), (['--nothing', 'x.py'], 'write --nothing=x.py'),
    (['3'], None), (['--steps=1', '3'], None), (['-x', '3'], None)])
def test_a_value_apart_from_its_name(argv, hint, capsys):
    """ is taken for a config file, and the sentence says how to write it """
    with pytest.raises(SystemExit):
        configure({'steps': 1}, argv)
    said = capsys.readouterr().err
    assert 'there is no config file' in said
    assert (f'if it is a value, {hint}' in said) if hint else 'if it is a value' not in said
