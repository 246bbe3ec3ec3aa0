"""
How good samples are and what they cost: a row for each run and way to sample it, after a row for held-out text itself.
$ python -m tools.quality out-mdlm "out-mdlm,sampler=ancestral,steps=16|32|64" out-bd3lm,sampler=threshold \
      --judge=out-ar
$ python -m tools.quality out-mdlm --judge=out-ar --prompt=48 --new_tokens=32 --suffix=48 --examples=5
A contender is the folder of a run and options of its generate, with commas between; a|b|c is a row for each.

--judge is an ar run on the same text, or a run that can be read as ar. judge nll: its nats per token of the new tokens.
Lower is likelier, but far below the nll of held-out text is repetitive: dull text pleases a judge, so read the other
columns too. entropy: of the unigrams of the new tokens, in nats. distinct-n: the share of n-grams that are different,
over all samples. repetition: the share of n-grams that stood in the same sample before.
Held-out text comes before the new tokens (--prompt) and after them (--suffix: then the new tokens fill a gap). No
sample may change it.
"""
import importlib.util
import inspect
import itertools
import sys
import time
from collections import Counter

import numpy as np
import torch

import model as models
from configurator import configure, fail, print_anything
from model import check
from prepare import Corpus, Tokenizer
from tools.runs import (as_command, check_data, check_options, check_output, check_sizes, contenders, load, sentences,
                        with_error, write_json)

judge = '' # the folder of an ar run; folder:ar reads a run with ar_weight as ar
num_samples = 64 # texts per row
batch_size = 16 # texts written at once
prompt = 0 # tokens of held-out text before the new tokens
new_tokens = 0 # of each text; 0: what is left of the judge's context
suffix = 0 # tokens of held-out text after the new ones; the column `nll behind` is the judge's nll of the suffix
ngram = 4 # n of distinct-n and repetition
bleu = '' # words | char: BLEU of the new tokens against held-out text at the same place; needs sacrebleu
examples = 0 # texts of each row to print, held-out text in [brackets]
ckpt = 'best' # best | latest
weights = 'ema' # ema (if the run averaged its weights) | raw
threads = 0 # of the CPU; 0: as many as torch takes
seed = 1337
device = 'auto' # auto (cuda, mps, cpu, whichever there is) | cuda | cuda:1 | mps | cpu
output = '' # write the table there as JSON too

OURS = ('idx', 'max_new_tokens', 'on_step', 'block_ids') # arguments of generate that the tool sets itself

def judged(model, idx, targets):
    """
    (nats of the scored tokens, number of scored tokens), both (B,), of rows (B, N). A row that is longer than the
    judge's context is scored context by context.
    """
    nats, scored = 0, 0
    step = model.row_length - (model.config.begin_id is None) # without a begin id, no prediction of the first token
    for i in range(0, idx.size(1), step):
        part = slice(i, i + model.row_length)
        if (targets[:, part] != -1).any():
            n, s = model.nll_bound(idx[:, part], targets[:, part])
            nats, scored = nats + n[:, 0], scored + s
    return nats, scored

def variety(rows, n):
    """ rows of ids, B lists -> {'entropy': of unigrams in nats, 'distinct': distinct-n of all rows, 'repetition'} """
    grams = [[tuple(row[i:i + n]) for i in range(len(row) - n + 1)] for row in rows]
    unigrams = Counter(token for row in rows for token in row)
    p = np.array(list(unigrams.values())) / unigrams.total()
    total, distinct = sum(map(len, grams)), len({gram for row in grams for gram in row})
    return {'entropy': float(-(p * np.log(p)).sum()), 'distinct': distinct / max(1, total),
            'repetition': 1 - sum(len(set(row)) for row in grams) / max(1, total)}

def write(model, text, gap, options):
    """
    Lets the model write the tokens in `gap`, a slice, of held-out rows (B, N). Returns (rows, network calls). ar cannot
    see the text after a gap, so measure_all refuses a suffix for it.
    """
    calls, start, end = [0], gap.start, gap.stop
    note = lambda step, idx, probs, state: calls.append(state['nfe'])
    if end == text.size(1):
        idx, n = text[:, :start], end - start
    else:
        idx, n = text.clone(), 0
        idx[:, gap] = -1 # to be filled in
    out = model.generate(idx, n, on_step=note, **options)
    given = torch.ones(text.size(1), dtype=torch.bool)
    given[gap] = False
    assert (out[:, given] == text[:, given]).all(), "a sample changed given text"
    return out, calls[-1]

def measure(out, gap, critic):
    """ rows (B, N) in which the model wrote `gap`, a slice -> the columns about quality, {name: number} """
    columns = {}
    for name, part in ('nll', gap), ('nll_behind', slice(gap.stop, None)):
        targets = torch.full_like(out, -1)
        targets[:, part] = out[:, part]
        if (targets != -1).any():
            with torch.no_grad():
                nats, scored = judged(critic, out, targets)
            means = (nats / scored.clamp(min=1)).cpu().double()
            columns[name] = (nats.sum() / scored.sum()).item()
            columns[name + '_stderr'] = (means.std() / len(means) ** 0.5).item() # over texts
    return columns | variety(out[:, gap].tolist(), ngram)

def likeness(texts, reference):
    """ BLEU of texts, 0 to 100, each with one reference text (https://aclanthology.org/P02-1040) """
    import sacrebleu
    return sacrebleu.corpus_bleu(texts, [reference], tokenize={'words': '13a', 'char': 'char'}[bleu]).score

def check_settings(settings):
    """ an error that is a sentence if a setting is out of range, or cannot be obeyed """
    check_sizes(settings, num_samples=2, batch_size=1, prompt=0, new_tokens=0, suffix=0, ngram=1, examples=0)
    check(bleu in ('', 'words', 'char'), f"bleu is {bleu!r}, expected words or char")
    if bleu and importlib.util.find_spec('sacrebleu') is None:
        fail("--bleu needs a package: pip install sacrebleu")
    if output:
        check_output(output)

def choose_gap(critic, models_of_runs):
    """ which tokens of a text are written, as a slice; the tokens before and after it are held-out text """
    new = new_tokens or critic.config.block_size - prompt - suffix
    check(new >= 1, f"prompt {prompt} and suffix {suffix} leave nothing of the judge's context of "
          f"{critic.config.block_size}: set new_tokens")
    check(ngram <= new, f"ngram is {ngram}, expected at most the {new} new tokens of a text")
    without_begin = any(model.config.begin_id is None for model in (critic, *models_of_runs))
    first = prompt or int(without_begin) # without a begin id, one held-out token must come first
    return slice(first, first + new)

def read_held_out(corpus, length):
    """ evenly spaced windows of val, ids (num_samples, length) """
    windows = corpus.n_windows('val', length)
    check(windows >= num_samples, f"the held-out text has {windows} windows of {length} tokens, "
          f"fewer than num_samples={num_samples}")
    step = windows // num_samples
    spaced = itertools.islice(corpus.windows('val', 1, length), 0, step * num_samples, step)
    return torch.from_numpy(np.concatenate([batch['idx'] for batch in spaced]))

def write_all(model, held_out, gap, options):
    """ held-out rows (num_samples, N) -> (rows with the gap written, network calls per batch, seconds) """
    torch.manual_seed(seed)
    started, calls, out = time.perf_counter(), 0, []
    for text in held_out.split(batch_size):
        written, nfe = write(model, text, gap, options)
        out.append(written)
        calls += nfe
    return torch.cat(out), calls / len(out), time.perf_counter() - started

def measure_all(rows):
    """ contenders -> (table, ids (num_samples, N) for each of its rows, the gap, the tokenizer, the device) """
    where, _, _ = models.pick_device(device)
    critic, state = load(judge, where, ckpt, weights)
    check(critic.bound_name == 'nll', f"the judge {judge} is {state['objective']}, expected ar, "
          f"whose likelihood is exact; of a run with ar_weight, {judge}:ar")
    corpus, tokenizer = Corpus(state['settings']['dataset']), Tokenizer(state['meta'])
    check_data(judge, state['meta'], corpus)
    runs = {folder: load(folder, where, ckpt, weights) for _, folder, _ in rows}
    for name, folder, options in rows: # check all of them before the first one starts to write
        model, other = runs[folder]
        same = all(other['meta'].get(k) == state['meta'].get(k) for k in ('tokenizer', 'chars'))
        check(same, f"{folder} and the judge {judge} do not write in the same tokens")
        check_options(name, model, other['objective'], options, OURS)
        takes = inspect.signature(model.generate).parameters
        check(not suffix or 'sampler' in takes,
              f"{name}: {other['objective']} cannot see what stands behind a gap: leave out --suffix")
    gap = choose_gap(critic, [model for model, _ in runs.values()])
    held_out = read_held_out(corpus, gap.stop + suffix).to(where)
    table, texts = [{'contender': 'the held-out text', **measure(held_out, gap, critic)}], [held_out]
    begun = time.time()
    for done, (name, folder, options) in enumerate(rows):
        left = f", {(time.time() - begun) / done * (len(rows) - done):.0f} s left" if done else ''
        print(f"{done} of {len(rows)} rows{left}; now {name}", file=sys.stderr)
        out, nfe, seconds = write_all(runs[folder][0], held_out, gap, options)
        texts.append(out)
        new = gap.stop - gap.start
        table.append({'contender': name, **measure(out, gap, critic), 'nfe': nfe,
                      'tokens_per_second': num_samples * new / seconds, 'samples': num_samples, 'new_tokens': new})
    return table, texts, gap, tokenizer, where

def show(table):
    """ print the table """
    titles = ['contender', 'judge nll', *['nll behind'] * (suffix > 0), *['BLEU'] * bool(bleu),
              'entropy', f'distinct-{ngram}', 'repetition', 'NFE', 'tokens/s']
    print('|', ' | '.join(titles), '|\n' + '|---' * len(titles) + '|')
    for row in table:
        cells = [row['contender'], with_error(row['nll'], row['nll_stderr'], 3)]
        cells += [f"{row['nll_behind']:.3f}"] if suffix else []
        cells += [f"{row['bleu']:.2f}"] if bleu else []
        cells += [f"{row[k]:.3f}" for k in ('entropy', 'distinct', 'repetition')]
        cells += [f"{row['nfe']:.0f}", f"{row['tokens_per_second']:,.0f}"] if 'nfe' in row else ['', '']
        print('|', ' | '.join(cells), '|')

def main():
    print_anything()
    settings = configure(globals(), [a for a in sys.argv[1:] if a.startswith('-')])
    rows = contenders([a for a in sys.argv[1:] if not a.startswith('-')])
    if not rows or not judge:
        fail("name runs and a judge: python -m tools.quality out-mdlm out-bd3lm --judge=out-ar")
    with sentences():
        check_settings(settings)
        if threads:
            torch.set_num_threads(threads)
        table, texts, gap, tokenizer, where = measure_all(rows)
        parts = [[tokenizer.decode(ids) for ids in out[:, gap].tolist()] for out in texts]
        for row, part in zip(table, parts if bleu else []):
            row['bleu'] = likeness(part, parts[0])
        show(table)
        print(f"{num_samples} texts of {gap.stop - gap.start} new tokens each, {batch_size} at once, "
              f"{torch.get_num_threads()} threads, {where}; judge {judge}, {weights} weights")
        for row, out in zip(table, texts):
            for ids in out[:examples].tolist():
                before, own, after = (tokenizer.decode(part) for part in (ids[:gap.start], ids[gap], ids[gap.stop:]))
                given = [f"[{text}]" if text else '' for text in (before, after)]
                print(f"--- {row['contender']}\n{own.join(given)}")
        if output:
            write_json(output, table)

if __name__ == '__main__':
    as_command(main)
