"""
How good samples are, beside what they cost: runs and ways to sample them, one row each, under the headline of the held-out text itself.
$ python -m tools.quality out-mdlm "out-mdlm,sampler=ancestral,steps=16|32|64" out-bd3lm,sampler=threshold --judge=out-ar
$ python -m tools.quality out-mdlm --judge=out-ar --prompt=48 --new_tokens=32 --suffix=48 --examples=5
A contender is the folder of a run and options of its generate, with commas between; a|b|c is a row for each. --judge is an ar run on the same
text (or what ar reads in a run): its nats per token of what the samples add, lower is likelier, and far below the text's own is repetitive.
Held-out text stands in front of what is written (--prompt) and behind it (--suffix: a gap is filled in), and no sample may change it.
A judge alone is fooled by dull text, so read its column beside the others: unigram entropy of what is written (nats), distinct-n (the share
of n-grams that are different, of all samples together) and repetition (the share of n-grams that the same sample had before).
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

judge = '' # the folder of an ar run; folder:ar is what ar reads in a run with ar_weight
num_samples = 64 # texts per row
batch_size = 16 # texts written at once
prompt = 0 # tokens of held-out text before what is written
new_tokens = 0 # of each text; 0: what is left of the judge's context
suffix = 0 # tokens of held-out text behind it; then nll behind is the judge's view of how well they follow
ngram = 4 # n of distinct-n and repetition
bleu = '' # BLEU of what is written against what held-out text has there: words | char; needs sacrebleu
examples = 0 # texts of each row to print, what was given in [brackets]
ckpt = 'best' # best | latest
weights = 'ema' # ema (if the run averaged its weights) | raw
threads = 0 # of the CPU; 0: as many as torch takes
seed = 1337
device = 'auto' # auto (cuda, mps, cpu, whichever there is) | cuda | cuda:1 | mps | cpu
output = '' # write the table there as JSON too

OURS = ('idx', 'max_new_tokens', 'on_step', 'block_ids') # what the tool itself gives to generate

def judged(model, idx, targets):
    """ nats of the scored tokens of rows (B, N), summed per row, and how many they are, both (B,); a long row is read context by context """
    nats, scored, step = 0, 0, model.row_length - (model.config.begin_id is None)
    for i in range(0, idx.size(1), step):
        part = slice(i, i + model.row_length)
        if (targets[:, part] != -1).any():
            n, s = model.nll_bound(idx[:, part], targets[:, part])
            nats, scored = nats + n[:, 0], scored + s
    return nats, scored

def variety(rows, n):
    """ rows of ids (B, N) -> unigram entropy in nats, distinct-n of all, and the mean share of n-grams that a row had before """
    grams = [[tuple(row[i:i + n]) for i in range(len(row) - n + 1)] for row in rows]
    unigrams = Counter(token for row in rows for token in row)
    p = np.array(list(unigrams.values())) / unigrams.total()
    total, distinct = sum(map(len, grams)), len({gram for row in grams for gram in row})
    return {'entropy': float(-(p * np.log(p)).sum()), 'distinct': distinct / max(1, total),
            'repetition': 1 - sum(len(set(row)) for row in grams) / max(1, total)}

def write(model, text, gap, options):
    """ held-out rows (B, N) with `gap`, a slice, written anew -> (rows, network evaluations); ar cannot see what is behind a gap """
    calls, start, end = [0], gap.start, gap.stop
    note = lambda step, idx, probs, state: calls.append(state['nfe'])
    if end == text.size(1):
        out = model.generate(text[:, :start], end - start, on_step=note, **options)
    else:
        out = model.generate(torch.cat((text[:, :start], torch.full_like(text[:, gap], -1), text[:, end:]), dim=1), 0, on_step=note, **options)
    given = torch.ones(text.size(1), dtype=torch.bool)
    given[gap] = False
    assert (out[:, given] == text[:, given]).all(), "a sample changed given text"
    return out, calls[-1]

def measure(out, gap, critic):
    """ rows (B, N) of which `gap`, a slice, was written -> the columns about quality """
    columns = {}
    for name, part in ('nll', gap), ('nll_behind', slice(gap.stop, None)):
        targets = torch.full_like(out, -1)
        targets[:, part] = out[:, part]
        if (targets != -1).any():
            with torch.no_grad():
                nats, scored = judged(critic, out, targets)
            means = (nats / scored.clamp(min=1)).cpu().double()
            columns[name], columns[name + '_stderr'] = (nats.sum() / scored.sum()).item(), (means.std() / len(means) ** 0.5).item()
    return columns | variety(out[:, gap].tolist(), ngram)

def likeness(texts, reference):
    """ BLEU of decoded texts, 0 to 100, with one reference each (https://aclanthology.org/P02-1040) """
    import sacrebleu
    return sacrebleu.corpus_bleu(texts, [reference], tokenize={'words': '13a', 'char': 'char'}[bleu]).score

def check_settings(settings):
    check_sizes(settings, num_samples=2, batch_size=1, prompt=0, new_tokens=0, suffix=0, ngram=1, examples=0)
    check(bleu in ('', 'words', 'char'), f"bleu is {bleu!r}, expected words or char")
    if bleu and importlib.util.find_spec('sacrebleu') is None:
        fail("--bleu needs a package: pip install sacrebleu")
    if output:
        check_output(output)

def choose_gap(critic, models_of_runs):
    """ which tokens of a text are written, a slice; before and behind them is held-out text """
    new = new_tokens or critic.config.block_size - prompt - suffix
    check(new >= 1, f"prompt {prompt} and suffix {suffix} leave nothing of the judge's context of "
          f"{critic.config.block_size}: set new_tokens")
    check(ngram <= new, f"ngram is {ngram}, expected at most the {new} new tokens of a text")
    without_begin = any(model.config.begin_id is None for model in (critic, *models_of_runs))
    first = prompt or int(without_begin) # something must come first
    return slice(first, first + new)

def read_held_out(corpus, length):
    """ evenly spaced windows of val, (num_samples, length) """
    windows = corpus.n_windows('val', length)
    check(windows >= num_samples, f"the held-out text has {windows} windows of {length} tokens, "
          f"fewer than num_samples={num_samples}")
    step = windows // num_samples
    spaced = itertools.islice(corpus.windows('val', 1, length), 0, step * num_samples, step)
    return torch.from_numpy(np.concatenate([batch['idx'] for batch in spaced]))

def write_all(model, held_out, gap, options):
    """ -> texts (B, N), network calls per batch, seconds """
    torch.manual_seed(seed)
    started, calls, out = time.perf_counter(), 0, []
    for text in held_out.split(batch_size):
        written, nfe = write(model, text, gap, options)
        out.append(written)
        calls += nfe
    return torch.cat(out), calls / len(out), time.perf_counter() - started

def measure_all(rows):
    """ -> the table, the texts of each of its rows, the gap, the tokenizer and the device """
    where, _, _ = models.pick_device(device)
    critic, state = load(judge, where, ckpt, weights)
    check(critic.bound_name == 'nll', f"the judge {judge} is {state['objective']}, expected ar, "
          f"whose likelihood is exact; of a run with ar_weight, {judge}:ar")
    corpus, tokenizer = Corpus(state['settings']['dataset']), Tokenizer(state['meta'])
    check_data(judge, state['meta'], corpus)
    runs = {folder: load(folder, where, ckpt, weights) for _, folder, _ in rows}
    for name, folder, options in rows: # what is wrong with the last of them is better said before the first
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
