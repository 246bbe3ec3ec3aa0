"""
How well runs answer the questions of a test split: correct answers and plans, nats of plan and execution, the cost.
$ python -m tools.answers out-arithmetic out-arithmetic-ar --num_samples=500
$ python -m tools.answers "out-arithmetic,sampler=threshold" "out-arithmetic,sampler=fixed,steps=8|16|32"
A contender is the folder of a run and options of its generate, with commas between; a|b|c is a row for each.

accuracy, with its 95 % interval (Wilson): the share of answers that are right. The answer is the text after the last
#### of an execution, all of the execution if it has none.
chance: the accuracy of always giving the most common true answer.
plan same: the share of plans that lead to the same result as the true plan, as same_plan in data/NAME/check.py
decides. Without a same_plan the texts must be equal.
nats: per record, a bound for every objective but ar. Of the true plan with the execution hidden, of the true execution
given the true plan, and of the true execution given the generated plan.
The table and the first answers are also written to answers.json in the folder of each run.

Two answers are equal if they are the same text or exactly the same number. These are numbers:
  12  +12  -12  012  1.50  .5  1.5e3  1/2   also with a full stop after them
  1,234.5   a comma, a thin or a no-break space before every three digits; 1,23 and 1 234 may be two numbers
  $5  -$5  5 €   the sign may be missing, because the question may name it: $5 is 5, 5 € is 5, $5 is not 5 €
  50%   is 0.5 and not 50
Everything else is text: 12 apples, 1,2,3, inf, digits of other scripts, anything with more than 1,000 characters or an
exponent of more than three digits. An empty answer is never right. A dataset with other rules defines
same_answer(question, a, b) in data/NAME/check.py: is a as good an answer as the true answer b? All three are text.
chance uses these rules too.
"""
import math
import os
import re
import sys
import time
from collections import Counter
from fractions import Fraction

import numpy as np
import torch

import model as models
from configurator import configure, fail, print_anything
from model import check
from prepare import Layout, Records, Tokenizer, provider
from tools.runs import (as_command, check_data, check_options, check_output, check_sizes, contenders, load, sentences,
                        split_view, with_error, write_json)

num_samples = 0 # questions, the first ones of the split; 0: all
batch_size = 32 # questions answered at once
split = 'test' # of the dataset; val if it has no test
bound_samples = 4 # corruptions per record and bound; 0: no columns of nats
temperature = 0.0 # of generate, unless a contender has its own; 0: always the likeliest token
examples = 0 # answers of each row to print
ckpt = 'best' # best | latest
weights = 'ema' # ema (if the run averaged its weights) | raw
threads = 0 # of the CPU; 0: as many as torch takes
seed = 1337
device = 'auto' # auto (cuda, mps, cpu, whichever there is) | cuda | cuda:1 | mps | cpu

# ---- answers (constants of text begin with an underscore: public ones would be settings)

_THOUSANDS = ',\u2009\u00a0\u202f' # comma, thin space, no-break space, narrow no-break space
_CURRENCIES = '$€£¥₹'
_WHOLE = '|'.join(['[0-9]+', *(f'[1-9][0-9]{{0,2}}(?:{s}[0-9]{{3}})+' for s in _THOUSANDS)])
NUMBER = re.compile(rf'''
    (?P<front> [+-]?(?:[{_CURRENCIES}][ ]?)? | [{_CURRENCIES}][ ]?[+-] )
    (?P<digits> (?:{_WHOLE})/0*[1-9][0-9]* | (?:(?:{_WHOLE})(?:\.[0-9]+)?|\.[0-9]+)(?:[eE][+-]?0*[0-9]{{1,3}})? )
    (?P<back> (?:[ ]?[{_CURRENCIES}%])? ) \.?''', re.VERBOSE)

def number(text):
    """ an answer as text -> (Fraction, currency sign or ''), exactly, if it is a number, else (the text, '') """
    plain = text.replace('\u2212', '-').replace('–', '-') # the minus sign, and the dash that is often used for it
    found = NUMBER.fullmatch(plain) if len(plain) <= 1000 else None
    if found is None or sum(c in _CURRENCIES + '%' for c in plain) > 1:
        return text, ''
    magnitude = Fraction(re.sub(f'[{_THOUSANDS}]', '', found['digits'])) / (100 if '%' in found['back'] else 1)
    return -magnitude if '-' in found['front'] else magnitude, ''.join(c for c in plain if c in _CURRENCIES)

def answer_text(execution):
    """ the text after the last #### of an execution, all of it if there is no #### """
    return execution.rpartition('####')[2].strip()

def answer(execution):
    """ the answer that an execution gives, as a Fraction if it is a number, else as text """
    return number(answer_text(execution))[0]

def same_answer(question, a, b):
    """ bool: is a the same answer as b? Both are text. For datasets without a same_answer of their own """
    (a_value, a_sign), (b_value, b_sign) = number(a), number(b)
    return a != '' and a_value == b_value and (a_sign == b_sign or '' in (a_sign, b_sign))

def chance(questions, true, same):
    """
    The share of the questions to which one answer is right, for the best such answer. questions and true, their
    answers, are lists of text; same: a function like same_answer.
    """
    if same is same_answer: # counting does it, without comparing all pairs
        counted = Counter(map(number, filter(None, true)))
        total = Counter(number(b)[0] for b in true if b)
        right = [counted[value, sign] + counted[value, ''] if sign else total[value] for value, sign in counted]
        return max(right, default=0) / len(true)
    return max(sum(bool(same(q, a, b)) for q, b in zip(questions, true)) for a in dict.fromkeys(true)) / len(true)

def wilson(right, n):
    """ (low, high), the 95 % interval of the share right / n (https://doi.org/10.1080/01621459.1927.10502953) """
    z, p = 1.959964, right / n
    middle, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return (middle - half) / (1 + z * z / n), (middle + half) / (1 + z * z / n)

# ---- runs

class Run:
    """ the model of a run, the questions of its dataset, and the Layout of its rows """
    def __init__(self, folder):
        self.where, self.amp, _ = models.pick_device(device)
        self.model, state = load(folder, self.where, ckpt, weights)
        self.objective, meta, settings = state['objective'], state['meta'], state['settings']
        check('segments' in meta,
              f"{folder} was trained on plain text, expected records of question, plan and execution")
        corpus = Records(settings['dataset'], settings.get('skip', ''))
        check_data(folder, meta, corpus, 'segments')
        self.tokenizer, self.layout = Tokenizer(meta), Layout(meta, getattr(self.model, 'id_list', None))
        self.names, self.check = [*self.layout.lengths], provider(meta['dataset'], 'check.py')
        self.split = split if split in meta['splits'] else 'val' if split == 'test' else split
        n = min(corpus.n_windows(self.split), num_samples or sys.maxsize)
        check(n, f"{self.split} of {corpus.folder} has no questions")
        self.slots = Layout(meta, range(len(self.layout.segment))) # with blocks of one token it reads raw rows
        self.raw = np.array(corpus.raw(self.split, slice(n))).astype(np.int64)

    def texts(self, records):
        """ [{segment: ids}, ...] -> [{segment: text}, ...]; the text is '' if the segment was never begun """
        return [{k: self.tokenizer.decode(parts[k]) if k in parts else '' for k in self.names} for parts in records]

def bound(model, layout, raw, only, where):
    """ nats of the segments `only` (their numbers) of raw rows, summed per row, (B,). Later segments are hidden """
    batch = {k: torch.from_numpy(v).to(where) for k, v in layout.rows(raw, only, model.row_length).items()}
    if layout.ids is not None: # for ar there is nothing to hide: it cannot look ahead
        later = torch.from_numpy(layout.segment > max(only)).to(where)
        batch['idx'] = batch['idx'].masked_fill(later & (batch['idx'] != layout.pad_id), model.config.mask_id)
    nats, _ = model.nll_bound(**batch, n_samples=1 if model.bound_name == 'nll' else bound_samples)
    return nats.cpu().double().mean(1)

def mean_bound(run, raw, only):
    """ (mean, standard error) of bound over raw rows (n, T). The error is nan if there is only one row """
    batches = [raw[i:i + batch_size] for i in range(0, len(raw), batch_size)]
    nats = torch.cat([bound(run.model, run.layout, rows, only, run.where) for rows in batches])
    return nats.mean().item(), nats.std().item() / math.sqrt(len(nats)) if len(nats) > 1 else math.nan

def bounds(run, given):
    """ the columns about nats, {name: number}. given: what the run generated, [{segment: ids}, ...] """
    names, last, row = run.names, len(run.names) - 1, {}
    for j, name in enumerate(names[1:], 1):
        row['nats_' + name], row[f'nats_{name}_stderr'] = mean_bound(run, run.raw, [j])
    if last > 1: # the true question and execution, with the generated segments between them
        true = [run.slots.parts(row) for row in run.raw]
        mixed = [[own.get(k, []) if k in names[1:last] else parts[k] for k in names] for own, parts in zip(given, true)]
        column = f'nats_{names[last]}_given_generated'
        row[column], row[column + '_stderr'] = mean_bound(run, run.layout.raw(mixed), [last])
    return row | {'exact': run.model.bound_name == 'nll'}

def ask(run, name, options):
    """ answer the questions of a Run: (what it generates, [{segment: ids}, ...], network calls, seconds) """
    given, calls, spent, begun, told = [], 0, 0.0, time.time(), time.time()
    questions, n = [run.slots.parts(row)[run.names[0]] for row in run.raw], len(run.raw)
    torch.manual_seed(seed)
    for i in range(0, n, batch_size):
        asked = run.layout.prompt(questions[i:i + batch_size])
        asked = {k: torch.from_numpy(v).to(run.where) if isinstance(v, np.ndarray) else v for k, v in asked.items()}
        nfe, clock = [0], time.perf_counter()
        with run.amp:
            out = run.model.generate(**asked, stop=run.layout.end_id, **options,
                                     on_step=lambda step, idx, probs, state: nfe.append(state['nfe']))
        given += [run.layout.parts(row) for row in out.cpu().numpy()]
        calls, spent = calls + nfe[-1], spent + time.perf_counter() - clock
        if time.time() - told > 10:
            told = time.time()
            left = (told - begun) * (n - len(given)) / len(given)
            print(f"{name}: {len(given)} of {n} questions, {left:.0f} s left", file=sys.stderr, flush=True)
    return given, calls, spent

def answered(name, folder, options):
    """ (the row of a contender, {column: value}, its answers, [{segment: text, 'true_' + segment: text}, ...]) """
    run = Run(folder)
    check_options(name, run.model, run.objective, options, OURS)
    given, calls, spent = ask(run, name, {'temperature': temperature} | options)
    first, last, n = run.names[0], run.names[-1], len(run.raw)
    said, true = run.texts(given), run.texts(map(run.slots.parts, run.raw))
    same = run.check.get('same_answer', same_answer)
    same_plan = run.check.get('same_plan', lambda a, b: a.strip() == b.strip())
    questions, answers = [b[first] for b in true], [answer_text(b[last]) for b in true]
    right = sum(bool(same(q, answer_text(a[last]), b)) for q, a, b in zip(questions, said, answers))
    written = sum(len(ids) + 1 for parts in given for k, ids in parts.items() if k != first)
    low, high = wilson(right, n)
    row = {'contender': name, 'objective': run.objective, 'attention': run.model.config.attention,
           'parameters': run.model.n_params(), 'split': run.split, 'questions': n,
           'accuracy': right / n, 'accuracy_low': low, 'accuracy_high': high,
           'chance': chance(questions, answers, same), 'nfe': calls / math.ceil(n / batch_size),
           'tokens_per_second': written / spent, 'batch_size': batch_size}
    if 'plan' in run.names:
        row['plan_same'] = sum(bool(same_plan(a['plan'], b['plan'])) for a, b in zip(said, true)) / n
    if bound_samples and run.model.bound_name:
        row |= bounds(run, given)
    return row, [{**a, **{f'true_{k}': b[k] for k in run.names if k != first}} for a, b in zip(said, true)]

OURS = ('idx', 'max_new_tokens', 'on_step', 'stop', 'block_ids') # arguments of generate that the tool sets itself

def show(table):
    """ print the table """
    nats = dict.fromkeys(k for row in table for k in row if k.startswith('nats_') and not k.endswith('_stderr'))
    titles = ['run', f"accuracy of {table[0]['questions']:,}", '95 %', 'chance', 'plan same', 'NFE', 'tokens/s']
    titles += [k.replace('_', ' ') for k in nats]
    print('|', ' | '.join(titles), '|\n' + '|---' * len(titles) + '|')
    for row in table:
        interval = f"{row['accuracy_low']:.3f} to {row['accuracy_high']:.3f}"
        plan = f"{row['plan_same']:.3f}" if 'plan_same' in row else ''
        cells = [row['contender'], f"{row['accuracy']:.3f}", interval, f"{row['chance']:.3f}", plan,
                 f"{row['nfe']:.0f}", f"{row['tokens_per_second']:,.0f}"]
        for k in nats:
            sign = '=' if row.get('exact') else '<='
            cells.append(f"{sign} {with_error(row[k], row[k + '_stderr'], 2)}" if k in row else '')
        print('|', ' | '.join(cells), '|')

def main():
    print_anything()
    settings = configure(globals(), [a for a in sys.argv[1:] if a.startswith('-')])
    rows = contenders([a for a in sys.argv[1:] if not a.startswith('-')])
    if not rows:
        fail("name the folders of runs: python -m tools.answers out-a out-b")
    with sentences():
        check_sizes(settings, num_samples=0, batch_size=1, bound_samples=0, examples=0)
        if threads:
            torch.set_num_threads(threads)
        for name, folder, options in rows: # check all of them before the first one starts
            run = Run(folder)
            check_options(name, run.model, run.objective, options, OURS)
            check_output(os.path.join(split_view(folder)[0], 'answers.json'))
        table, found = [], {}
        for name, folder, options in rows:
            row, texts = answered(name, folder, options)
            table.append(row)
            for text in texts[:examples]:
                print(f"--- {name}", *(f"[{k}] {v}" for k, v in text.items()), sep='\n')
            place = os.path.realpath(split_view(folder)[0])
            found.setdefault(place, []).append(row | {'answers': texts[:20]})
            write_json(os.path.join(place, 'answers.json'), found[place]) # now: the next contender may fail
        show(table)

if __name__ == '__main__':
    as_command(main)
