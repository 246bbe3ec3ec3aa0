"""
The commands are the tests: train.py and sample.py as a user runs them, with tiny numbers.
"""
import contextlib
import csv
import fcntl
import importlib.util
import io
import json
import math
import os
import runpy
import shutil
import signal
import subprocess
import sys
import textwrap

import pytest
import torch

import model as models
import prepare
from tools import quality

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
TINY = ('--block_size=16 --batch_size=4 --n_layer=1 --n_head=2 --n_embd=16 --max_iters=6 --warmup_iters=2 '
        '--log_interval=1 --eval_interval=3 --eval_iters=2 --device=cpu --compile=False').split()

TORCHRUN = sys.executable, '-m', 'torch.distributed.run'
SIGNALS = signal.SIGINT, signal.SIGTERM

def run(command, *more, code=0, launcher=(sys.executable,), folder=ROOT):
    """ a command line of ours, in a process of its own -> stdout and stderr in one string """
    done = subprocess.run([*launcher, *command.split(), *map(str, more)], cwd=folder, capture_output=True, text=True,
                          timeout=300)
    assert done.returncode == code, done.stdout + done.stderr
    assert 'Traceback' not in done.stderr
    return done.stdout + done.stderr

def started(command, *more, stderr=None):
    """ the same, begun: a Popen whose stdout can be read line by line """
    args = [sys.executable, *command.split(), *map(str, more)]
    return subprocess.Popen(args, cwd=ROOT, stdout=subprocess.PIPE, stderr=stderr, text=True)

def our_modules():
    """ names of what a script imports from its own folder """
    ours = 'configurator', 'model', 'prepare', 'tools'
    return [name for name in sys.modules if name.split('.')[0] in ours or name.startswith('data_')]

@contextlib.contextmanager
def as_a_process(argv, folder):
    """ this process as a new one, started in `folder`; at its end it gives back what a process gives back """
    handlers = [*map(signal.getsignal, SIGNALS)]
    threads, precision = torch.get_num_threads(), torch.get_float32_matmul_precision()
    locked, flock, elsewhere = [], fcntl.flock, str(folder) != ROOT
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(sys, 'argv', argv)
        patch.setattr(fcntl, 'flock', lambda file, how: locked.append(file) or flock(file, how))
        patch.setitem(sys.modules, 'prepare', prepare) # the place that prepare.py takes when it is the script
        if elsewhere: # that folder has modules of its own
            patch.setattr(sys, 'path', [str(folder), *sys.path])
            for name in our_modules():
                patch.delitem(sys.modules, name)
        try:
            yield
        finally:
            for s, handler in zip(SIGNALS, handlers):
                signal.signal(s, handler)
            for file in locked:
                with contextlib.suppress(OSError): # closed already
                    flock(file, fcntl.LOCK_UN)
            torch.set_num_threads(threads)
            torch.set_float32_matmul_precision(precision)
            for name in our_modules() if elsewhere else []:
                del sys.modules[name]

def streams(command, *more, code=0, folder=ROOT):
    """ a script or -m tools.NAME as a command, but in this process, which has torch already -> (stdout, stderr) """
    script, *args = [*command.split(), *map(str, more)]
    if script == '-m':
        script = args.pop(0).replace('.', '/') + '.py'
    out, err, left = io.StringIO(), io.StringIO(), 0
    with as_a_process([script, *args], folder), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            runpy.run_path(os.path.join(folder, script), run_name='__main__')
        except SystemExit as e:
            left = e.code or 0
    assert left == code, out.getvalue() + err.getvalue()
    return out.getvalue(), err.getvalue()

def in_process(command, *more, code=0, folder=ROOT):
    """ the same -> stdout and stderr in one string, as run() has them """
    return ''.join(streams(command, *more, code=code, folder=folder))

@pytest.fixture
def here():
    return in_process

def log_of(out):
    with open(out / 'log.csv', newline='') as f:
        return [{k: v for k, v in row.items() if k != 'tokens_per_second'} for row in csv.DictReader(f)]

@pytest.fixture(scope='module')
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp('corpus')
    (folder / 'a.txt').write_text('The quick brown fox jumps over the lazy dog, and so on.\n' * 60)
    prepare.prepare('text', str(folder), 'char', input=str(folder / 'a.txt'))
    return folder

@pytest.fixture(scope='module')
def trained(corpus, tmp_path_factory):
    """ one finished run that several tests look at """
    out = tmp_path_factory.mktemp('runs') / 'ar'
    return out, in_process('train.py', *TINY, f'--dataset={corpus}', f'--out_dir={out}', '--ema=0.9')

def test_a_run_leaves_what_it_was(trained):
    out, text = trained
    assert sorted(os.listdir(out)) == ['ckpt_best.pt', 'ckpt_latest.pt', 'log.csv', 'results.json', 'settings.json']
    settings, results = json.loads((out / 'settings.json').read_text()), json.loads((out / 'results.json').read_text())
    assert settings['max_iters'] == 6 and settings['seed'] == 1337 and 'commit' in settings
    rows = log_of(out)
    assert [int(r['iteration']) for r in rows] == [1, 2, 3, 4, 5, 6] and float(rows[-1]['tokens']) == 6 * 4 * 16
    assert all(float(rows[i][k]) > 0 for i in (2, 5) for k in ('val_nll', 'train_nll', 'val_nll_ema', 'accuracy')) \
        and rows[0]['val_nll'] == ''
    for weights in 'raw', 'ema':
        board = results['weights'][weights]['scoreboard']
        assert board['exact'] and board['stderr_monte_carlo'] == 0 and board['stderr_windows'] > 0
    model, ckpt = models.load_checkpoint(out / 'ckpt_latest.pt', weights='ema')
    corpus = prepare.Corpus(settings['dataset']) # the board, once more by hand
    nats = sum(model.nll_bound(*map(torch.from_numpy, b.values()))[0].sum().item()
               for b in corpus.windows('val', 1, 16))
    assert abs(nats / (16 * corpus.n_windows('val', 16)) - board['nats_per_token']) < 1e-5
    raw, _ = models.load_checkpoint(out / 'ckpt_latest.pt', weights='raw')
    assert not torch.equal(model.lm_head.weight, raw.lm_head.weight)
    assert 'tok/s' in text and 'eta' in text and 'nll =' in text
    # the one that knows of the others comes last
    assert os.stat(out / 'ckpt_best.pt').st_mtime_ns < os.stat(out / 'ckpt_latest.pt').st_mtime_ns

def test_an_impatient_reader_leaves_out_the_scoreboard(corpus, tmp_path, here):
    """ Ctrl-C after the last iteration: what was trained is saved, what is missing can be made up for """
    args = [*TINY, f'--dataset={corpus}', f'--out_dir={tmp_path}', '--objective=mdlm']
    part = started('train.py', *args, '--bound_samples=100000', stderr=subprocess.STDOUT)
    seen = [part.send_signal(signal.SIGINT) or line if line.startswith('now the scoreboard') else line
            for line in part.stdout]
    assert part.wait() == 130 and '--eval_only=True writes it' in seen[-1] \
        and not any('Traceback' in line for line in seen)
    assert models.read_checkpoint(tmp_path / 'ckpt_latest.pt')['iteration'] == 6 \
        and not (tmp_path / 'results.json').exists()
    assert 'nelbo <=' in here('train.py --eval_only=True --bound_samples=2', f'--out_dir={tmp_path}') \
        and (tmp_path / 'results.json').exists()

def test_same_seed_same_loss_and_another_seed_another(trained, corpus, tmp_path, here):
    here('train.py', *TINY, f'--dataset={corpus}', f'--out_dir={tmp_path}/a', '--ema=0.9', '--scoreboard_windows=0')
    here('train.py', *TINY, f'--dataset={corpus}', f'--out_dir={tmp_path}/b', '--seed=2', '--scoreboard_windows=0')
    assert log_of(tmp_path / 'a') == log_of(trained[0]) != log_of(tmp_path / 'b')
    assert not (tmp_path / 'a' / 'results.json').exists()

@pytest.mark.parametrize('objective, optimizer',
                         [('ar', 'adamw'), ('ar', 'muon'), ('mdlm', 'muon'), ('bd3lm', 'muon'), ('aogpt', 'muon'),
                          ('df', 'muon')])
def test_resume_is_the_uninterrupted_run(corpus, tmp_path, objective, optimizer, here):
    """ bit for bit: log, weights, averages; the first part is stopped by SIGTERM at an iteration nobody chose """
    args = [*TINY, f'--dataset={corpus}', '--ema=0.9', '--dropout=0.1', f'--optimizer={optimizer}',
            f'--objective={objective}', '--max_iters=60', '--eval_interval=20', '--log_interval=4',
            '--gradient_accumulation_steps=2', '--scoreboard_windows=0']
    here('train.py', *args, f'--out_dir={tmp_path}/whole')
    part = started('train.py', *args, f'--out_dir={tmp_path}/part')
    for line in part.stdout:
        if line.startswith('iter 8/'):
            part.send_signal(signal.SIGTERM)
    assert part.wait() == 0
    at = torch.load(tmp_path / 'part' / 'ckpt_latest.pt', weights_only=True)['iteration']
    assert 8 <= at < 60
    run('train.py --init_from=resume', f'--out_dir={tmp_path}/part') # the run's own settings
    assert log_of(tmp_path / 'part') == log_of(tmp_path / 'whole')
    a, b = (torch.load(tmp_path / name / 'ckpt_latest.pt', weights_only=True) for name in ('part', 'whole'))
    assert a['iteration'] == 60 and all(torch.equal(a[k][n], b[k][n]) for k in ('model', 'ema') for n in a[k])

def test_checkpoints_by_interval_by_epoch_and_from_best(corpus, tmp_path, here):
    out = tmp_path / 'run'
    text = here('train.py', *TINY, f'--dataset={corpus}', f'--out_dir={out}', '--ckpt_interval=2',
                '--cleanup_checkpoints=False', '--scoreboard_windows=0')
    assert {f'ckpt_00000{n}.pt' for n in (2, 4, 6)} < set(os.listdir(out))
    text = here('train.py --init_from=resume', f'--out_dir={out}', f'--ckpt={out}/ckpt_000002.pt',
                '--max_epochs=0.2', '--ckpt_epochs=0.1')
    assert 'iteration 2,' in text and [int(r['iteration']) for r in log_of(out)][:3] == [1, 2, 3]
    tokens = prepare.Corpus(str(corpus)).tokens('train')
    assert f"iter {-(-tokens * 2 // 10 // 64)}/" in text
    text = here('train.py --eval_only=True --ckpt=best', f'--out_dir={out}')
    assert 'random windows' in text and 'iter ' not in text

def test_a_run_killed_before_its_first_checkpoint_begins_again(trained, corpus, tmp_path, here):
    """ from the weights it began with, which resuming must not forget """
    first = ['train.py', *TINY, f'--dataset={corpus}', f'--init_from={trained[0]}/ckpt_best.pt',
             '--scoreboard_windows=0']
    here(*first, f'--out_dir={tmp_path}/whole')
    os.makedirs(tmp_path / 'part')
    for name in 'settings.json', 'log.csv':
        (tmp_path / 'part' / name).write_bytes((tmp_path / 'whole' / name).read_bytes())
    assert 'already holds a run' in here(*first, f'--out_dir={tmp_path}/part', code=2)
    assert 'nothing was saved' in here('train.py --init_from=resume', f'--out_dir={tmp_path}/part')
    assert log_of(tmp_path / 'part') == log_of(tmp_path / 'whole')
    assert json.loads((tmp_path / 'part' / 'settings.json').read_text())['init_from'].endswith('ckpt_best.pt')

def test_provider_objectives_need_no_change_here(corpus, tmp_path, here):
    """ an objective is a class and a row; one from outside trains, evaluates, resumes and samples """
    shutil.copytree(corpus, tmp_path / 'corpus')
    provider = textwrap.dedent('''
        import torch
        from torch.nn import functional as F
        from model import GPT
        class Smoothed(GPT):
            """ ar with smoothed labels: predictions may not be too sure of themselves """
            loss_name, bound_name = 'ce', None
            def forward(self, idx, targets=None):
                if targets is None:
                    return super().forward(idx)
                # corrupt
                inputs, targets = self.shift(idx, targets)
                # attend
                logits = self.next_token_logits(inputs)
                # loss
                text = logits[..., :self.config.text_size].flatten(0, 1)
                smooth = F.cross_entropy(text, targets.flatten(), label_smoothing=0.1)
                return logits, smooth
        OBJECTIVES = {'smoothed': Smoothed}
    ''')
    assert len(provider.strip().splitlines()) <= 25
    (tmp_path / 'corpus' / 'provider.py').write_text(provider)
    text = here('train.py', *TINY, f'--dataset={tmp_path}/corpus', f'--out_dir={tmp_path}/run',
                '--objective=smoothed', '--max_iters=30')
    losses = [float(r['ce']) for r in log_of(tmp_path / 'run')]
    assert losses[-1] < losses[0] - 0.1 and 'val_ce' in text
    assert 'smoothed' in here('sample.py --num_samples=1 --max_new_tokens=5', f'--out_dir={tmp_path}/run')

def test_sampling(trained, here):
    out, _ = trained
    a = run('sample.py --start=The --num_samples=2 --max_new_tokens=20', f'--out_dir={out}')
    assert a.count('The') >= 2 and 'averaged weights' in a and '40 network evaluations' in a
    likeliest = ['--temperature=0', '--max_new_tokens=20', '--num_samples=2', '--start=dog', '--weights=raw']
    streamed, batch = (streams('sample.py', f'--out_dir={out}', f'--stream={s}', *likeliest)[0] for s in (True, False))
    assert streamed == batch and streamed.count('dog') >= 2
    (out / 'prompt.txt').write_text('lazy')
    assert 'lazy' in here(f'sample.py --start=FILE:{out}/prompt.txt --stop=. --num_samples=1', f'--out_dir={out}')
    assert "unknown character 'é'" in here('sample.py --start=café', f'--out_dir={out}', code=2)
    assert 'expected text of exactly one' in here('sample.py --stop=dog', f'--out_dir={out}', code=2)
    assert 'train a model first' in here(f'sample.py --out_dir={out}/nowhere', code=2)
    assert "its folder has ckpt_best.pt, ckpt_latest.pt" in here(f'sample.py --ckpt={out}/ckpt_000003.pt', code=2)
    assert 'max_new_tokens is -3, expected at least 1' in here('sample.py --max_new_tokens=-3', f'--out_dir={out}',
        code=2)

@pytest.mark.parametrize('objective', ['mdlm', 'bd3lm'])
def test_diffusion_trains_and_writes(corpus, trained, tmp_path, objective, here):
    out, shape = tmp_path / 'run', [a for a in TINY if 'max_iters' not in a]
    args = [*shape, f'--dataset={corpus}', f'--out_dir={out}', f'--objective={objective}',
            '--diffusion_block_size=4', '--bound_samples=2', '--ema=0.9']
    dual = ['--clean_causal=True', '--ar_weight=1',
            '--t_dist=bell'] if objective == 'bd3lm' else [f'--init_from={trained[0]}/ckpt_best.pt']
    text = here('train.py', *args, *dual, '--max_iters=6')
    board = json.loads((out / 'results.json').read_text())['weights']['raw']['scoreboard']
    assert not board['exact'] and board['samples_per_window'] == 2 and board['stderr_monte_carlo'] > 0 \
        and 'nelbo <=' in text
    for more in ['--stream=False', '--sampler=ancestral --steps=12', *(['--view=ar'] if objective == 'bd3lm' else [])]:
        text = here('sample.py --start=The --max_new_tokens=30 --num_samples=2', f'--out_dir={out}', *more.split())
        assert text.count('The') >= 2 and 'network evaluations' in text
    assert 'no use for --sampler' in here('sample.py --sampler=ancestral', f'--out_dir={trained[0]}', code=2)
    assert 'cannot be read as gpt' in here('sample.py --view=gpt', f'--out_dir={out}', code=2)
    if objective == 'bd3lm':
        assert 'at least 2 windows' in here('-m tools.compare --orders=1', out, code=2)
        text = run('-m tools.compare --orders=2', out, trained[0])
        assert text.index('nll =') and text.count('| bd3lm, raw as ar |') == 1
        both = {row.split('|')[2].strip(): row.count('+-') for row in text.splitlines() if row.count('|') > 9}
        assert both['ar, raw'] == both['bd3lm, raw as ar'] == 1 and both['bd3lm, raw'] >= 3 and both['ar, ema'] == 0

    else:
        tool = ['--num_samples=3', '--prompt=5', '--new_tokens=4', f'--judge={trained[0]}',
                f'--output={tmp_path}/t.json']
        text = here('-m tools.quality', f'{out},sampler=fixed|ancestral,steps=2', *tool, '--suffix=7', '--examples=1')
        held, fixed, ancestral = json.loads((tmp_path / 't.json').read_text())
        assert fixed['nfe'] == 2 and 1 <= ancestral['nfe'] <= 2 and text.count('steps=2\n[') == 2 \
            and all(held[k] > 0 for k in ('nll', 'nll_behind', 'entropy'))
        assert 'cannot see what stands behind' in here('-m tools.quality', trained[0], *tool, '--suffix=7', code=2)
        assert 'expected ar, whose likelihood is exact' in here(f'-m tools.quality {out} --judge={out}', code=2)
        assert 'has no use for sampler' in here('-m tools.quality', f'{trained[0]},sampler=fixed', *tool, code=2)

def test_what_quality_counts(corpus, trained, monkeypatch):
    """ the judge's nats of some tokens, in texts of one and of three contexts; variety that can be counted by hand """
    critic, _ = models.load_checkpoint(trained[0] / 'ckpt_best.pt')
    idx = torch.from_numpy(next(prepare.Corpus(str(corpus)).windows('val', 2, 40))['idx'])
    targets = torch.where((torch.arange(40) >= 10) & (torch.arange(40) < 36), idx, -1)
    logp = torch.cat([critic(torch.nn.functional.pad(part[:, :-1], (1, 0),
        value=critic.config.begin_id))[0].log_softmax(-1) for part in idx.split(16, 1)], 1)
    nats, scored = quality.judged(critic, idx, targets)
    assert scored.tolist() == [26, 26] and torch.allclose(nats, -logp.gather(2, idx[:, :, None])[:, 10:36, 0].sum(1),
                                                          rtol=1e-5)
    found = quality.variety([[0, 1, 0, 1, 0], [0, 1, 2, 3, 4]], 2) # 01 10 01 10 and 01 12 23 34
    assert found['distinct'] == 5 / 8 and found['repetition'] == 2 / 8 \
        and abs(found['entropy'] - -sum(p * math.log(p) for p in (.4, .3, .1, .1, .1))) < 1e-12
    if importlib.util.find_spec('sacrebleu'):
        monkeypatch.setattr(quality, 'bleu', 'words')
        assert abs(quality.likeness(['to be or not to eat'],
                                    ['to be or not to be']) - 100 * (5 / 6 * 4 / 5 * 3 / 4 * 2 / 3) ** 0.25) < 1e-6
    assert [row[0] for row in quality.contenders(['a,x=1|2,y=b'])] == ['a,x=1,y=b', 'a,x=2,y=b'] \
        and quality.contenders(['a,t=0.5'])[0][2] == {'t': 0.5}

def test_diffusion_forcing_trains_and_writes(corpus, trained, tmp_path, here):
    """ from the weights of ar; what it reports is called what it is """
    out = tmp_path / 'run'
    text = here('train.py --objective=df', *TINY, f'--dataset={corpus}', f'--out_dir={out}',
                f'--init_from={trained[0]}/ckpt_best.pt', '--bound_samples=2')
    readings = json.loads((out / 'results.json').read_text())['weights']
    paths = 'ar', 'autoregressive', 'pyramid', 'full_sequence'
    assert readings.keys() == {'raw', *(f'raw_as_{path}' for path in paths)} and 'raw weights as full sequence' in text
    names = [readings[r]['scoreboard']['name'] for r in ('raw', 'raw_as_pyramid', 'raw_as_ar')]
    assert names == ['nelbo', 'nelbo', 'nll'] and 'nelbo <=' in text
    raw, as_ar = (readings[name]['scoreboard']['nats_per_token'] for name in ('raw', 'raw_as_ar'))
    assert abs(raw - as_ar) < 1e-2
    assert all(0 <= float(log_of(out)[-1][k]) <= 1
               for k in ('accuracy_level_8', 'accuracy_level_16', 'accuracy_level_24', 'embedding_spread'))
    for options in '--df_scheduling_matrix=full_sequence', \
            '--stream=False --steps=4 --sampler=ddim --guidance=1 --df_uncertainty_scale=0.5':
        text = here(f'sample.py --start=The --max_new_tokens=12 --num_samples=2 --top_k=3 {options}',
                    f'--out_dir={out}')
        assert text.count('The') >= 2 and 'network evaluations' in text
    text = here('sample.py --order=entropy', f'--out_dir={out}', code=2)
    assert 'df has no use for --order: it takes max_new_tokens' in text
    results = json.loads((trained[0] / 'results.json').read_text())
    os.makedirs(tmp_path / 'elsewhere')
    (tmp_path / 'elsewhere' / 'results.json').write_text(json.dumps(results | {'dataset': 'another'}))
    table = here('-m tools.compare', out, trained[0])
    assert 'df, raw as full sequence' in table and 'nelbo <=' in table and 'nll =' in table \
        and 'not scored on the same' not in table
    assert 'not scored on the same' in here('-m tools.compare', tmp_path / 'elsewhere', trained[0])
    here('train.py --eval_only=True --df_sampling_timesteps=2', f'--out_dir={out}') # other paths of the same weights
    again = json.loads((out / 'results.json').read_text())['weights']
    assert again['raw_as_ar'] == readings['raw_as_ar'] and again['raw_as_pyramid'] != readings['raw_as_pyramid']

def test_bench(tmp_path, here):
    """ every objective and nanoGPT's network take turns; what is not measured is left out """
    small = '--block_size=16 --batch_size=2 --n_layer=1 --n_head=2 --n_embd=16 --device=cpu --threads=1'.split()
    text = run('-m tools.bench config/quick_test.py,n_layer=1,block_size=16 objective=mdlm,sampler=ancestral,steps=5 '
               'objective=bd3lm,diffusion_block_size=4 nanogpt '
               '--repetitions=2 --samples=1', *small, f'--output={tmp_path}/t.json')
    first, mdlm, bd3lm, nanogpt = json.loads((tmp_path / 't.json').read_text())
    assert all(row[k] > 0 for row in (first, mdlm, nanogpt)
               for k in ('train_ms', 'train_peak_bytes', 'sample_tokens_per_second')) and '1 threads, cpu' in text
    assert first['calls'] == bd3lm['calls'] == nanogpt['calls'] == 15 and 1 <= mdlm['calls'] <= 5 \
        and first['parameters'] > 10 * nanogpt['parameters']
    text = here('-m tools.bench objective=ar --repetitions=0 --samples=1', *small, f'--output={tmp_path}/t.json')
    assert 'train_ms' not in json.loads((tmp_path / 't.json').read_text())[0]
    for args, sentence in [('', 'name contenders'), ('objectiv=ar', 'did you mean objective'),
                           ('objective=bd3lm,diffusion_block_size=0', 'needs diffusion_block_size')]:
        assert sentence in here(f'-m tools.bench {args}', code=2)

def test_weights_bring_their_architecture(corpus, trained, tmp_path, here):
    """ of nanoGPT, into another objective; weights of another alphabet are refused """
    args = dict(n_layer=2, n_head=2, n_embd=32, block_size=16, bias=False,
                vocab_size=json.loads((corpus / 'meta.json').read_text())['text_size'])
    gpt = models.GPT(models.GPTConfig(**args, pos='learned', mlp='gelu', qk_norm=False, tie_weights=True, init='gpt2'))
    torch.save({'model': gpt.state_dict(), 'model_args': args | {'dropout': 0.0}}, tmp_path / 'ckpt.pt')
    tiny = [a for a in TINY if 'n_' not in a]
    here('train.py --objective=bd3lm --diffusion_block_size=4', *tiny, f'--dataset={corpus}',
         f'--out_dir={tmp_path}/run', f'--init_from={tmp_path}/ckpt.pt', '--scoreboard_windows=2')
    settings = json.loads((tmp_path / 'run' / 'settings.json').read_text())
    brought = [settings[k] for k in ('n_layer', 'n_embd', 'pos', 'mlp', 'qk_norm', 'tie_weights')]
    assert brought == [2, 32, 'learned', 'gelu', False, True]
    here('train.py --init_from=resume --max_iters=7', f'--out_dir={tmp_path}/run')
    (tmp_path / 'b.txt').write_text('Another alphabet: éàü. ' * 60)
    prepare.prepare('text', str(tmp_path / 'other'), 'char', input=str(tmp_path / 'b.txt'))
    text = here('train.py', *TINY, f'--dataset={tmp_path}/other', f'--out_dir={tmp_path}/run2',
                f'--init_from={trained[0]}/ckpt_best.pt', code=2)
    assert 'read other tokens' in text and 'chars is' in text

def test_a_run_that_diverges_says_so_and_keeps_its_last_checkpoint(corpus, tmp_path, here):
    args = [*TINY, f'--dataset={corpus}', f'--out_dir={tmp_path}', '--scoreboard_windows=0']
    here('train.py', *args)
    text = here('train.py --init_from=resume --learning_rate=1e30 --muon_learning_rate=1e30 --grad_clip=0',
                '--max_iters=30', '--warmup_iters=0', f'--out_dir={tmp_path}', code=2)
    assert 'the run diverged: loss ' in text and 'go on from the last checkpoint' in text
    kept = models.read_checkpoint(tmp_path / 'ckpt_latest.pt')
    assert all(w.isfinite().all() for w in kept['model'].values()) \
        and 'iter 8' in here('train.py --init_from=resume --learning_rate=1e-3 --muon_learning_rate=0.01 --max_iters=8',
                             f'--out_dir={tmp_path}')

def test_what_a_disk_cannot_hold_ends_in_a_sentence(corpus, tmp_path):
    """ files of at most 8 kB stand in for a full disk; the next run goes on from what was whole """
    args = ['train.py', *TINY, f'--dataset={corpus}', f'--out_dir={tmp_path}/run', '--scoreboard_windows=0']
    limited = ('import resource, runpy, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (8192, 8192)); '
               "sys.argv = sys.argv[1:]; runpy.run_path('train.py', run_name='__main__')")
    done = subprocess.run([sys.executable, '-c', limited, *args], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and 'what was saved before is untouched' in done.stderr \
        and 'Traceback' not in done.stderr
    assert sorted(os.listdir(tmp_path / 'run')) == ['log.csv', 'settings.json']

@pytest.mark.parametrize('processes, more', [(2, '--objective=ar'), (2, '--objective=mdlm --t_dist=bell'),
                                             (4, '--objective=bd3lm --diffusion_block_size=4')])
def test_several_processes(corpus, tmp_path, processes, more, here):
    """
    torchrun on gloo processes is one process with accumulation, up to the order of sums; either goes on with the
    other's checkpoint. By AdamW: Muon orthogonalises in bfloat16, where the last bit of a float32 sum can flip a
    rounding of one part in 256.
    """
    args = [*TINY, f'--dataset={corpus}', '--gradient_accumulation_steps=4', '--scoreboard_windows=2',
            '--optimizer=adamw', *more.split()]
    here('train.py', *args, f'--out_dir={tmp_path}/one')
    run(f'--standalone --nproc_per_node={processes} train.py', *args, f'--out_dir={tmp_path}/many', launcher=TORCHRUN)
    here('train.py --init_from=resume --max_iters=9', f'--out_dir={tmp_path}/one')
    here('train.py --init_from=resume --max_iters=9', f'--out_dir={tmp_path}/many') # on one process
    loss = next(k for k in ('nll', 'nelbo', 'ce') if k in log_of(tmp_path / 'one')[0])
    for a, b in zip(log_of(tmp_path / 'one'), log_of(tmp_path / 'many'), strict=True):
        assert abs(float(a[loss]) - float(b[loss])) < 1e-5

@pytest.mark.parametrize('args, sentence', [
    ('--objective=arr', "expected one of ar"), ('--norm=batchnorm', 'expected one of rmsnorm'),
    ('--attention=full', 'works with attention causal'),
    ('--optimizer=sgd', 'expected adamw or muon'), ('--decay=cubic', 'expected linear, cosine'),
    ('--dtype=float8', 'expected auto or one of'),
    ('--device=cuda:9', 'cannot be used here'), ('--init_from=gpt5', 'GPT-2 of Hugging Face'),
    ('--init_from=out/ckpt.pt', 'there is no checkpoint out/ckpt.pt'), ('--batch_size=0', 'batch_size is 0'),
    ('--seed=-1', '0 or more'),
    ('--block_size=400', 'fewer than the context of'), ('--dataset=shakespere_char', 'shakespeare_char'),
    ('--n_head=3', 'multiple of n_head'),
    ('--objective=df --df_stabilization_level=0', 'pure noise'),
    ('--objective=df --df_chunk_size=abc', 'df_chunk_size must be int or None'),
    ('--init_from=resume', 'no run to resume'), ('--eval_only=True', 'no run to resume'), ('--max_iter=3', 'max_iters'),
    ('--attn_backend=flex', 'trains on cuda only'),
    ('--dropout=20', 'dropout is 20.0, expected 0 or more and below 1'), ('--n_head=0', 'n_head is 0'),
    ('--block_size=-4', 'block_size is -4'), ('--max_iters=-1', 'max_iters is -1'),
    ('--objective=mdlm --ar_weight=1 --batch_size=1', 'batch_size of at least 2'),
    ('--objective=denoise', 'nothing is hidden'),
    ('--batch_size=10000000000000', 'out of memory on cpu at batch_size=10000000000000'),
])
def test_wrong_settings_start_nothing(corpus, tmp_path, here, args, sentence):
    text = here('train.py', *TINY, f'--dataset={corpus}', f'--out_dir={tmp_path}/run', *args.split(), code=2)
    assert sentence in text and text.count('\n') == 1 and not (tmp_path / 'run').exists()

def test_a_run_is_not_overwritten_and_a_foreign_checkpoint_not_resumed(trained, corpus, tmp_path, here):
    out, before = trained[0], (trained[0] / 'log.csv').read_bytes()
    assert 'already holds a run' in here('train.py', *TINY, f'--dataset={corpus}', f'--out_dir={out}', code=2)
    assert 'n_layer' in here('train.py --init_from=resume --n_layer=2', f'--out_dir={out}', code=2)
    assert 'iteration 6, beyond max_iters 4' in here('train.py --init_from=resume --max_iters=4', f'--out_dir={out}',
                                                     code=2)
    whole = (out / 'ckpt_best.pt').read_bytes()
    (tmp_path / 'half.pt').write_bytes(whole[:1000])
    for size in (0, 1, 5000, len(whole) - 1, *torch.randint(len(whole), (50,)).tolist()): # wherever it breaks off
        (tmp_path / 'part.pt').write_bytes(whole[:size])
        with pytest.raises(ValueError, match='part.pt is no checkpoint that can be read'):
            models.read_checkpoint(tmp_path / 'part.pt')
    later = models.read_checkpoint(out / 'ckpt_best.pt')
    torch.save(later | {'config': later['config'] | {'n_expert': 4}}, tmp_path / 'later.pt')
    assert 'it differs in n_expert' in here(f'train.py --init_from=resume --ckpt={tmp_path}/later.pt',
                                            f'--out_dir={out}', code=2)
    torch.save({'weights': 1}, tmp_path / 'foreign.pt')
    torch.save({'format': 99}, tmp_path / 'newer.pt')
    torch.save(os.system, tmp_path / 'unsafe.pt')
    for name, sentence in [('half', 'truncated'), ('foreign', "has no 'format'"), ('newer', 'format 99'),
                           ('unsafe', 'no checkpoint that can be read')]:
        assert sentence in here(f'train.py --init_from=resume --ckpt={tmp_path}/{name}.pt', f'--out_dir={out}', code=2)
        assert sentence in here(f'sample.py --ckpt={tmp_path}/{name}.pt', code=2)
    swapped = 'The quick brown fox jumps over the lazy dog, and so on.\n'.swapcase() # as many characters
    (tmp_path / 'swapped.txt').write_text(swapped * 60)
    prepare.prepare('text', str(tmp_path / 'other'), 'char', input=str(tmp_path / 'swapped.txt'))
    assert 'it differs in chars' in here(f'train.py --init_from=resume --dataset={tmp_path}/other',
                                         f'--out_dir={out}', code=2)
    assert (out / 'log.csv').read_bytes() == before
    (tmp_path / 'file').write_text('')
    assert 'cannot create the run folder' in here('train.py', *TINY, f'--dataset={corpus}',
                                                  f'--out_dir={tmp_path}/file/run', code=2)
