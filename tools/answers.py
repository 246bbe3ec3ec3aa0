"""
How well runs answer the questions of a test split: exact answers, plans on their own, likelihoods of plan and execution, and the cost.
$ python -m tools.answers out-arithmetic out-arithmetic-ar --num_samples=500
$ python -m tools.answers "out-arithmetic,sampler=threshold" "out-arithmetic,sampler=fixed,steps=8|16|32"
A contender is the folder of a run and options of its generate, with commas between; a|b|c is a row for each. Columns: accuracy, with its 95 %
interval (Wilson): does what the execution gives as its answer (after ####, else all of it) equal the true one? Beside it chance, how often
the commonest true answer is right. plan same: plans that come to what the true one does, by same_plan of data/NAME/check.py (without one: equal
text). Nats per record, a bound but for ar: of the true plan with the execution hidden, of the true execution given the true plan, and given
the plan that was generated. What is printed also lands in answers.json beside each run.
"""
import inspect
import json
import math
import os
import sys
import time
from collections import Counter

import numpy as np
import torch

import model as models
import prepare
from configurator import configure, fail
from model import UserError
from prepare import Layout, PrepareError, Records, Tokenizer, provider
from tools.quality import contenders, load

num_samples = 0 # questions, the first so many of the split; 0: all
batch_size = 32 # answered at once
split = 'test' # of the dataset; val where there is no test
bound_samples = 4 # corruptions per record and bound; 0: no bounds
temperature = 0.0 # of generate, unless a contender says otherwise; 0: always the likeliest token
examples = 0 # answers of each row to print
ckpt = 'best' # best | latest
weights = 'ema' # ema (if the run averaged its weights) | raw
threads = 0 # of the CPU; 0: as many as torch takes
seed = 1337
device = 'auto' # auto (cuda, mps, cpu, whichever there is) | cuda | cuda:1 | mps | cpu

def answer(execution):
    """ what stands behind the last ####, as a number where it is one; without #### all of it """
    text = execution.rpartition('####')[2].strip() if '####' in execution else execution.strip()
    plain = text.replace(',', '').replace('$', '').rstrip('.')
    try:
        return float(plain) if math.isfinite(float(plain)) else text
    except ValueError:
        return text

def wilson(right, n):
    """ the 95 % interval of a share (https://doi.org/10.1080/01621459.1927.10502953) """
    z, p = 1.959964, right / n
    middle, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return (middle - half) / (1 + z * z / n), (middle + half) / (1 + z * z / n)

def bound(model, layout, raw, only, where):
    """ nats of the segments `only` (numbers) of raw rows, summed per row, (B,); nothing after them is visible """
    batch = {k: torch.from_numpy(v).to(where) for k, v in layout.rows(raw, only, model.row_length).items()}
    if layout.ids is not None: # ar cannot look ahead
        later = torch.from_numpy(layout.segment > max(only)).to(where)
        batch['idx'] = batch['idx'].masked_fill(later & (batch['idx'] != layout.pad_id), model.config.mask_id)
    return model.nll_bound(**batch, n_samples=1 if model.bound_name == 'nll' else bound_samples)[0].cpu().double().mean(1)

def answered(name, folder, options):
    """ the row of a contender, and its answers [{question, ...}] """
    where, amp, _ = models.pick_device(device)
    model, state = load(folder, where, ckpt, weights)
    meta, settings = state['meta'], state['settings']
    models.check('segments' in meta, f"{folder} was trained on plain text, expected records of question, plan and execution")
    corpus, tokenizer, layout = Records(settings['dataset'], settings.get('skip', '')), Tokenizer(meta), Layout(meta, getattr(model, 'id_list', None))
    names, check = [*layout.lengths], provider(meta['dataset'], 'check.py')
    part = split if split in meta['splits'] else 'val' if split == 'test' else split
    n = min(corpus.n_windows(part), num_samples or sys.maxsize)
    raw = np.array(corpus.raw(part, slice(n))).astype(np.int64)
    slots = Layout(meta, range(len(layout.segment))) # reads raw rows
    true = [{k: tokenizer.decode(ids) for k, ids in slots.parts(row).items()} for row in raw]
    takes = inspect.signature(model.generate).parameters
    for option in options:
        models.check(option in takes and option not in ('idx', 'max_new_tokens', 'on_step', 'stop', 'block_ids'), f"{name}: {state['objective']} has no use for {option}")
    options = {'temperature': temperature} | options
    torch.manual_seed(seed)
    given, calls, spent, begun, told = [], 0, 0.0, time.time(), time.time()
    for i in range(0, n, batch_size):
        asked = layout.prompt([slots.parts(row)[names[0]] for row in raw[i:i + batch_size]])
        asked = {k: torch.from_numpy(v).to(where) if isinstance(v, np.ndarray) else v for k, v in asked.items()}
        nfe, clock = [0], time.perf_counter()
        with amp:
            out = model.generate(**asked, stop=layout.end_id, on_step=lambda step, idx, probs, s: nfe.append(s['nfe']), **options)
        given += [layout.parts(row) for row in out.cpu().numpy()]
        calls, spent = calls + nfe[-1], spent + time.perf_counter() - clock
        if time.time() - told > 10:
            told = time.time()
            print(f"{name}: {len(given)} of {n} questions, {(told - begun) * (n - len(given)) / len(given):.0f} s left", file=sys.stderr, flush=True)
    said = [{k: tokenizer.decode(parts[k]) if k in parts else '' for k in names} for parts in given]
    last, right = names[-1], sum(answer(a[names[-1]]) == answer(b[names[-1]]) for a, b in zip(said, true))
    chance = Counter(str(answer(b[last])) for b in true).most_common(1)[0][1] / n
    written = sum(len(ids) + 1 for parts in given for k, ids in parts.items() if k != names[0])
    low, high = wilson(right, n)
    row = {'contender': name, 'objective': state['objective'], 'attention': model.config.attention, 'parameters': model.n_params(), 'split': part, 'questions': n,
           'accuracy': right / n, 'accuracy_low': low, 'accuracy_high': high, 'chance': chance, 'nfe': calls / math.ceil(n / batch_size),
           'tokens_per_second': written / spent, 'batch_size': batch_size}
    if 'plan' in names:
        same = check.get('same_plan', lambda a, b: a.strip() == b.strip())
        row['plan_same'] = sum(same(a['plan'], b['plan']) for a, b in zip(said, true)) / n
    if bound_samples and model.bound_name:
        replaced = layout.raw([[parts.get(k, []) if 0 < j < len(names) - 1 else slots.parts(r)[k] for j, k in enumerate(names)] for parts, r in zip(given, raw)])
        wanted = [('nats_' + k, raw, [j]) for j, k in enumerate(names) if j] + [(f'nats_{last}_given_generated', replaced, [len(names) - 1])] * (len(names) > 2)
        for column, rows, only in wanted:
            nats = torch.cat([bound(model, layout, rows[i:i + batch_size], only, where) for i in range(0, n, batch_size)])
            row[column], row[column + '_stderr'] = nats.mean().item(), nats.std().item() / math.sqrt(n)
        row['exact'] = model.bound_name == 'nll'
    return row, [{**a, **{f'true_{k}': b[k] for k in names if k != names[0]}} for a, b in zip(said, true)]

def main():
    configure(globals(), [a for a in sys.argv[1:] if a.startswith('-')])
    rows = contenders([a for a in sys.argv[1:] if not a.startswith('-')])
    if not rows:
        fail("name the folders of runs: python -m tools.answers out-a out-b")
    for name, least in ('num_samples', 0), ('batch_size', 1), ('bound_samples', 0), ('examples', 0), ('threads', 0):
        if globals()[name] < least:
            fail(f"{name} is {globals()[name]}, expected at least {least}")
    if threads:
        torch.set_num_threads(threads)
    table, found = [], {}
    try:
        for name, folder, options in rows:
            row, texts = answered(name, folder, options)
            table.append(row)
            found.setdefault(folder, []).append(row | {'answers': texts[:20]})
            for text in texts[:examples]:
                print(f"--- {name}", *(f"[{k}] {v}" for k, v in text.items()), sep='\n')
        for folder, results in found.items():
            with prepare.replacing(os.path.join(folder, 'answers.json')) as (temporary,), open(temporary, 'w') as f:
                json.dump(results, f, indent=2)
    except (PrepareError, UserError) as e:
        fail(str(e))
    nats = dict.fromkeys(k for row in table for k in row if k.startswith('nats_') and not k.endswith('_stderr'))
    print(f"| run | accuracy of {table[0]['questions']:,} | 95 % | chance | plan same | NFE | tokens/s |" + ''.join(f" {k.replace('_', ' ')} |" for k in nats))
    print('|---' * (7 + len(nats)) + '|')
    for row in table:
        plan, bounds = f"{row['plan_same']:.3f}" if 'plan_same' in row else '', [f" {'=' if row['exact'] else '<='} {row[k]:.2f} +- {row[k + '_stderr']:.2f} |" if k in row else ' |' for k in nats]
        print(f"| {row['contender']} | {row['accuracy']:.3f} | {row['accuracy_low']:.3f} to {row['accuracy_high']:.3f} | {row['chance']:.3f} | {plan} | {row['nfe']:.0f} "
              f"| {row['tokens_per_second']:,.0f} |" + ''.join(bounds))

if __name__ == '__main__':
    main()
