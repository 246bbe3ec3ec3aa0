"""
What a training step and a sampled token cost on this machine: medians, and ratios to the first contender.
$ python -m tools.bench config/train_shakespeare_char.py config/train_shakespeare_char.py,objective=bd3lm nanogpt
$ python -m tools.bench objective=ar objective=mdlm objective=bd3lm,diffusion_block_size=16 \
      --block_size=256 --batch_size=8 --threads=1
A contender is a config, changes to it, or both, with commas between; nanogpt is nanoGPT's network. --key=value holds
for all contenders: any setting of train.py, and those below. All contenders run in one process and take turns, so that
a change of the machine's speed meets all of them. Tokens are random, so no data is needed. A training step is forward,
backward, clipping and the optimizers.
"""
import ast
import inspect
import multiprocessing
import os
import statistics
import sys
import time
from dataclasses import fields

import torch

import model as models
from configurator import configure, fail, print_anything, settings_of
from model import UserError, check
from tools.runs import as_command, check_output, check_sizes, sentences, write_json

repetitions = 20 # training steps of each contender; 0: none
samples = 3 # batches of texts that each contender writes; 0: none
sample_rows = 1 # texts written at once
new_tokens = 0 # of each text, after one token of prompt; 0: what the context holds
sampler: str | None = None # for contenders that have one: see sample.py
steps: int | None = None
text_size = 65 # ids of text
threads = 0 # of the CPU; 0: as many as torch takes
output = '' # write the table there as JSON too

NANOGPT = dict(objective='ar', pos='learned', norm='layernorm', mlp='gelu', qk_norm=False, tie_weights=True,
               init='gpt2', optimizer='adamw')

def train_settings():
    """ the settings of train.py, read but not run: {name: default, ..., '__annotations__': {name: type as text}} """
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    with open(os.path.join(root, 'train.py')) as f:
        body = ast.parse(f.read()).body
    found, annotations = {}, {}
    for node in (n for n in body if isinstance(n, (ast.Assign, ast.AnnAssign))):
        name = (node.target if isinstance(node, ast.AnnAssign) else node.targets[0]).id
        if not isinstance(node.value, (ast.Constant, ast.UnaryOp)): # where the settings end
            break
        found[name] = ast.literal_eval(node.value)
        if isinstance(node, ast.AnnAssign):
            annotations[name] = ast.unparse(node.annotation)
    return found | {'__annotations__': annotations}

def all_settings():
    """ the settings of train.py and those above, for configure: {name: default, '__annotations__': ...} """
    theirs, own = train_settings(), globals()
    annotations = own.get('__annotations__') or own['__annotate__'](1) # python 3.14 makes them when asked
    return own | theirs | {'__annotations__': annotations | theirs['__annotations__']}

def own_settings(settings):
    """ {objective: {name: (default, types, comment)}}: what an objective has besides these settings, for configure """
    others = {*settings, 'vocab_size', 'text_size', 'begin_id', 'mask_id'} # the last four depend on the text
    return {name: settings_of(kind.config_class, others) for name, kind in models.OBJECTIVES.items()}

def contender(text, flags=()):
    """ 'config/x.py,objective=mdlm' -> {setting: value}, as train.py reads `FLAGS config/x.py --objective=mdlm` """
    argv = list(flags)
    for part in text.split(','):
        if part == 'nanogpt':
            argv += [f'--{k}={v}' for k, v in NANOGPT.items()]
        else:
            argv.append('--' + part if '=' in part else os.path.expanduser(part))
    return configure(all_settings(), argv, own=('objective', own_settings))

def build(s, ids):
    """ settings -> (model, autocast context, optimizers) as train.py makes them; ids: how many ids text has """
    if s['objective'] not in models.OBJECTIVES:
        fail(f"objective is {s['objective']!r}, expected one of {', '.join(models.OBJECTIVES)}")
    own = models.OBJECTIVES[s['objective']]
    shape = {f.name: s[f.name] for f in fields(own.config_class) if f.name in s}
    shape |= dict(text_size=ids, vocab_size=ids + 3, begin_id=ids if s['begin'] else None, mask_id=ids + 1,
                  attention=s['attention'] or own.usual_attention(s['segments']),
                  diffusion_block_size=own.block_size_for(s['diffusion_block_size']))
    device, amp, _ = models.pick_device(s['device'], s['dtype'])
    model = own(own.config_class(**shape)).to(device)
    if device.type == 'cuda' if s['compile'] is None else s['compile']:
        check_compiler(device)
        model.compile()
    optimizers = model.configure_optimizers(s['optimizer'], s['learning_rate'], s['muon_learning_rate'],
                                            s['weight_decay'], (s['beta1'], s['beta2']))
    return model, amp, optimizers

def check_compiler(device):
    """ a UserError if torch needs a C++ compiler and there is none: torch itself would print a page of traceback """
    if device.type == 'cpu':
        from torch._inductor.cpp_builder import get_cpp_compiler
        from torch._inductor.exc import InvalidCxxCompiler
        try:
            get_cpp_compiler()
        except InvalidCxxCompiler:
            raise UserError("compile=True on a CPU needs a C++ compiler, and there is none: leave it out") from None

def train_step(s, model, amp, optimizers, ids):
    """ one step on a random batch; model, amp and optimizers: from build """
    device = model.transformer.wte.weight.device
    idx = torch.randint(ids, (s['batch_size'], model.row_length), device=device)
    with amp:
        model(idx, idx)[1].backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), s['grad_clip'] or float('inf'))
    for opt in optimizers:
        opt.step()
        opt.zero_grad(set_to_none=True)
    if device.type == 'cuda':
        torch.cuda.synchronize()

def write(model, amp, rows, n, options):
    """ let the model write `rows` texts of n tokens; returns the number of network calls """
    calls, takes = [], inspect.signature(model.generate).parameters
    prompt = torch.zeros(rows, 1, dtype=torch.long, device=model.transformer.wte.weight.device)
    options = {k: options[k] for k in ('sampler', 'steps') if options[k] is not None and k in takes}
    with amp:
        model.generate(prompt, n, on_step=lambda step, idx, probs, state: calls.append(state['nfe']), **options)
    return calls[-1]

def highest_mark():
    """ the most bytes of memory that this process ever held """
    if os.path.exists('/proc/self/status'): # better than getrusage, which counts the memory before exec too
        with open('/proc/self/status') as f:
            return next(int(line.split()[1]) * 1024 for line in f if line.startswith('VmHWM'))
    import resource
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == 'darwin' else 1024)

def peak_memory(s, ids, n_threads, queue):
    """
    Puts into the queue how many bytes three training steps add. It runs in a new process for every contender, because
    a process only knows its highest mark, and that may come from another contender.
    """
    torch.set_num_threads(n_threads)
    before = highest_mark()
    made = build(s, ids)
    for _ in range(3):
        train_step(s, *made, ids)
    device = made[0].transformer.wte.weight.device
    queue.put(torch.cuda.max_memory_allocated() if device.type == 'cuda' else highest_mark() - before)

def seconds(call):
    """ how long a call of the function `call` takes """
    started = time.perf_counter()
    call()
    return time.perf_counter() - started

def measure_training(contenders, rows, repetitions):
    """ contenders: [(settings, result of build), ...]; rows: their rows of the table, to which columns are added """
    times = [[] for _ in rows]
    for _ in range(repetitions + 2):
        for (s, made), t in zip(contenders, times):
            t.append(seconds(lambda: train_step(s, *made, s['text_size'])))
    spawn = multiprocessing.get_context('spawn')
    for (s, _), row, t in zip(contenders, rows, times):
        row['train_ms'] = statistics.median(t[2:]) * 1000 # the first two steps are warm-up
        row['train_tokens_per_second'] = s['batch_size'] * s['block_size'] / row['train_ms'] * 1000
        queue = spawn.Queue()
        worker = spawn.Process(target=peak_memory, args=(s, s['text_size'], torch.get_num_threads(), queue))
        worker.start()
        worker.join()
        check(worker.exitcode == 0, f"the process that measures the memory of {row['contender']} died "
              f"(exit code {worker.exitcode}): is there enough of it?")
        row['train_peak_bytes'] = queue.get()

def measure_writing(contenders, rows, samples):
    """ as measure_training; a batch of texts more than `samples`, as the first one is warm-up """
    times = [[] for _ in rows]
    for _ in range(samples + 1):
        for (s, (model, amp, _)), row, t in zip(contenders, rows, times):
            n = s['new_tokens'] or s['block_size'] - 1
            spent = seconds(lambda: row.update(calls=write(model.eval(), amp, s['sample_rows'], n, s)))
            t.append(spent / n / s['sample_rows'])
    for row, t in zip(rows, times):
        row['sample_tokens_per_second'] = 1 / statistics.median(t[1:])

def check_settings(s):
    """ a UserError if a setting in s, {name: value}, is out of range """
    check_sizes(s, repetitions=0, samples=0, sample_rows=1, new_tokens=0, text_size=1, batch_size=1, block_size=1,
                n_layer=1, n_head=1, n_embd=1, diffusion_block_size=0)
    for name in 'learning_rate', 'muon_learning_rate', 'weight_decay', 'grad_clip':
        check(0 <= s[name] < float('inf'), f"{name} is {s[name]}, expected 0 or more")
    for name in 'beta1', 'beta2', 'dropout':
        check(0 <= s[name] < 1, f"{name} is {s[name]}, expected 0 or more and below 1")
    check(s['new_tokens'] or s['block_size'] > 1 or not s['samples'],
          "block_size is 1, which leaves nothing to write after a prompt of one token: set new_tokens")

def show(rows):
    """ print the table """
    titles = ['contender', 'parameters', 'step, ms', 'train tokens/s', 'x', 'peak MB', 'sampled tokens/s', 'x',
              'network calls']
    print('|', ' | '.join(titles), '|\n' + '|---' * len(titles) + '|')
    cell = lambda row, key, form, unit=1: form.format(row[key] / unit) if key in row else ''
    ratio = lambda row, key: cell(row, key, '{:.2f}', rows[0].get(key))
    for row in rows:
        cells = [row['contender'], cell(row, 'parameters', '{:.2f}M', 1e6), cell(row, 'train_ms', '{:.1f}'),
                 cell(row, 'train_tokens_per_second', '{:,.0f}'), ratio(row, 'train_tokens_per_second'),
                 cell(row, 'train_peak_bytes', '{:.0f}', 1e6), cell(row, 'sample_tokens_per_second', '{:,.0f}'),
                 ratio(row, 'sample_tokens_per_second'), str(row.get('calls', ''))]
        print('|', ' | '.join(cells), '|')
    first = rows[0]
    print(f"{first['threads']} threads, {first['device']}, torch {torch.__version__}; x is the speed against the first")

def main():
    print_anything()
    names, flags = ([a for a in sys.argv[1:] if a.startswith('-') == flag] for flag in (False, True))
    settings = configure(all_settings(), flags, own=('objective', own_settings))
    if not names:
        fail("name contenders: python -m tools.bench objective=ar objective=mdlm nanogpt")
    with sentences():
        chosen = [contender(name, flags) for name in names]
        for s in (settings, *chosen):
            check_settings(s)
        if settings['output']:
            check_output(settings['output'])
        if settings['threads']:
            torch.set_num_threads(settings['threads'])
        contenders = [(s, build(s, s['text_size'])) for s in chosen]
        rows = [{'contender': name, 'parameters': model.n_params(), 'threads': torch.get_num_threads(),
                 'device': str(model.transformer.wte.weight.device)}
                for name, (_, (model, *_)) in zip(names, contenders)]
        if settings['repetitions']:
            measure_training(contenders, rows, settings['repetitions'])
        if settings['samples']:
            measure_writing(contenders, rows, settings['samples'])
        show(rows)
        if settings['output']:
            write_json(settings['output'], rows)

if __name__ == '__main__':
    as_command(main)
