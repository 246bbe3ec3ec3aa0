"""
The commands that README.md and the docstrings of the configs show, as they stand there: on the device, in the precision
and with the compiler that a reader gets. Only sizes, iterations and paths are cut down; files stand in for downloads.
"""
import ast
import glob
import json
import math
import os
import re
import shlex
import shutil

import pytest
import torch

import model as models
import prepare
from tests.test_train import ROOT, TORCHRUN, in_process, run

def read(path):
    with open(os.path.join(ROOT, path), encoding='utf-8') as f:
        return f.read()

def found(*patterns):
    return sorted(path for pattern in patterns for path in glob.glob(pattern, root_dir=ROOT))

PAGES = found('README.md', '*/README.md') # the front page, results, tools, data
README = '\n'.join(map(read, PAGES))
DOCSTRINGS = [ast.get_docstring(ast.parse(read(path))) for path in found('config/*.py')]

PYTHON = re.findall(r'^```python\n(.*?)^```', README, re.M | re.S)

# ---- what is shown

def shown():
    """ every command line of ours, in order: in blocks of the README, in what it writes `like this`, in docstrings """
    command, pieces = r'(?:python (?:-m tools\.\w+|\w+\.py)|torchrun) ?.*', []
    for i, text in enumerate(re.split(r'^```.*\n', README, flags=re.M)): # text, block, text, ...
        pieces += text.splitlines() if i % 2 else re.findall(r'`([^`\n]+)`', text)
    pieces += [line for text in DOCSTRINGS for line in re.findall(command, text)]
    pieces = [part.strip() for piece in pieces for part in piece.split(' && ')]
    # a table of the README has three dots for the command of the rows above
    pieces = [re.sub(r'^\.\.\. --', 'python train.py config/train_shakespeare_char.py --', piece) for piece in pieces]
    return [piece for piece in pieces if re.fullmatch(command, piece)]

def kind_of(command):
    """ the script; train.py without a config goes on with a run """
    script = re.search(r'torchrun|tools\.\w+|\w+\.py', command)[0]
    return 'go on' if script == 'train.py' and ' config/' not in command else script

def folder_of(command):
    """ the run folder that a command which trains names, or else its config """
    named = re.search(r'--out_dir=(\S+)', command)
    config = re.search(r'config/\w+\.py', command)[0]
    return named[1] if named else re.search(r"^out_dir = '(.+)'", read(config), re.M)[1]

COMMANDS = list(dict.fromkeys(shown()))
KINDS = {kind: [c for c in COMMANDS if kind_of(c) == kind] for kind in map(kind_of, COMMANDS)}
MAKES = {folder_of(c): c for c in reversed(KINDS['train.py'])} # the first command that names the folder

def test_readme_commands_are_all_found():
    """ also one that is written in an unusual way or place, or of a script that no test here runs """
    texts = '\n'.join([README, *DOCSTRINGS])
    written = re.findall(r'\bpython (?:-m tools|(?:train|sample|prepare)\.py)|\btorchrun |`\.\.\. --', texts)
    assert len(shown()) == len(written)
    tools = {f'tools.{name}' for name in ('answers', 'bench', 'compare', 'plot', 'quality')}
    assert KINDS.keys() == {'train.py', 'go on', 'torchrun', 'prepare.py', 'sample.py'} | tools
    flags = {name for c in COMMANDS for name in re.findall(r'--(\w+)', c)}
    assert {'eval_only', 'init_from', 'view', 'skip', 'help'} < flags and not flags & {'device', 'compile', 'dtype'}

def test_every_flag_of_the_readme_is_a_setting():
    """ also those in prose and tables, which no command has """
    known = {'key', 'help', 'index-url', 'standalone', 'nproc_per_node'} # --key=value; pip and torchrun
    known |= set(re.findall(r'^    (\w+): \w+ = ', README, re.M)) # an example's own
    scripts = [ast.parse(read(path)) for path in found('*.py', 'tools/*.py', 'data/*/prepare.py')]
    classes = [node for node in ast.parse(read('model.py')).body if isinstance(node, ast.ClassDef)]
    configs = [node for node in classes if node.name.endswith('Config')]
    for node in [node for script in scripts + configs for node in script.body]:
        if isinstance(node, (ast.Assign, ast.AnnAssign)):
            known.add(getattr(node.target if isinstance(node, ast.AnnAssign) else node.targets[0], 'id', None))
        elif isinstance(node, ast.FunctionDef) and node.name == 'corpus':
            known |= {argument.arg for argument in node.args.args}
    assert set(re.findall(r'--(\w[\w-]*)', README)) - known == set()

# ---- what is cut down

SIZES = ('--n_layer=1 --n_head=2 --n_embd=32 --batch_size=2 --max_iters=2 --eval_iters=1 --bound_samples=1 '
         '--scoreboard_windows=2').split()
RECORDS = [{'question': f'What is {i} + {i}?', 'plan': f'Add {i} to itself.', 'check': 'It is even.',
            'execution': f'{i} + {i} = {2 * i}'} for i in range(20)]
PROBLEMS = [{'question': r['question'], 'answer': f"{r['execution']}\n#### {2 * i}"} for i, r in enumerate(RECORDS)]
TEXT = f"All work and no play makes a dull text, {''.join(map(chr, range(32, 127)))}\n" * 300 # all that prompts have
LOCAL = {'shakespeare_char': ['--input=input.txt'], # GPT-2's byte pairs are a download too
         'wikitext2': ['--input=wikitext-2', '--tokenizer=byte'], 'gsm8k': ['--input=gsm8k', '--tokenizer=byte']}

@pytest.fixture(scope='module')
def clone(tmp_path_factory):
    """ a copy of our files, and beside them what the commands read, small """
    folder = tmp_path_factory.mktemp('clone')
    files = {path: read(path) for path in found('*.py', 'config/*.py', 'data/*/*.py', 'tools/*.py')}
    files |= {'input.txt': TEXT, 'prompt.txt': 'ROMEO:', 'my.json': json.dumps(RECORDS)}
    files |= {'books/a.txt': TEXT, 'books/b.txt': TEXT[::-1]}
    files |= {f'wikitext-2/{split}.txt': f' \n = Title = \n \n{TEXT}' for split in ('train', 'valid', 'test')}
    files |= {f'gsm8k/{split}.jsonl': '\n'.join(map(json.dumps, PROBLEMS)) for split in ('train', 'test')}
    for path, text in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(text, encoding='utf-8')
    (folder / 'assets').mkdir()
    short = ['--question_len=32', '--plan_len=32', '--exec_len=48']
    for name, args in (LOCAL | {'gsm8k': LOCAL['gsm8k'] + short, 'arithmetic': ['--max_records=200']}).items():
        in_process('prepare.py', name, *args, folder=folder)
    return folder

def follow(clone, command, *more):
    """ a command as a shell reads it, and what cuts it down -> what it prints """
    return in_process(*shlex.split(command)[1:], *more, folder=clone)

def cut_down(command):
    """ a command that trains -> (run folder, flags to add); another command for the same folder gets its own folder """
    out = folder_of(command)
    out = out if MAKES.get(out) == command else f'out-again-{COMMANDS.index(command)}'
    wide = 'gpt2_124m' in command or '10m' in command
    return out, [*SIZES, *['--block_size=128'] * wide, f'--out_dir={out}']

def with_runs(clone, text):
    """ trains whatever text names a run folder of, unless that is done """
    for name in sorted(set(re.findall(r'out-[\w-]+', text))):
        if not (clone / name / 'results.json').exists():
            follow(clone, MAKES[name], *cut_down(MAKES[name])[1])

# ---- what must work

def check_run(out, text):
    """ two iterations and the scoreboard, on the device and in the precision that nobody chose """
    settings, results = (json.loads((out / f'{name}.json').read_text()) for name in ('settings', 'results'))
    device, _, precision = models.pick_device()
    assert settings['device'] == settings['dtype'] == 'auto' and settings['compile'] is None
    assert results['device'].split(':')[0] == device.type and results['dtype'] == precision
    assert 'iter 2/2 |' in text and results['iteration'] == 2
    assert all(math.isfinite(weights['scoreboard']['nats_per_token']) for weights in results['weights'].values())

@pytest.mark.parametrize('command', KINDS['train.py'])
def test_readme_commands_train(clone, command):
    out, more = cut_down(command)
    shutil.rmtree(clone / out, ignore_errors=True) # another test may have needed it
    check_run(clone / out, follow(clone, command, *more))

@pytest.mark.parametrize('command', KINDS['torchrun'])
def test_readme_commands_train_by_several_processes(clone, command):
    """ by two, or as many as there are GPUs """
    if models.pick_device()[0].type == 'mps':
        pytest.skip('processes have no sums on mps')
    processes = min(2, torch.cuda.device_count() or 2)
    command = re.sub(r'--nproc_per_node=\d+', f'--nproc_per_node={processes}', command.removeprefix('torchrun '))
    check_run(clone / 'out-torchrun', run(command, *SIZES, '--out_dir=out-torchrun', launcher=TORCHRUN, folder=clone))

@pytest.mark.parametrize('command', KINDS['go on'])
def test_readme_commands_go_on(clone, command):
    with_runs(clone, command)
    says = {'--init_from=resume': 'iter 3/3 |', '--eval_only=True': "random windows", '--help': '--objective=ar '}
    flag = next(flag for flag in says if flag in command)
    assert says[flag] in follow(clone, command, *['--max_iters=3'] * (flag == '--init_from=resume'))

@pytest.mark.parametrize('command', KINDS['prepare.py'])
def test_readme_commands_prepare(clone, command):
    named = re.search(r'--dataset=(\S+)', command)
    name = named[1] if named else f'again-{COMMANDS.index(command)}'
    follow(clone, command, *LOCAL.get(command.split()[2], []), f'--dataset={name}')
    meta = prepare.read_meta(str(clone / 'data' / name))
    assert {'meta.json', *(f'{split}.bin' for split in meta['splits'])} == set(os.listdir(clone / 'data' / name))
    assert all(split['tokens'] > 0 for split in meta['splits'].values())

@pytest.mark.parametrize('command', KINDS['sample.py'])
def test_readme_commands_sample(clone, command):
    with_runs(clone, command)
    samples = re.search(r'--num_samples=(\d+)', command)
    text = follow(clone, command, *['--max_new_tokens=5'] * ('--max_new_tokens' not in command))
    assert text.count('\n---------------\n') == (int(samples[1]) if samples else 3) and 'network evaluations' in text

@pytest.mark.parametrize('command', KINDS['tools.compare'] + KINDS['tools.quality'] + KINDS['tools.answers'])
def test_readme_commands_compare(clone, command):
    with_runs(clone, command)
    more = {'tools.quality': ['--num_samples=2'], 'tools.answers': ['--num_samples=2', '--bound_samples=1']}
    text = follow(clone, command, *more.get(kind_of(command), []))
    contenders = [arg for arg in shlex.split(command)[3:] if not arg.startswith('-')]
    assert text.count('\n|') >= 1 + sum(1 + arg.count('|') for arg in contenders)

@pytest.mark.parametrize('command', KINDS['tools.bench'])
def test_readme_commands_bench(clone, command):
    small, args = ',n_layer=1,n_head=2,n_embd=32,batch_size=2,block_size=64', shlex.split(command)
    contenders = [arg + small for arg in args[3:] if not arg.startswith('-')]
    args = [*args[:3], *contenders, *(arg for arg in args[3:] if arg.startswith('-'))]
    text = follow(clone, shlex.join(args), '--repetitions=1', *['--samples=1'] * ('--samples=0' not in command))
    assert text.count('\n|') == 1 + len(contenders)

@pytest.mark.parametrize('command', KINDS['tools.plot'])
def test_readme_commands_plot(clone, command):
    pytest.importorskip('matplotlib')
    with_runs(clone, command)
    assert (clone / follow(clone, command).strip()).stat().st_size > 1000

def test_readme_as_a_library(clone):
    """ the lines of python that write text and train a model of their own """
    code = next(code for code in PYTHON if 'load_checkpoint' in code)
    with_runs(clone, code)
    (clone / 'library.py').write_text('idx = None\n' + code.replace('(idx, idx)', '(idx % 64, idx % 64)'))
    assert in_process('library.py', folder=clone).startswith('def ')

def test_readme_s_loss_is_that_of_mdlm():
    """ the seven lines, run many times, have the mean of MDLM's loss on the same weights """
    code = next(code for code in PYTHON if 'idx.masked_fill(masked' in code)
    torch.manual_seed(0)
    mdlm = models.MDLM(models.GPTConfig(block_size=8, vocab_size=6, mask_id=5, text_size=5, n_layer=1, n_head=1,
                                        n_embd=8, init='gpt2'))
    torch.nn.init.normal_(mdlm.lm_head.weight)
    idx = torch.randint(5, (64, 8))
    names = dict(torch=torch, F=torch.nn.functional, idx=idx, B=64, T=8, mask_id=5, network=lambda xt: mdlm(xt)[0])
    losses = []
    for _ in range(100):
        exec(code, names)
        losses.append(names['loss'].item())
    theirs = torch.tensor([mdlm(idx, idx)[1].item() for _ in range(100)])
    ours = torch.tensor(losses)
    error = ((ours.var() + theirs.var()) / 100).sqrt()
    assert (ours.mean() - theirs.mean()).abs() < 4 * error

def test_readme_s_own_objective(clone):
    """ uniform noise: the loss falls below that of a blind guess, it claims no bound, and a prompt is kept """
    code, data = next(code for code in PYTHON if 'class Uniform' in code), clone / 'data' / 'shakespeare_char'
    (data / 'provider.py').write_text(code)
    sizes = [arg for arg in SIZES if 'max_iters' not in arg]
    args = ['config/train_shakespeare_char.py', '--objective=uniform', '--out_dir=out-uniform', *sizes,
            '--max_iters=200', '--warmup_iters=10']
    text = in_process('train.py', *args, folder=clone)
    assert 'ce is no bound' in text and 'nelbo' not in text
    score = json.loads((clone / 'out-uniform' / 'results.json').read_text())['weights']['raw']['scoreboard']
    assert score['nats_per_token'] < 0.95 * math.log(prepare.read_meta(str(data))['end_id'])
    text = in_process('sample.py', '--out_dir=out-uniform', '--start=All [[5]]and', '--max_new_tokens=4',
                      '--num_samples=2', folder=clone)
    assert len(re.findall(r'All .{5}and.{4}\n-', text, re.S)) == 2
    (data / 'provider.py').unlink()

def test_readme_s_links_exist():
    links = [(page, link) for page in PAGES for link in re.findall(r'\]\(([^)#:]+)\)', read(page))]
    assert all(os.path.exists(os.path.join(ROOT, os.path.dirname(page), link)) for page, link in links)
