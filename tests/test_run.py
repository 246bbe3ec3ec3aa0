"""
What a run owes to whoever started it: settings that stay what they are, a folder that nothing else writes into, counts
that are true, and errors that are a sentence or a traceback, each where it belongs.
"""
import builtins
import json
import os
import re
import shutil
import subprocess
import sys
import textwrap

import pytest
import torch

import model as models
import prepare
from tests.test_train import ROOT, TINY, corpus, here, in_process, log_of, trained # noqa: F401, some are fixtures

SMALL = [a for a in TINY if not a.startswith(('--device', '--compile'))] # a user's defaults, whatever they are here
QUICK = ['--scoreboard_windows=0', '--log_interval=1']

def process(*args, env={}, **more):
    """ train.py in a process of its own, with another environment """
    return subprocess.run([sys.executable, 'train.py', *map(str, args)], cwd=ROOT, capture_output=True, text=True,
                          env={**os.environ, 'OMP_NUM_THREADS': '1', **env}, timeout=300, **more)

@pytest.fixture
def provided(corpus, tmp_path):
    """ provided(code): a copy of the corpus whose provider.py holds the code """
    def write(code):
        folder = tmp_path / 'provided'
        shutil.copytree(corpus, folder, dirs_exist_ok=True)
        (folder / 'provider.py').write_text(textwrap.dedent(code))
        return folder
    return write

def state_of(out, name='latest'):
    return torch.load(out / f'ckpt_{name}.pt', weights_only=True)

# ---- settings and what is computed from them

@pytest.mark.parametrize('kind', ['ours', 'nanogpt', 'gpt2'])
def test_weights_are_taken_over_on_the_default_device(corpus, trained, tmp_path, here, kind):
    """ no --device, no --compile, no --dtype: what is computed from them stays computed """
    data, source = corpus, trained[0] / 'ckpt_best.pt'
    shape = dict(n_layer=1, n_head=2, n_embd=16)
    if kind == 'nanogpt':
        args = dict(**shape, block_size=16, bias=False, vocab_size=prepare.read_meta(str(corpus))['text_size'])
        gpt = models.GPT(models.GPTConfig(**args, pos='learned', mlp='gelu', qk_norm=False, tie_weights=True))
        source = tmp_path / 'ckpt.pt'
        torch.save({'model': gpt.state_dict(), 'model_args': args | {'dropout': 0.0}}, source)
    if kind == 'gpt2':
        transformers, source = pytest.importorskip('transformers'), tmp_path / 'hf'
        config = transformers.GPT2Config(**shape, n_positions=16, vocab_size=50257)
        transformers.GPT2LMHeadModel(config).save_pretrained(source)
        data = tmp_path / 'bpe' # ids of GPT-2 without its tokenizer's files
        shutil.copytree(corpus, data)
        meta = json.loads((data / 'meta.json').read_text())
        ids = dict(end_id=50256, begin_id=50257, mask_id=50258, pad_id=50259, text_size=50257, vocab_size=50304)
        (data / 'meta.json').write_text(json.dumps(meta | ids | {'tokenizer': 'gpt2'}))
    small = [a for a in SMALL if 'n_' not in a]
    here('train.py --scoreboard_windows=2', *small, f'--dataset={data}', f'--init_from={source}',
         f'--out_dir={tmp_path}/run')
    results = json.loads((tmp_path / 'run' / 'results.json').read_text())
    where, _, precision = models.pick_device()
    assert (results['device'], results['dtype']) == (str(where), precision)

def test_a_setting_beside_weights_is_not_overruled(corpus, trained, tmp_path, here):
    """ another value is another model than the weights, from the command line or a config file; the same one is not """
    args = [*SMALL, *QUICK, f'--dataset={corpus}', f'--init_from={trained[0]}/ckpt_best.pt',
            f'--out_dir={tmp_path}/run']
    text = here('train.py', *args, '--n_layer=2', code=2)
    assert 'n_layer is 2 on the command line, but the weights of' in text \
        and 'have n_layer=1: leave n_layer out' in text
    (tmp_path / 'mine.py').write_text("norm = 'rmsnorm'\n")
    text = here('train.py', *args, str(tmp_path / 'mine.py'), code=2)
    assert 'norm is rmsnorm in config file' in text and not (tmp_path / 'run').exists()
    (tmp_path / 'mine.py').write_text("norm = 'layernorm'\n")
    here('train.py', *args, str(tmp_path / 'mine.py'))

@pytest.mark.parametrize('text, value', [('false', False), ('False', False), ('true', True), ('None', None),
                                         ('none', None)])
def test_a_setting_that_may_be_none_or_a_bool(tmp_path, text, value):
    config = configured(tmp_path, 'compile: bool | None = None # torch.compile', f'--compile={text}')
    assert config['compile'] is value

def configured(tmp_path, settings, *argv, after=''):
    """ what a script with these settings makes of a command line """
    from configurator import configure
    script = f'{settings}\nfrom configurator import configure\nconfig = configure(globals(), {list(argv)})\n{after}'
    path = tmp_path / f'script{abs(hash(script))}.py'
    path.write_text(script)
    names = {'__file__': str(path), '__name__': 'script'}
    exec(compile(script, path, 'exec'), names)
    assert configure
    return names['config']

@pytest.mark.parametrize('annotation, text', [
    ('bool | None', 'maybe'), ('bool | None', '1'), ('bool | None', '[]'), ('int | None', '2.5'),
    ('int | None', 'abc'), ('int | None', 'True'),
    ('int | None', '[1]'), ('float | None', 'abc'), ('float | None', 'True'), ('float', 'None')])
def test_what_a_setting_may_not_be_is_refused(tmp_path, capsys, annotation, text):
    with pytest.raises(SystemExit) as e:
        configured(tmp_path, f'knob: {annotation} = {"1.0" if annotation == "float" else None}', f'--knob={text}')
    said = capsys.readouterr().err
    assert e.value.code == 2 and f"knob must be {annotation.replace(' | ', ' or ')}" in said and said.count('\n') == 1

def test_annotations_are_read_in_every_form(tmp_path, capsys):
    import_typing = 'from typing import Optional, Union\n'
    for form in 'knob: int | None = None', f'{import_typing}knob: Optional[int] = None', 'knob: "int | None" = None', \
            f'{import_typing}knob: Union[int, None] = None', \
            'from __future__ import annotations\nknob: int | None = None':
        assert configured(tmp_path, form, '--knob=2e3')['knob'] == 2000
        assert configured(tmp_path, form)['knob'] is None
    assert configured(tmp_path, 'knob: float | None = None', '--knob=3') == {'knob': 3.0}
    assert configured(tmp_path, 'knob: str | None = None', '--knob=3') == {'knob': '3'}
    with pytest.raises(SystemExit):
        configured(tmp_path, 'knob: int | None = None # how many', '--help')
    assert '--knob=None   (int or None) how many' in capsys.readouterr().out

def test_a_none_that_does_not_say_what_it_may_be_is_a_bug_of_the_script(tmp_path):
    with pytest.raises(AssertionError, match='the default of knob is None'):
        configured(tmp_path, 'knob = None # anything')

@pytest.mark.parametrize('after', [
    'best = 3', 'best += 1', 'best: int = 2', 'for best in (1, 2): pass', 'with open(__file__) as best: pass',
    'import os as best', 'def best(): pass',
    'def f():\n    global best\n    best = 2', 'if True:\n    a, best = 1, 2',
    'try: pass\nexcept OSError as best: pass', 'class best: pass', '(a := 1) + (best := 2)'])
def test_a_setting_that_the_script_assigns_again_is_a_bug_of_the_script(tmp_path, after):
    """ --help would show it, and another value of the same name would be at work """
    with pytest.raises(AssertionError, match='assigns best again'):
        configured(tmp_path, 'best = 1 # a setting', after=after)

def test_other_names_may_be_assigned(tmp_path):
    after = 'def f(best):\n    best = 2\n    return [best for best in (1, 2)]\nclass A:\n    best = 3\nrank = 1\n'
    assert configured(tmp_path, 'best = 1', after=after) == {'best': 1}

@pytest.mark.parametrize('name, free', [(name, False)
    for name in ('best', 'iteration', 'rank', 'tokens', 'network', 'where')] + [('kind', True), ('row_count', True)])
def test_a_setting_of_ones_own_is_refused_or_works(tmp_path, here, name, free):
    """ whoever adds a setting to train.py that the script uses for something else is told so """
    source = open(os.path.join(ROOT, 'train.py')).read().replace('# data\n', f'{name} = 7 # mine\n# data\n', 1)
    for file in 'model.py', 'prepare.py', 'configurator.py':
        shutil.copy(os.path.join(ROOT, file), tmp_path)
    (tmp_path / 'train.py').write_text(source)
    if free:
        assert re.search(rf'^--{name}=7 +mine$', here('train.py --help', folder=tmp_path), re.M)
    else:
        with pytest.raises(AssertionError, match=f'assigns {name} again'):
            here('train.py --help', folder=tmp_path)

# ---- errors: a sentence for a setting, a traceback for a bug

BUGS = {
    'forward': ('a, b, c = idx.shape', 'ValueError'), 'assert': ('assert idx is None', 'AssertionError'),
    'key': ("{}['x']", 'KeyError'), 'type': ("1 + 'a'", 'TypeError'),
    'file': ("open('no_such_file')", 'FileNotFoundError'),
    'runtime': ('idx @ idx', 'RuntimeError'), 'attribute': ('idx.nothing', 'AttributeError'),
    'index': ('[][1]', 'IndexError'),
    'zero': ('1 / 0', 'ZeroDivisionError'), 'shape': ('idx.view(7, 1000)', 'RuntimeError')}

PLACES = [(bug, 'forward') for bug in BUGS] + [(bug, place) for bug in ('forward', 'assert', 'file')
                                               for place in ('loop', 'metrics', '__init__')]

@pytest.mark.parametrize('bug, place', PLACES)
def test_a_bug_in_a_class_of_ones_own_keeps_its_traceback(provided, tmp_path, here, bug, place):
    line, kind = BUGS[bug]
    data = provided(f'''
        from model import GPT
        class Mine(GPT):
            calls = 0
            def spoil(self, idx):
                {line} # somebody's mistake
            def __init__(self, config):
                super().__init__(config)
                import torch
                if {place == '__init__'}: self.spoil(torch.zeros(2, 3).long())
            def forward(self, idx, targets=None):
                self.calls += 1
                if {place == 'forward'} or {place == 'loop'} and self.training and self.calls > 3: self.spoil(idx)
                return super().forward(idx, targets)
            def metrics(self, idx, targets):
                if {place == 'metrics'}: self.spoil(idx)
                return super().metrics(idx, targets)
        OBJECTIVES = {{'mine': Mine}}
    ''')
    with pytest.raises(getattr(builtins, kind)) as e: # in a process of its own: a traceback and exit code 1
        here('train.py --objective=mine', *SMALL, *QUICK, f'--dataset={data}', f'--out_dir={tmp_path}/run')
    assert any(entry.name == 'spoil' for entry in e.traceback)

def test_a_traceback_reaches_the_terminal(provided, tmp_path):
    data = provided('''
        from model import GPT
        class Mine(GPT):
            def forward(self, idx, targets=None):
                a, b, c = idx.shape # two are enough
        OBJECTIVES = {'mine': Mine}
    ''')
    done = process('--objective=mine', *SMALL, f'--dataset={data}', f'--out_dir={tmp_path}/run')
    assert done.returncode == 1 and 'two are enough' in done.stderr and 'not enough values to unpack' in done.stderr

def test_a_wrong_setting_is_a_sentence_inside_the_loop_too(provided, tmp_path, here):
    data = provided('''
        from model import GPT, check
        class Mine(GPT):
            calls = 0
            def forward(self, idx, targets=None):
                self.calls += self.training
                check(self.calls < 4, "my_rate is 3, expected less")
                return super().forward(idx, targets)
        OBJECTIVES = {'mine': Mine}
    ''')
    args = ['--objective=mine', *SMALL, *QUICK, f'--dataset={data}', f'--out_dir={tmp_path}/run']
    text = here('train.py', *args, '--ckpt_interval=2', code=2)
    assert 'error: my_rate is 3, expected less; go on from the last checkpoint with' in text

@pytest.mark.parametrize('args, sentence', [
    ('--seed=99999999999999999999999',
     'seed is 99999999999999999999999, expected 0 or more and below 18446744073709551616'),
    ('--device=meta', "device 'meta' cannot be used here"), ('--learning_rate=nan', 'learning_rate is nan'),
    ('--learning_rate=-1', 'learning_rate is -1.0'),
    ('--weight_decay=-0.1', 'weight_decay is -0.1'), ('--beta2=1', 'beta2 is 1.0, expected 0 or more and below 1'),
    ('--ema=1', 'ema is 1.0'),
    ('--grad_clip=-1', 'grad_clip is -1'), ('--curriculum=0.3', 'is plain text, which has none'),
    ('--warmup_iters=-1', 'warmup_iters is -1'),
    ('--final_lr=nan', 'final_lr is nan'), ('--max_epochs=-1', 'max_epochs is -1'),
    ('--scoreboard_windows=-2', 'scoreboard_windows is -2'),
    ('--block_size=4611686018427387904', 'out of memory on'), ('--n_embd=1000000000000', 'out of memory on'),
    ('--compile=1', 'compile must be bool or None'),
    ('--objective=mine', 'provider.py'), ('--ckpt_epochs=nan', 'ckpt_epochs is nan'),
    ('--dropout=nan', 'dropout is nan'), ('--init_from=', 'no checkpoint')])
def test_more_wrong_settings_start_nothing(corpus, tmp_path, here, args, sentence):
    text = here('train.py', *TINY, f'--dataset={corpus}', f'--out_dir={tmp_path}/run', *args.split(), code=2)
    assert sentence in text and text.count('\n') == 1 and not (tmp_path / 'run').exists()

def test_the_largest_seed_works(corpus, tmp_path, here):
    here('train.py', *SMALL, *QUICK, f'--dataset={corpus}', f'--out_dir={tmp_path}/run', f'--seed={2 ** 64 - 1}')

# ---- the run folder

@pytest.fixture(scope='module')
def finished(corpus, tmp_path_factory):
    """ a run of 6 iterations whose last checkpoints are copied by tests that break things """
    out = tmp_path_factory.mktemp('finished') / 'run'
    in_process('train.py', *TINY, *QUICK, f'--dataset={corpus}', f'--out_dir={out}', '--scoreboard_windows=2',
               '--cleanup_checkpoints=False')
    return out

def contents(folder):
    return {name: (folder / name).read_bytes() for name in sorted(os.listdir(folder))}

@pytest.mark.parametrize('lost, sentence', [
    (['ckpt_latest.pt'], '--ckpt=best'), (['ckpt_latest.pt', 'ckpt_best.pt'], '--ckpt=PATH'),
    (['settings.json'], 'settings.json cannot be read'),
    (['ckpt_latest.pt', 'ckpt_best.pt', 'ckpt_000003.pt', 'ckpt_000006.pt'], 'results.json')])
@pytest.mark.parametrize('more', ['', '--max_iters=4'])
def test_what_is_left_of_a_run_is_not_overwritten(finished, tmp_path, here, lost, sentence, more):
    out = tmp_path / 'run'
    shutil.copytree(finished, out)
    for name in lost:
        os.remove(out / name)
    before = contents(out)
    assert sentence in here('train.py --init_from=resume', f'--out_dir={out}', *more.split(), code=2)
    assert contents(out) == before
    assert 'already holds a run' in here('train.py', *TINY, f'--out_dir={out}', code=2) and contents(out) == before

@pytest.mark.parametrize('name', ['log.csv', 'results.json', 'ckpt_best.pt', 'ckpt_latest.pt', 'ckpt_000003.pt',
                                  'settings.json'])
def test_one_file_of_a_run_is_enough_to_keep_others_out(finished, corpus, tmp_path, here, name):
    os.makedirs(tmp_path / 'run')
    shutil.copy(finished / name, tmp_path / 'run')
    before = contents(tmp_path / 'run')
    text = here('train.py', *TINY, f'--dataset={corpus}', f'--out_dir={tmp_path}/run', code=2)
    assert f'already holds a run ({name})' in text and contents(tmp_path / 'run') == before

def test_a_folder_with_other_files_may_become_a_run(corpus, tmp_path, here):
    (tmp_path / 'notes.txt').write_text('what I expect')
    here('train.py', *SMALL, *QUICK, f'--dataset={corpus}', f'--out_dir={tmp_path}')
    assert (tmp_path / 'ckpt_latest.pt').exists() and (tmp_path / 'notes.txt').read_text() == 'what I expect'

def test_going_on_from_an_older_checkpoint_keeps_what_came_later(finished, tmp_path, here):
    out = tmp_path / 'run'
    shutil.copytree(finished, out)
    os.remove(out / 'ckpt_000006.pt')
    before, best = contents(out), state_of(out, 'best')
    text = here('train.py --init_from=resume --learning_rate=1e-9 --muon_learning_rate=1e-9 --max_iters=4',
                f'--out_dir={out}', f'--ckpt={out}/ckpt_000003.pt')
    assert 'is kept as ckpt_000006.pt, log_000006.csv, results_000006.json' in text
    assert all(contents(out)[new] == before[old] for new, old in
               [('ckpt_000006.pt', 'ckpt_latest.pt'), ('log_000006.csv', 'log.csv'),
                ('results_000006.json', 'results.json')])
    assert state_of(out)['iteration'] == 4
    assert state_of(out, 'best')['best'] == best['best'] # a worse one does not replace it

def test_two_runs_at_once_share_no_folder(corpus, tmp_path):
    """ both begin at the same moment; one trains, the other says so """
    args = [sys.executable, 'train.py', *TINY, *QUICK, f'--dataset={corpus}', f'--out_dir={tmp_path}/run',
            '--max_iters=200', '--eval_interval=200']
    both = [subprocess.Popen([*args, f'--seed={seed}'], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                             text=True,
                             env={**os.environ, 'OMP_NUM_THREADS': '1'}) for seed in (1, 2)]
    texts = [p.communicate(timeout=300) for p in both]
    assert sorted(p.returncode for p in both) == [0, 2]
    loser = texts[[p.returncode for p in both].index(2)][1]
    assert 'another process is training into' in loser or 'already holds a run' in loser
    winner = [p.returncode for p in both].index(0) + 1
    assert json.loads((tmp_path / 'run' / 'settings.json').read_text())['seed'] == winner
    assert [int(row['iteration']) for row in log_of(tmp_path / 'run')] == list(range(1, 201))

def test_a_run_that_is_going_on_is_not_resumed_by_another(corpus, tmp_path, here):
    args = [*TINY, *QUICK, f'--dataset={corpus}', f'--out_dir={tmp_path}/run', '--max_iters=100000',
            '--ckpt_interval=5']
    first = subprocess.Popen([sys.executable, 'train.py', *args], cwd=ROOT, stdout=subprocess.PIPE, text=True,
                             env={**os.environ, 'OMP_NUM_THREADS': '1'})
    for line in first.stdout:
        if line.startswith('iter 12/'):
            break
    second = process('--init_from=resume', f'--out_dir={tmp_path}/run')
    assert second.returncode == 2 and 'another process is training into' in second.stderr
    first.kill() # a killed process claims nothing any more
    first.communicate()
    here('train.py --init_from=resume --max_iters=12', f'--out_dir={tmp_path}/run',
         code=2 if state_of(tmp_path / 'run')['iteration'] > 12 else 0)

def test_a_tilde_behind_an_equals_sign(corpus, trained, tmp_path):
    """ no shell expands it there """
    home = tmp_path / 'home'
    shutil.copytree(corpus, home / 'data')
    shutil.copytree(trained[0], home / 'other')
    args = [*TINY, *QUICK, '--dataset=~/data', '--out_dir=~/run', '--init_from=~/other/ckpt_best.pt']
    done = process(*args, env={'HOME': str(home)})
    assert done.returncode == 0, done.stderr
    assert (home / 'run' / 'ckpt_latest.pt').exists() and not os.path.exists(os.path.join(ROOT, '~'))
    done = process('--out_dir=~/run', '--init_from=resume', '--ckpt=~/run/ckpt_latest.pt', '--max_iters=7',
                   env={'HOME': str(home)})
    assert done.returncode == 0 and state_of(home / 'run')['iteration'] == 7, done.stderr

def test_nobody_reads_on(corpus, tmp_path, here):
    """ train.py | head: what was trained is saved, nothing is complained about """
    line = ' '.join([sys.executable, 'train.py', *TINY, *QUICK, f'--dataset={corpus}', f'--out_dir={tmp_path}/run',
                     '--max_iters=100000', '--eval_interval=100000'])
    done = subprocess.run(['bash', '-c', f'set -o pipefail; {line} | head -n 4'], cwd=ROOT, capture_output=True,
                          text=True, timeout=300,
                          env={**os.environ, 'OMP_NUM_THREADS': '1'})
    assert done.stdout.count('\n') == 4 and done.stderr == '' and done.returncode == 0
    reached = state_of(tmp_path / 'run')['iteration']
    assert 3 <= reached < 100000
    here('train.py --init_from=resume', f'--max_iters={reached + 2}', f'--out_dir={tmp_path}/run')

def test_nobody_reads_the_help_on():
    for script in 'train.py', 'sample.py', 'prepare.py':
        done = subprocess.run(['bash', '-c', f'{sys.executable} -u {script} --help | head -n 1'], cwd=ROOT,
                              capture_output=True, text=True)
        assert done.stdout.count('\n') == 1 and done.stderr == ''

# ---- resuming under other settings

def test_tokens_are_counted_and_not_multiplied(corpus, tmp_path, here):
    out, per_epoch = tmp_path / 'run', prepare.Corpus(str(corpus)).tokens('train')
    here('train.py', *SMALL, *QUICK, f'--dataset={corpus}', f'--out_dir={out}', '--max_iters=4')
    here('train.py --init_from=resume --batch_size=2 --gradient_accumulation_steps=3 --max_iters=6',
         '--scoreboard_windows=2', f'--out_dir={out}')
    seen = [(i + 1) * 64 for i in range(4)] + [256 + 96, 256 + 192] # 4 rows of 16, then 3 times 2 rows
    assert [float(row['tokens']) for row in log_of(out)] == seen
    assert [float(row['epoch']) for row in log_of(out)] == [n / per_epoch for n in seen]
    assert json.loads((out / 'results.json').read_text())['train_tokens_seen'] == state_of(out)['tokens'] == 448
    here('train.py --init_from=resume --max_epochs=0.5', f'--out_dir={out}')
    assert 0.5 <= float(log_of(out)[-1]['epoch']) < 0.5 + 97 / per_epoch
    old = {k: v for k, v in state_of(out).items() if k != 'tokens'} # from before they were counted
    torch.save(old | {'iteration': 4}, out / 'old.pt')
    here('train.py --init_from=resume --max_epochs=0 --max_iters=5', f'--out_dir={out}', f'--ckpt={out}/old.pt')
    assert float(log_of(out)[-1]['tokens']) == 5 * 96

@pytest.mark.parametrize('more', [
    '--dtype=float16', '--dtype=bfloat16', '--ema=0.5', '--dropout=0.1', '--batch_size=2', '--eval_iters=1',
    '--eval_interval=1', '--optimizer=adamw',
    '--weight_decay=0', '--decay=cosine', '--seed=5', '--grad_clip=0', '--compile=False', '--scoreboard_windows=1',
    '--cleanup_checkpoints=False', '--t_dist=bell',
    '--t_min=0.1', '--begin=False', '--tie_weights=True', '--n_layer=2', '--objective=mdlm', '--block_size=8',
    '--max_epochs=0.5', '--ckpt_epochs=0.1',
    '--attn_backend=sdpa', '--grad_checkpointing=True', '--diffusion_block_size=4', '--init=gpt2',
    '--attention=causal', '--curriculum=0.5', '--segments=8,8',
    '--gradient_accumulation_steps=2', '--wandb_tags=a', '--log_interval=2', '--ar_weight=1', '--decay_iters=3',
    '--warmup_iters=0', '--dataset=nowhere'])
def test_any_setting_may_change_on_resume_or_is_refused_by_name(trained, tmp_path, here, more):
    out = tmp_path / 'run'
    shutil.copytree(trained[0], out) # ar, with averages
    before, name = contents(out), more[2:].partition('=')[0]
    refused = name in ('optimizer', 'tie_weights', 'n_layer', 'objective', 'block_size', 'curriculum', 'dataset',
                       'begin', 'diffusion_block_size', 'init', 'segments')
    text = here('train.py --init_from=resume --max_iters=8', f'--out_dir={out}', more, code=2 if refused else 0)
    if refused:
        assert (name if name not in ('begin', 'dataset')
                else {'begin': 'begin_id', 'dataset': 'nowhere'}[name]) in text and contents(out) == before
    else:
        assert log_of(out)[-1]['val_nll']
    for changed in ('--dtype=float16', '--ema=0', '--batch_size=1', '--bound_samples=1'):
        here('train.py --eval_only=True --scoreboard_windows=2', f'--out_dir={out}', changed)

def test_a_run_without_averages_does_not_report_any(finished, tmp_path, here):
    shutil.copytree(finished, tmp_path / 'run')
    here('train.py --eval_only=True --ema=0.9 --scoreboard_windows=2', f'--out_dir={tmp_path}/run')
    assert [*json.loads((tmp_path / 'run' / 'results.json').read_text())['weights']] == ['raw']

def test_one_overflow_in_float16_leaves_the_weights_alone(corpus, tmp_path, here):
    """ the first scale of float16 overflows; without clipping too, no optimizer steps alone """
    args = ['--dtype=float16', '--grad_clip=0', '--optimizer=muon', *SMALL, *QUICK, f'--dataset={corpus}',
            '--warmup_iters=0', '--batch_size=1', '--block_size=2', '--max_iters=1']
    here('train.py', *args, '--init=gpt2', f'--out_dir={tmp_path}/run')
    torch.manual_seed(1337)
    state = state_of(tmp_path / 'run')
    begun = models.GPT(models.GPTConfig(**state['config'])).state_dict()
    scale = state['scaler']['scale']
    assert all(w.isfinite().all() for w in state['model'].values())
    moved = {k: not torch.equal(begun[k], v) for k, v in state['model'].items()}
    assert scale < 65536 and not any(moved.values()) or scale == 65536 \
        and moved['transformer.h.0.attn.c_attn.weight'] and moved['transformer.wte.weight']
    here('train.py --init_from=resume --max_iters=40 --log_interval=5', f'--out_dir={tmp_path}/run')
    assert all(w.isfinite().all() for w in state_of(tmp_path / 'run')['model'].values())

# ---- what can fail early does so before there is a folder

FAKE_WANDB = '''
import json, os
class Error(Exception): pass
class Run:
    def __init__(self, id): self.id = id
    def log(self, row, step): open(os.environ['WANDB_FILE'], 'a').write(json.dumps([self.id, step, len(row)]) + '\\n')
def init(id=None, **settings):
    if 'WANDB_FAILS' in os.environ: raise Error('no API key')
    return Run(id or 'run-' + str(os.getpid()))
'''

def test_one_run_of_weights_and_biases_across_resumes(corpus, tmp_path):
    (tmp_path / 'wandb.py').write_text(FAKE_WANDB)
    env = {'PYTHONPATH': str(tmp_path), 'WANDB_FILE': str(tmp_path / 'calls')}
    args = [*TINY, *QUICK, '--wandb_log=True', f'--dataset={corpus}', f'--out_dir={tmp_path}/run', '--max_iters=3']
    failed = process(*args, env=env | {'WANDB_FAILS': '1'})
    assert failed.returncode == 2 and 'does not start (Error: no API key)' in failed.stderr \
        and not (tmp_path / 'run').exists()
    assert process(*args, env=env).returncode == 0
    assert process('--init_from=resume', '--max_iters=5', f'--out_dir={tmp_path}/run', env=env).returncode == 0
    calls = [json.loads(line) for line in (tmp_path / 'calls').read_text().splitlines()]
    assert len({id for id, _, _ in calls}) == 1 and [step for _, step, _ in calls] == [1, 2, 3, 4, 5]

def test_a_missing_package_is_said_before_there_is_a_folder(corpus, tmp_path):
    (tmp_path / 'wandb.py').write_text("raise ImportError('not here')")
    args = [*TINY, *QUICK, '--wandb_log=True', f'--dataset={corpus}', f'--out_dir={tmp_path}/run']
    done = process(*args, env={'PYTHONPATH': str(tmp_path)})
    assert done.returncode == 2 and 'pip install wandb' in done.stderr and not (tmp_path / 'run').exists()
    assert process(*args, '--wandb_log=False', env={'PYTHONPATH': str(tmp_path)}).returncode == 0

def test_a_compiler_that_cannot_build_is_a_line(corpus, tmp_path, here):
    compiler = tmp_path / 'g++'
    compiler.write_text('#!/bin/sh\ncase "$*" in *-version*|*--help*) echo "g++ (GCC) 12.2.0"; exit 0;; esac\n'
                        'echo "cannot build" >&2\nexit 1\n')
    compiler.chmod(0o755)
    args = [*TINY, *QUICK, '--compile=True', f'--dataset={corpus}', '--max_iters=2', '--eval_interval=2']
    done = process(*args, f'--out_dir={tmp_path}/run',
                   env={'CXX': str(compiler), 'TORCHINDUCTOR_CACHE_DIR': str(tmp_path / 'cache')})
    assert done.returncode == 0 and done.stdout.count('going on without it') == 1 \
        and len((done.stdout + done.stderr).splitlines()) < 10, done.stderr
    here('train.py', *args, '--compile=False', f'--out_dir={tmp_path}/eager')
    assert log_of(tmp_path / 'run') == log_of(tmp_path / 'eager') # and nothing else is different

# ---- an objective with settings of its own

OWN = '''
    from dataclasses import dataclass
    import torch
    from model import GPT, GPTConfig, check

    @dataclass
    class MyConfig(GPTConfig):
        my_width: int = 4 # rows of the extra table
        my_weight: float = 0.5 # of the extra loss
        my_kind: str = 'plain' # plain | fancy
        my_limit: int = None # not used
        def __post_init__(self):
            super().__post_init__()
            check(self.my_kind in ('plain', 'fancy'), f"my_kind is {self.my_kind!r}, expected plain or fancy")

    class Mine(GPT):
        config_class = MyConfig
        def __init__(self, config):
            super().__init__(config)
            self.extra = torch.nn.Parameter(torch.ones(config.my_width))
        def forward(self, idx, targets=None):
            logits, loss = super().forward(idx, targets)
            return logits, None if loss is None else loss + self.config.my_weight * self.extra.square().mean()

    class Other(Mine):
        pass

    OBJECTIVES = {'mine': Mine, 'other': Other}
'''

@pytest.fixture
def own(provided, tmp_path):
    """ (arguments of a first run of an objective with settings of its own, where it goes) """
    folder = provided(OWN)
    return [*TINY, *QUICK, '--eval_interval=2', '--max_iters=2', f'--dataset={folder}',
            f'--out_dir={tmp_path}/run'], tmp_path / 'run'

def test_an_objective_has_settings_of_its_own(own, here, tmp_path):
    """ they reach the model, the checkpoint and settings.json, and hold on resume, in evaluation and for sample.py """
    args, out = own
    here('train.py', *args, '--my_width=8', '--objective=mine', '--my_limit=3')
    state, settings = state_of(out), json.loads((out / 'settings.json').read_text())
    expected = {'my_width': 8, 'my_weight': 0.5, 'my_kind': 'plain', 'my_limit': 3}
    assert expected.items() <= state['config'].items() and expected.items() <= settings.items()
    assert expected.items() <= state['settings'].items() and state['model']['extra'].shape == (8,)
    assert float(log_of(out)[0]['ce']) > 0.5 * 0.9 # the extra loss begins at my_weight
    here('train.py --init_from=resume --max_iters=4', f'--out_dir={out}')
    assert state_of(out)['iteration'] == 4 and state_of(out)['config']['my_width'] == 8
    here('train.py --init_from=resume --max_iters=5 --my_width=8', f'--out_dir={out}')
    changes = {'my_width=9': 'my_width (8 there, 9 here)', 'my_weight=0.25': 'my_weight (0.5 there, 0.25 here)'}
    for change, said in changes.items():
        text = here('train.py --init_from=resume --max_iters=6', f'--{change}', f'--out_dir={out}', code=2)
        assert f"it differs in {said};" in text
    text = here('train.py --init_from=resume --objective=ar', f'--out_dir={out}', code=2)
    assert 'it differs in objective (mine there, ar here);' in text
    assert not (out / 'results.json').exists()
    here('train.py --eval_only=True --scoreboard_windows=2', f'--out_dir={out}')
    assert json.loads((out / 'results.json').read_text())['iteration'] == 5
    assert 'The' in here('sample.py --start=The --num_samples=1 --max_new_tokens=5', f'--out_dir={out}')
    text = here('train.py', *args[:-1], f'--out_dir={tmp_path}/tuned', f'--init_from={out}/ckpt_best.pt',
                 '--objective=other', '--my_width=8', '--my_weight=0')
    assert f'weights of {out}/ckpt_best.pt' in text and state_of(tmp_path / 'tuned')['config']['my_weight'] == 0

def test_a_config_file_has_settings_of_an_objective(own, here, tmp_path):
    args, out = own
    (tmp_path / 'mine.py').write_text("my_width = 3\nobjective = 'mine'\nmy_kind = 'fancy'\n")
    here('train.py', str(tmp_path / 'mine.py'), *args, '--my_width=5')
    assert [state_of(out)['config'][k] for k in ('my_width', 'my_kind')] == [5, 'fancy']
    assert 'my_width in config file' in here('train.py', str(tmp_path / 'mine.py'), *args, '--objective=ar', code=2)

@pytest.mark.parametrize('more, sentence', [
    ('--objective=mine --my_width=2.5', 'my_width must be int (default 4), got float 2.5 on the command line'),
    ('--objective=mine --my_limit=x', 'my_limit must be int or None (default None), got str x on the command line'),
    ('--objective=mine --my_kind=odd', "my_kind is 'odd', expected plain or fancy"),
    ('--objective=mine --my_widht=3', 'unknown setting my_widht on the command line; did you mean my_width?'),
    ('--objective=mine --vocab_size=3', 'unknown setting vocab_size on the command line'),
    ('--my_width=3',
     'my_width on the command line is a setting of objective mine and other alone, and objective is ar'),
    ('--objective=mine --my_width', '--my_width needs a value, e.g. --my_width=4')])
def test_a_wrong_setting_of_an_objective_starts_nothing(own, here, more, sentence):
    args, out = own
    assert here('train.py', *args, *more.split(), code=2) == f'error: {sentence}\n' and not out.exists()

def test_help_shows_the_settings_of_an_objective(own, here):
    args, out = own
    text = here('train.py', *args, '--my_width=6', '--objective=mine', '--help')
    assert re.sub(' +', ' ', text).endswith(
        '\n\nSettings of objective mine alone:\n--my_width=6 rows of the extra table\n'
        '--my_weight=0.5 of the extra loss\n--my_kind=plain plain | fancy\n--my_limit=None (int or None) not used\n'
        '\nMore settings: --objective=aogpt --help, --objective=df_published --help, --objective=df --help\n')
    text = here('train.py', *args, '--help')
    assert 'my_width' not in text
    assert text.endswith('--objective=df --help, --objective=mine --help, --objective=other --help\n')

def test_a_run_from_when_df_was_one_objective_goes_on(own, here):
    """ its settings and its checkpoint have the settings of df; a field that nobody knows is a newer version's """
    args, out = own
    here('train.py', *args, '--objective=ar')
    state, settings = state_of(out), json.loads((out / 'settings.json').read_text())
    once = dict(df_objective='pred_token', df_embed_norm=4.0, df_timesteps=32)
    torch.save(state | {'config': state['config'] | once}, out / 'ckpt_latest.pt')
    (out / 'settings.json').write_text(json.dumps(settings | once))
    here('train.py --init_from=resume --max_iters=3', f'--out_dir={out}')
    assert state_of(out)['iteration'] == 3 and 'df_timesteps' not in state_of(out)['config']
    torch.save(state | {'config': state['config'] | {'n_expert': 2}}, out / 'ckpt_latest.pt')
    text = here('train.py --init_from=resume', f'--out_dir={out}', code=2)
    assert 'differs in n_expert (2 there, None here);' in text

def test_a_setting_that_a_checkpoint_lacks_had_its_default(own, here):
    """ so an objective may get another one; a default that changed since is named with both values """
    args, out = own
    here('train.py', *args, '--objective=mine')
    state = state_of(out)
    older = {k: v for k, v in state['config'].items() if k != 'my_weight'}
    torch.save(state | {'config': older}, out / 'ckpt_latest.pt')
    text = here('train.py --init_from=resume --max_iters=3 --my_weight=0.25', f'--out_dir={out}', code=2)
    assert 'my_weight (0.5 there, 0.25 here);' in text
    here('train.py --init_from=resume --max_iters=3', f'--out_dir={out}')

@pytest.mark.parametrize('old, new, sentence', [
    ("'other': Other", "'mdlm': Other", 'has mdlm, which model.py has: take another name'),
    ("my_limit: int = None", "seed: int = 3", 'MyConfig has seed, which train.py has: take another name'),
    ("my_limit: int = None", "mask_id: int = 3", None)]) # as GPTConfig has it: another default
def test_names_that_are_taken_are_a_bug(provided, here, tmp_path, old, new, sentence):
    args = [*TINY, *QUICK, '--max_iters=2', f'--dataset={provided(OWN.replace(old, new))}', f'--out_dir={tmp_path}/run']
    if sentence:
        with pytest.raises(AssertionError, match=sentence):
            here('train.py', *args, '--objective=ar')
    else:
        here('train.py', *args, '--objective=ar')

BOUND = '''
    from model import GPT
    class Mine(GPT):
        def forward(self, idx, targets=None):
            logits, loss = super().forward(idx, targets)
            return logits, None if loss is None else loss * 0.5
        BOUND
    OBJECTIVES = {'mine': Mine}
'''

def test_what_was_best_is_compared_with_its_like(provided, here, tmp_path):
    """ a training loss of before the objective had a bound says nothing of bounds """
    folder = provided(BOUND.replace('BOUND', 'pass'))
    args = [*TINY, *QUICK, '--objective=mine', '--eval_interval=2', f'--dataset={folder}', f'--out_dir={tmp_path}/run']
    here('train.py', *args, '--max_iters=2')
    before = state_of(tmp_path / 'run')['best']
    provided(BOUND.replace('BOUND', 'nll_bound = GPT.nll_bound'))
    text = here('train.py --init_from=resume --max_iters=4', f'--out_dir={tmp_path}/run')
    assert 'iteration 2, no nelbo so far' in text and 'best so far' in text
    assert state_of(tmp_path / 'run')['best'] > before + 0.5 and state_of(tmp_path / 'run')['measured'] == 'nelbo'
    text = here('train.py --init_from=resume --max_iters=6', f'--out_dir={tmp_path}/run')
    assert 'iteration 4, best nelbo' in text

def test_an_evaluation_without_a_number_is_a_sentence(provided, here, tmp_path):
    broken = 'nll_bound = lambda self, idx, targets, n_samples=1: (idx[:, :1] * float("nan"), (targets != -1).sum(1))'
    folder = provided(BOUND.replace('BOUND', broken))
    args = [*TINY, *QUICK, '--objective=mine', '--eval_interval=2', f'--dataset={folder}']
    text = here('train.py', *args, '--max_iters=4', f'--out_dir={tmp_path}/run', code=2)
    assert 'the evaluation at iteration 2 gives no number, but nan: see nll_bound of mine' in text
