"""
Laws of sample.py as a command: whatever a model writes can be shown, and what cannot work is one sentence. The models
are tiny and untrained; their checkpoints have the keys that train.py saves.
"""
import dataclasses
import itertools
import os
import runpy
import subprocess
import sys
import textwrap

import pytest
import torch

import model as models
import prepare
import sample
from model import GPT, OBJECTIVES, GPTConfig, UserError
from prepare import PrepareError, Tokenizer, vocabulary

ROOT = os.path.dirname(os.path.abspath(sample.__file__))
TEXT = 'ROMEO: and my love.\n'
SIZES = dict(block_size=32, n_layer=1, n_head=2, n_embd=16)
IDS = 'vocab_size', 'text_size', 'begin_id', 'mask_id'

def save(folder, objective='ar', meta=None, kind=None, name='best', dataset='text', begin=True, ema=False, **settings):
    """ write a checkpoint of an untrained model into a run's folder, as train.py's save() does; returns the folder """
    meta = {**vocabulary('char', [TEXT]), 'splits': {}} if meta is None else meta
    torch.manual_seed(0)
    kind = kind or OBJECTIVES[objective]
    ids = {k: meta[k] for k in IDS} | ({} if begin else {'begin_id': None})
    model = kind(GPTConfig(**{**SIZES, **ids, 'attention': kind.attentions[0], **settings}))
    for p in model.parameters():
        if p.dim() == 2:
            torch.nn.init.normal_(p, std=0.4)
    folder.mkdir(exist_ok=True, parents=True)
    averaged = {k: torch.randn_like(v) for k, v in model.state_dict().items()} if ema else None
    torch.save({'format': 1, 'objective': objective, 'config': dataclasses.asdict(model.config),
                'model': model.state_dict(), 'ema': averaged, 'optimizers': [], 'scaler': {},
                'iteration': 3, 'tokens': 96, 'best': 2.5,
                'settings': {'dataset': str(dataset)}, 'meta': meta}, folder / f'ckpt_{name}.pt')
    return folder

@pytest.fixture(scope='module')
def runs(tmp_path_factory):
    """ {name: folder of a run} """
    place = tmp_path_factory.mktemp('runs')
    records = vocabulary('char', [TEXT], closed=True) | {'segments': 'question:8,plan:8,execution:16'}
    return {'ar': save(place / 'ar'), 'mdlm': save(place / 'mdlm', 'mdlm'), 'df': save(place / 'df', 'df'),
            'bd3lm': save(place / 'bd3lm', 'bd3lm', diffusion_block_size=4),
            'byte': save(place / 'byte', meta=vocabulary('byte')),
            'records': save(place / 'records', meta=records, segments=records['segments'])}

@pytest.fixture
def here(monkeypatch, capsys):
    """ the script as a command, with fresh settings, but in this process, which has torch already -> stdout, stderr """
    small = '--device=cpu', '--num_samples=1', '--max_new_tokens=12'
    def run(*args, code=0):
        monkeypatch.setattr(sys, 'argv', ['sample.py', *small, *map(str, args)])
        left = 0
        try:
            runpy.run_path(sample.__file__, run_name='__main__')
        except SystemExit as e:
            left = e.code
        out, err = capsys.readouterr()
        assert left == code, out + err
        assert code != 2 or err.splitlines()[-1].startswith('error: ') and 'Traceback' not in err
        return out, err
    return run

def command(*args, **more):
    """ the script as a command in a process of its own """
    env = {**os.environ, 'OMP_NUM_THREADS': '1', **more.pop('env', {})}
    return subprocess.Popen([sys.executable, 'sample.py', '--device=cpu', *map(str, args)], cwd=ROOT, env=env,
                            **{'stdout': subprocess.PIPE, 'stderr': subprocess.PIPE, **more})

# what comes first where nothing is given

def write_sample(here, folder, *args):
    out, _ = here(f'--out_dir={folder}', *args)
    assert out.endswith('\n---------------\n')
    return out.removesuffix('\n---------------\n')

@pytest.mark.parametrize('text, closed, first', [
    (TEXT, False, '\n'), (TEXT, True, '\n'), ('ACGT', False, 'A'), ('ACGT', True, None),
    ('a b', False, ' '), ('日本', False, '日'), ('x', False, 'x'), ('\r\t', False, '\t')])
def test_a_text_begins_with_something_that_exists(here, tmp_path, text, closed, first):
    """ a newline, else the end id, which shows nothing, else the first character of the vocabulary """
    meta = vocabulary('char', [text], closed)
    folder = save(tmp_path / 'run', meta=meta, begin=False)
    found = write_sample(here, folder)
    assert set(found) <= set(text)
    assert found[0] == first and (closed or len(found) == 13) if first else len(found) <= 12
    assert sample.first_token(Tokenizer(meta)) == (meta['end_id'] if first is None else meta['chars'].index(first))
    begun = write_sample(here, save(tmp_path / 'begun', meta=meta))
    assert len(begun) <= 12 # after a begin id nothing is added

@pytest.mark.parametrize('objective', ['ar', 'mdlm', 'bd3lm', 'df'])
def test_a_text_begins_with_something_for_every_objective(here, tmp_path, objective):
    blocks = {'diffusion_block_size': 4} if objective == 'bd3lm' else {}
    folder = save(tmp_path, objective, vocabulary('char', ['ACGT']), begin=False, **blocks)
    assert write_sample(here, folder)[0] == 'A'

def test_a_text_of_bytes_begins_with_a_newline(here, tmp_path):
    assert write_sample(here, save(tmp_path, meta=vocabulary('byte'), begin=False))[0] == '\n'

# whatever is written can be shown

@pytest.mark.parametrize('encoding, stream', [
    ('ascii', True), ('cp1252', True), ('utf-8', True), ('latin-1:strict', True), ('ascii', False)])
def test_any_bytes_can_be_shown(runs, encoding, stream):
    """ of a byte model that has learned nothing: NUL, halves of characters, invalid UTF-8 """
    done = command(f"--out_dir={runs['byte']}", '--max_new_tokens=150', '--temperature=1', '--num_samples=2',
                   '--start=“é日\udce9', f'--stream={stream}', env={'PYTHONIOENCODING': encoding})
    out, err = done.communicate(timeout=120)
    assert done.returncode == 0 and b'Traceback' not in err and b'300 tokens at most' in err, err
    text = out.decode(encoding.split(':')[0])
    begins = {'utf-8': '“é日', 'ascii': r'\u201c\xe9', 'cp1252': '“é', 'latin-1:strict': r'\u201cé'}
    assert text.count('\n---------------\n') == 2 and text.startswith(begins[encoding])

def test_streaming_shows_what_a_batch_shows(runs, here):
    """ half a character waits for its other half, and nothing is shown twice or left out """
    for args in [
            ['--seed=1', '--max_new_tokens=200'], ['--seed=2', '--temperature=3', '--max_new_tokens=64'],
            ['--seed=3', '--start=日本é', '--temperature=1', '--max_new_tokens=64']]:
        whole, _ = here(f"--out_dir={runs['byte']}", '--stream=False', *args)
        assert here(f"--out_dir={runs['byte']}", *args)[0] == whole and '\ufffd' in whole

def test_half_a_character_waits(monkeypatch, capsys):
    tokenizer = Tokenizer(vocabulary('byte'))
    progress = sample.Progress(9, 0)
    printer, shown = sample.Printer(tokenizer.decode, progress), []
    row = torch.full((1, 9), -1)
    for n, byte in enumerate('a日é'.encode() + b'\xff!\xe6', 1):
        row[0, n - 1] = byte
        printer(n, row, None, {'nfe': n, 'done': n})
        shown.append(capsys.readouterr().out)
    printer.write(row[0].tolist())
    assert shown == ['a', '', '', '日', '', 'é', '', '\ufffd!', ''] and capsys.readouterr().out == '\ufffd'

# what the settings do

def samples(out):
    """ the samples that a command wrote, and nothing else """
    assert out.endswith('\n---------------\n')
    return out.removesuffix('\n---------------\n').split('\n---------------\n')

def test_a_seed_decides_and_samples_differ(runs, here):
    written = lambda seed: samples(here(f"--out_dir={runs['ar']}", '--num_samples=3', f'--seed={seed}')[0])
    first, again, other = written(5), written(5), written(6)
    assert first == again and len(set(first) | set(other)) == 6

def test_samples_are_whole_and_alone_on_stdout(runs, here):
    """ so many of them, of so many tokens each; stderr has the rest, the calls of all samples added up """
    for name, calls in ('ar', 12), ('mdlm', 12), ('bd3lm', 12):
        for stream in True, False:
            out, err = here(f'--out_dir={runs[name]}', '--num_samples=3', f'--stream={stream}', '--start=my')
            assert [s[:2] for s in samples(out)] == ['my'] * 3 and {len(s) for s in samples(out)} == {14}
            assert err.startswith(f'loaded {runs[name]}/ckpt_best.pt: {name}, ')
            assert 'iteration 3 on text, raw weights, char tokens, cpu' in err
            assert f'36 tokens at most, {calls * (3 if stream else 1)} network evaluations' in err

def test_weights_and_views(here, tmp_path):
    both, raw = save(tmp_path / 'both', ema=True), save(tmp_path / 'raw')
    found = {(folder, weights): here(f'--out_dir={folder}', f'--weights={weights}', '--temperature=0',
                                     '--max_new_tokens=30')
             for folder in (both, raw) for weights in ('raw', 'ema')}
    text = {key: out for key, (out, _) in found.items()}
    assert text[both, 'raw'] == text[raw, 'raw'] == text[raw, 'ema'] != text[both, 'ema']
    assert [key for key, (_, err) in found.items() if 'averaged weights' in err] == [(both, 'ema')]
    dual = save(tmp_path / 'dual', 'bd3lm', diffusion_block_size=4, clean_causal=True)
    assert 'bd3lm as ar' in here(f'--out_dir={dual}', '--view=ar')[1]
    refused = here(f'--out_dir={dual}', '--view=ar', '--steps=3', code=2)[1]
    assert 'ar has no use for --steps: it takes max_new_tokens, temperature' in refused

def test_a_stop_ends_the_writing_and_the_sample(runs, here):
    """ also the calls; a stop token that the prompt has ends nothing """
    for name in 'ar', 'bd3lm':
        args = f'--out_dir={runs[name]}', '--start=my love', '--temperature=0'
        plain, = samples(here(*args)[0])
        stop = plain[9]
        at = plain.index(stop, 7)
        out, err = here(*args, f'--stop={stop}')
        assert samples(out) == [plain[:at]] and int(err.split(' network')[0].split()[-1]) < 12
        assert samples(here(*args, '--stop=m')[0])[0].startswith('my love')

def test_every_setting_reaches_generate(runs, here, monkeypatch):
    given = dict(temperature=0.5, top_k=3, top_p=0.25, sampler='fixed', steps=7, order='margin', schedule='cosine',
                 confidence_threshold=0.1, entropy_budget=0.2, remask=0.3, df_scheduling_matrix='pyramid',
                 df_uncertainty_scale=2.0, guidance=1.0)
    told = []
    def generate(self, idx, max_new_tokens, **more):
        more = {k: v for k, v in more.items() if k not in ('on_step', 'block_ids')}
        told.append((idx.tolist(), max_new_tokens, more))
        return torch.zeros(len(idx), idx.size(1) + max_new_tokens, dtype=torch.long)
    monkeypatch.setattr(GPT, 'generate', generate)
    assert set(given) == set(sample.OPTIONS)
    y = Tokenizer(vocabulary('char', [TEXT])).encode('y')[0]
    for args, expected in [
            ([f'--{k}={v}' for k, v in given.items()], given), ([], {'temperature': 0.8}),
            (['--top_k=None', '--guidance=0'], {'temperature': 0.8, 'guidance': 0.0})]:
        here(f"--out_dir={runs['ar']}", '--start=y', '--stop=y', '--num_samples=2', '--stream=False', *args)
        assert told.pop() == ([[y]] * 2, 12, {'stop': y} | expected)

# options pick their sampler

GIVEN = dict(steps=[20, 1, None], order=['random', 'margin', None], schedule=['linear', 'cosine', None],
             confidence_threshold=[0.8, 0.0, None], entropy_budget=[0.5, 0, None], remask=[0.2, 0.0, 0, None])
ABSENT = dict(steps=None, order=None, schedule='linear', confidence_threshold=None, entropy_budget=None, remask=0.0)

def refusals(options, samplers):
    """ {sampler: the sentence of generate's own check, None where it takes the options} """
    found = {}
    for name in samplers:
        try:
            models.check_sampler(name, **ABSENT | {k: v for k, v in options.items() if v is not None})
            found[name] = None
        except UserError as e:
            found[name] = str(e)
    return found

def test_a_sampler_is_found_where_there_is_one():
    """ of all sets of options: the default where it takes them, else a sampler that does, else a sentence """
    for values in itertools.product(*GIVEN.values()):
        options = dict(zip(GIVEN, values))
        fits = [name for name, refused in refusals(options, models.SAMPLERS).items() if refused is None]
        for default in models.SAMPLERS:
            if fits:
                found = sample.sampler_for(options, default)
                assert found == default if default in fits else found in fits, options
                continue
            with pytest.raises(PrepareError, match='no sampler reads') as e:
                sample.sampler_for(options, default)
            for name, value in options.items(): # the sentence names what was given, and whose it is
                owners = ' | '.join(s for s in models.SAMPLERS if name in models.SAMPLERS[s])
                asks = value is not None and value != {'order': 'random', 'schedule': 'linear', 'remask': 0}.get(name)
                assert (f'{name}={value}' in str(e.value)) == asks == (f'{name} belongs to {owners}' in str(e.value))

@pytest.mark.parametrize('options, sampler', [
    ({}, 'first_hitting'), ({'order': 'margin'}, 'first_hitting'), ({'remask': 0}, 'first_hitting'),
    ({'confidence_threshold': 0.8}, 'threshold'), ({'entropy_budget': 0.5}, 'entropy_bound'),
    ({'steps': 20}, 'fixed'), ({'schedule': 'cosine'}, 'fixed'), ({'remask': 0.2}, 'fixed'),
    ({'steps': 20, 'order': 'random'}, 'fixed'), ({'steps': 20, 'schedule': 'cosine', 'remask': 0.2}, 'fixed'),
    ({'confidence_threshold': 0.8, 'order': 'margin', 'remask': 0.0, 'schedule': 'linear'}, 'threshold')])
def test_the_sampler_that_measured_best_comes_first(options, sampler):
    assert sample.sampler_for(options, 'first_hitting') == sampler
    assert sample.sampler_for({**options, 'temperature': 0.5, 'guidance': 1.0}, 'first_hitting') == sampler

def test_a_sampler_of_ones_own_is_found_by_its_options():
    samplers = {**models.SAMPLERS, 'mine': ('order', 'patience'), 'yours': ('patience', 'steps')}
    assert sample.sampler_for({'patience': 3, 'order': 'margin'}, 'first_hitting', samplers) == 'mine'
    assert sample.sampler_for({'patience': 3, 'steps': 9}, 'first_hitting', samplers) == 'yours'
    assert sample.sampler_for({'steps': 9}, 'first_hitting', samplers) == 'fixed' # which was measured
    assert sample.sampler_for({'patience': 3}, 'first_hitting') == 'first_hitting' # not one of a sampler's options

@pytest.mark.parametrize('args, says', [
    ('--confidence_threshold=0.8', 'sampler=threshold, because of confidence_threshold=0.8'),
    ('--confidence_threshold=0.8 --order=margin --remask=0', 'sampler=threshold, because of confidence_threshold=0.8'),
    ('--entropy_budget=0.5', 'sampler=entropy_bound, because of entropy_budget=0.5'),
    ('--steps=6', 'sampler=fixed, because of steps=6'),
    ('--sampler=None --steps=6', 'sampler=fixed, because of steps=6'),
    ('--steps=6 --schedule=cosine --remask=0.2', 'sampler=fixed, because of steps=6, schedule=cosine and remask=0.2')])
@pytest.mark.parametrize('name', ['mdlm', 'bd3lm'])
def test_options_pick_the_sampler_that_reads_them(runs, here, name, args, says):
    """ as if it had been named, and stderr says so in a line """
    args = [f'--out_dir={runs[name]}', '--start=my', *args.split()]
    out, err = here(*args)
    assert [line for line in err.splitlines() if line.startswith('sampler=')] == [says]
    named = here(*args, f"--sampler={says.split(',')[0].removeprefix('sampler=')}")
    assert named[0] == out and 'sampler=' not in named[1]

def test_options_that_pick_no_sampler(runs, here):
    """ nothing is said where the default reads what was given, where a sampler is named, and of other models """
    for name, args in [
            ('mdlm', ''), ('mdlm', '--order=margin'), ('bd3lm', '--remask=0 --schedule=linear'),
            ('mdlm', '--sampler=ancestral --steps=6'), ('ar', ''), ('df', '--steps=4'),
            ('df', '--sampler=ddim --steps=4')]:
        assert 'sampler=' not in here(f'--out_dir={runs[name]}', '--start=my', *args.split())[1]
    for name, args, says in [
            ('mdlm', '--steps=6 --confidence_threshold=0.8',
             'no sampler reads steps=6 and confidence_threshold=0.8 together: '
             'steps belongs to ancestral | fixed, confidence_threshold belongs to threshold; leave out'),
            ('mdlm', '--sampler=threshold --steps=6', 'sampler threshold has no use for steps=6: leave steps out'),
            ('mdlm', '--order=luck --steps=6', "order is 'luck', expected one of random"),
            ('ar', '--steps=6', 'ar has no use for --steps'), ('df', '--remask=0.2', 'df has no use for --remask')]:
        assert says in here(f'--out_dir={runs[name]}', '--start=my', *args.split(), code=2)[1]

def test_questions(runs, here, monkeypatch):
    """ of a model of segments: stripped, answered under the names of the segments, each up to its end """
    tokenizer, folder = Tokenizer(vocabulary('char', [TEXT], closed=True)), f"--out_dir={runs['records']}"
    found = [here(folder, f'--start={question}')[0] for question in ('my', ' my\n')]
    assert found[0] == found[1] and found[0].startswith('plan:\n')
    assert found[0].count('execution:\n') <= 1 and 'question' not in found[0]
    end, encode = tokenizer.end_id, lambda text: [*tokenizer.encode(text), tokenizer.end_id]
    def generate(self, idx, max_new_tokens, *, temperature, stop, on_step):
        assert (idx[0].tolist(), max_new_tokens, stop) == (encode('my'), 24, end)
        return torch.cat((idx, torch.tensor([[*encode('do'), *encode('ne.'), *[end] * 17]])), 1)
    monkeypatch.setattr(GPT, 'generate', generate)
    assert samples(here(folder, '--start=my')[0]) == ['plan:\ndo\n\nexecution:\nne.']
    refused = here(folder, '--start=my my my', code=2)[1]
    assert 'the question has 8 tokens, this model reads at most 7' in refused

def test_progress_counts_all_samples(runs, here, monkeypatch):
    clock = iter(range(0, 10 ** 6, 20)) # 20 s between any two looks at it
    monkeypatch.setattr('time.time', lambda: next(clock))
    _, err = here(f"--out_dir={runs['ar']}", '--num_samples=3', '--start=my')
    counts = [int(line.split()[0]) for line in err.splitlines() if ' of 36 tokens' in line]
    assert counts == list(range(1, 37))

def test_an_interrupt_is_no_traceback(runs, here, monkeypatch):
    def generate(self, idx, max_new_tokens, **more):
        raise KeyboardInterrupt
    monkeypatch.setattr(GPT, 'generate', generate)
    assert here(f"--out_dir={runs['ar']}", code=130)[1].endswith('cpu\n\n')

# who reads it

@pytest.mark.parametrize('args', ['', '--stream=False', '--help'])
@pytest.mark.parametrize('both', [False, True])
def test_a_reader_that_has_enough_ends_it_quietly(runs, args, both):
    """ as `| head -c 1` does, at the latest before it begins to write; and where stderr is the same pipe """
    same_pipe = {'stderr': subprocess.STDOUT} if both else {}
    done = command(f"--out_dir={runs['ar']}", *args.split(), bufsize=0, **same_pipe)
    done.stdout.close() # long before python has loaded torch
    err = b'' if both else done.stderr.read()
    assert done.wait(120) == 141 and b'rror' not in err and b'xception' not in err, err

def test_closed_and_full_outputs(runs):
    line = f"{sys.executable} sample.py --device=cpu --num_samples=1 --out_dir={runs['ar']} >&-"
    done = subprocess.run(line, cwd=ROOT, shell=True, capture_output=True, text=True)
    assert done.returncode == 0 and 'Traceback' not in done.stderr and '400 tokens at most' in done.stderr
    if os.path.exists('/dev/full'):
        with open('/dev/full', 'w') as full:
            done = command(f"--out_dir={runs['ar']}", stdout=full)
            err = done.communicate(timeout=120)[1].decode()
        assert done.returncode == 2 and 'xception' not in err
        assert err.splitlines()[-1].startswith('error: cannot write the samples: No space')

# numbers beyond sense

@pytest.mark.parametrize('args, says', [
    ('--start=my[[999999999999999999999]]',
     'the prompt has a gap, [[999999999999999999999]], with which it has more than 10,000,000 tokens'),
    ('--start=my[[100000000000000]]', 'more than 10,000,000 tokens; if this is text, write \\[[100000000000000]]'),
    (f"--start=my[[{'9' * 5000}]]", 'more than 10,000,000'), (f"--start=my[[{'0' * 5000}]]", 'a gap of no tokens'),
    ('--start=my[[6000000]]m[[6000000]]', 'with which it has more than 10,000,000'),
    ('--start=my[[9999990]]', '1 x 10,000,004 tokens at once are more than 10,000,000: ask for fewer'),
    ('--num_samples=1000000000', 'num_samples is 1000000000, expected at most 10,000,000'),
    (f"--num_samples=0x{'f' * 5000}", 'num_samples is something unprintable, expected at most'),
    ('--num_samples=-1', 'num_samples is -1, expected at least 1'),
    (f"--num_samples=-0x{'f' * 5000}", 'expected at least 1'),
    ('--num_samples=1000000 --stream=False',
     '1,000,000 x 12 tokens at once are more than 10,000,000: ask for fewer or leave out --stream=False'),
    ('--max_new_tokens=1000000000000', 'max_new_tokens is 1000000000000, expected at most 10,000,000'),
    ('--max_new_tokens=1e30', 'max_new_tokens is 1000000000000000019884624838656'),
    ('--max_new_tokens=-1', 'max_new_tokens is -1, expected at least 1'),
    ('--max_new_tokens=-1000000000000000000000', 'expected at least 1'),
    ('--seed=99999999999999999999999', 'seed is 99999999999999999999999, expected 0 or more and below 2 ** 64'),
    ('--seed=18446744073709551616', 'below 2 ** 64'), ('--seed=-1', 'seed is -1, expected 0 or more'),
    ('--seed=1.5', 'seed must be int'), ('--temperature=abc', 'temperature must be float (default 0.8), got str abc'),
    ('--temperature=inf', 'temperature is inf, expected 0 (greedy) to 1e6'),
    ('--temperature=nan', 'temperature is nan'), ('--temperature=-1', 'temperature is -1.0'),
    ('--sampler=fixed --steps=1000000000000', 'steps is 1000000000000, expected at most 1,000,000'),
    ('--steps=-5 --sampler=fixed', 'fewer than the'), ('--weights=foo', "weights is 'foo', expected ema or raw"),
    ('--view=foo', 'cannot be read as foo'), ('--view', '--view needs a value, e.g. --view=None'),
    ('--view=', 'cannot be read as'), ('--stop=', "stop '' is 0 tokens"), ('--stop=my', "stop 'my' is 2 tokens"),
    ('--stop=end', 'stop is end, but the text of this model has no end id'), ('--stop=é', "unknown character 'é'"),
    ('--stop=7', "unknown character '7'"), ('--stop=[1]', "unknown character '['"), ('--top_k=0', 'top_k is 0'),
    ('--top_k=2.5', 'top_k must be int or None'), ('--top_k=True', 'top_k must be int or None'),
    ('--top_p=x', 'top_p must be float or None'), ('--guidance=True', 'guidance must be float or None'),
    ('--start=FILE:', '--start=FILE: names no file, expected --start=FILE:prompt.txt'),
    ('--start=FILE:/', 'cannot read /: Is a directory'), ('--start=FILE:nowhere.txt', 'cannot read nowhere.txt'),
    ('--device=abc', "device 'abc' cannot be used here"), ('--dtype=int8', "dtype is 'int8'"),
])
def test_what_makes_no_sense_is_a_sentence(runs, here, args, says):
    assert says in here(f"--out_dir={runs['mdlm']}", *args.split(), code=2)[1]

def test_what_makes_sense_works(runs, here):
    for args in [
            '--seed=18446744073709551615', '--seed=0', '--top_k=9999999999999999999999', '--guidance=1 --start=my',
            '--stop=m', '--top_p=1', '--temperature=1e-300', '--temperature=1e6', '--view=None', '--stop=None',
            '--start=[[08]] --max_new_tokens=0', '--num_samples=2 --stream=False']:
        assert 'tokens at most' in here(f"--out_dir={runs['mdlm']}", *args.split())[1]
    records = f"--out_dir={runs['records']}"
    assert 'tokens at most' in here(records, '--start=my')[1]
    assert 'leave out --stop' in here(records, '--start=my', '--stop=m', code=2)[1]
    assert 'give one with --start=' in here(records, code=2)[1]

@pytest.mark.parametrize('error', [
    MemoryError(), torch.OutOfMemoryError('CUDA out of memory'),
    RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried")])
def test_memory_that_does_not_suffice_is_a_sentence(runs, here, monkeypatch, error):
    def generate(self, *args, top_k=None, top_p=None, temperature=1.0, **more):
        raise error
    monkeypatch.setattr(GPT, 'generate', generate)
    assert 'error: out of memory: lower num_samples' in here(f"--out_dir={runs['ar']}", code=2)[1]

# files

def test_a_checkpoint_that_is_not_there(runs, here, tmp_path):
    only = save(tmp_path / 'run', name='latest')
    refused = lambda *args: here(*args, code=2)[1]
    missing = refused(f'--out_dir={only}')
    assert "there is no checkpoint" in missing and 'ckpt_latest.pt' in missing.split(';')[1]
    assert here(f'--out_dir={only}', '--ckpt=latest')[0] and here(f'--ckpt={only}/ckpt_latest.pt')[0]
    assert (f"ckpt is the folder {only}, expected a checkpoint (it has ckpt_latest.pt); "
            "--out_dir= takes the folder of a run") in refused(f'--ckpt={only}')
    assert 'it has none' in refused(f'--ckpt={tmp_path}')
    assert 'train a model first' in refused(f'--out_dir={tmp_path}')
    (tmp_path / 'x' / 'ckpt_best.pt').mkdir(parents=True)
    assert 'ckpt_best.pt, expected a checkpoint' in refused(f'--out_dir={tmp_path}/x')

def test_a_tilde_is_the_home_folder(here, tmp_path, monkeypatch):
    monkeypatch.setenv('HOME', str(tmp_path))
    save(tmp_path / 'run')
    (tmp_path / 'prompt.txt').write_bytes(b'\xef\xbb\xbfmy\r\nlove')
    for args in ['--out_dir=~/run'], ['--ckpt=~/run/ckpt_best.pt'], [f'--out_dir={tmp_path}/run']:
        assert here(*args, '--start=FILE:~/prompt.txt')[0].startswith('my\nlove')
    assert "cannot read ~" not in here('--out_dir=~/run', '--start=FILE:~/none.txt', code=2)[1]
    assert "unknown character '~'" in here('--out_dir=~/run', '--start=~/prompt.txt', code=2)[1] # text, no path

# a dataset's own objectives

PROVIDER = textwrap.dedent('''
    from model import GPT, UserError
    from prepare import PrepareError

    class Mine(GPT):
        def generate(self, idx, max_new_tokens, **more):
            {}
            return super().generate(idx, max_new_tokens, **more)

    OBJECTIVES = {{'mine': Mine}}
''')

def test_a_bug_in_somebodys_generate_keeps_its_traceback(here, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, 'dont_write_bytecode', True)
    data = tmp_path / 'data'
    data.mkdir()
    folder = save(tmp_path / 'run', 'mine', dataset=data, kind=GPT)
    for line, error in [
            ('assert idx is None, "mine"', AssertionError), ('raise ValueError("mine")', ValueError),
            ('raise TypeError("mine")', TypeError), ('raise RuntimeError("mine")', RuntimeError),
            ('raise KeyError("mine")', KeyError), ('open("mine/nowhere")', OSError), ('1 / 0', ZeroDivisionError)]:
        (data / 'provider.py').write_text(PROVIDER.format(line))
        with pytest.raises(error):
            here(f'--out_dir={folder}')
    for line in 'raise UserError("mine says no")', 'raise PrepareError("mine says no")':
        (data / 'provider.py').write_text(PROVIDER.format(line))
        assert 'error: mine says no' in here(f'--out_dir={folder}', code=2)[1]
    (data / 'provider.py').write_text(PROVIDER.format('pass'))
    assert 'mine' in here(f'--out_dir={folder}')[1]

def test_options_of_somebodys_generate(here, tmp_path, monkeypatch):
    """ what it does not take is refused where it was given, and left out where it is a default """
    monkeypatch.setattr(sys, 'dont_write_bytecode', True)
    data = tmp_path / 'data'
    data.mkdir()
    folder = save(tmp_path / 'run', 'mine', dataset=data, kind=GPT)
    code = PROVIDER.format('print("told", more.keys() - {"stop", "on_step"})')
    (data / 'provider.py').write_text(code)
    assert "told {'temperature'}" in here(f'--out_dir={folder}')[0]
    named = code.replace('**more)', 'stop=None, on_step=None, top_k=None)').replace('more.keys()', '{"none"}')
    (data / 'provider.py').write_text(named)
    assert "told {'none'}" in here(f'--out_dir={folder}', '--top_k=3')[0]
    for arg in '--temperature=1', '--temperature=0.8', '--steps=3':
        says = f"mine has no use for {arg.split('=')[0]}: it takes max_new_tokens, top_k, stop"
        assert says in here(f'--out_dir={folder}', arg, code=2)[1]

@pytest.mark.parametrize('takes, told', [
    ('temperature, stop, on_step, steps=64', {'steps': 6, 'temperature': 0.8}), # no sampler to choose
    ('stop, on_step, **more', {'steps': 6, 'temperature': 0.8}), # nobody knows what it does with one
    ("temperature, stop, on_step, steps=64, sampler='mine'", {'steps': 6, 'sampler': 'mine', 'temperature': 0.8}),
    ('temperature, stop, on_step, steps=64, sampler=None', {'steps': 6, 'sampler': None, 'temperature': 0.8}),
    ("temperature, stop, on_step, steps=64, sampler='first_hitting'",
     {'steps': 6, 'sampler': 'fixed', 'temperature': 0.8})])
def test_steps_of_somebodys_generate(here, tmp_path, monkeypatch, takes, told):
    """ a sampler is chosen only for a generate that has ours """
    monkeypatch.setattr(sys, 'dont_write_bytecode', True)
    data = tmp_path / 'data'
    data.mkdir()
    folder = save(tmp_path / 'run', 'mine', dataset=data, kind=GPT)
    (data / 'provider.py').write_text(textwrap.dedent(f'''
        import torch
        from model import GPT

        class Mine(GPT):
            def generate(self, idx, max_new_tokens, *, {takes}):
                told = locals() | locals().get('more', {{}})
                print('told', {{k: told[k] for k in ('steps', 'sampler', 'temperature') if k in told}})
                return torch.cat((idx, idx.new_zeros(len(idx), max_new_tokens)), 1)

        OBJECTIVES = {{'mine': Mine}}
    '''))
    out, err = here(f'--out_dir={folder}', '--steps=6')
    assert f'told {told}' in out and ('sampler=fixed' in err) == (told.get('sampler') == 'fixed')

def test_a_provider_that_is_not_there(here, tmp_path, monkeypatch):
    """ its objective is missed; a model of ours needs no dataset """
    monkeypatch.setattr(sys, 'dont_write_bytecode', True)
    data = tmp_path / 'data'
    folder = save(tmp_path / 'run', 'mine', dataset=data, kind=GPT)
    says = (f'the checkpoint has the objective mine, from the provider.py of its dataset, '
            f'but {data}/provider.py is not there: put it back')
    assert says in here(f'--out_dir={folder}', code=2)[1]
    data.mkdir()
    assert says in here(f'--out_dir={folder}', code=2)[1]
    (data / 'provider.py').write_text("OBJECTIVES = {'other': int}")
    assert 'provider.py defines others' in here(f'--out_dir={folder}', code=2)[1]
    assert here(f"--out_dir={save(tmp_path / 'ours', dataset=tmp_path / 'gone')}")[0]

def test_the_text_a_checkpoint_knows_is_the_dataset_of_its_day(here, tmp_path, capsys):
    """ a dataset prepared again, with other letters, changes nothing; how it was prepared stays in the checkpoint """
    (tmp_path / 'a.txt').write_text(TEXT * 20)
    prepare.prepare('text', str(tmp_path / 'data'), input=str(tmp_path / 'a.txt'))
    meta, _ = prepare.read_meta(str(tmp_path / 'data')), capsys.readouterr()
    folder = save(tmp_path / 'run', meta=meta, dataset=tmp_path / 'data')
    before = here(f'--out_dir={folder}')[0]
    (tmp_path / 'a.txt').write_text('xyz' * 99)
    prepare.prepare('text', str(tmp_path / 'data'), input=str(tmp_path / 'a.txt'))
    capsys.readouterr()
    assert here(f'--out_dir={folder}')[0] == before
    kept = torch.load(folder / 'ckpt_best.pt', weights_only=True)['meta']['settings']
    assert kept == {'input': f'{tmp_path}/a.txt', 'val_fraction': 0.1}
