"""
The scoreboard of finished runs: nats per token on the same windows of text, exact (=) or an upper bound (<=).
$ python -m tools.compare out-ar out-mdlm out-bd3lm
$ python -m tools.compare out-mdlm out-bd3lm --orders=64 --output=table.json
--orders=N adds the exact likelihood of unmasking in deterministic orders, over N windows, evenly spaced. Compare these
columns with each other and with the nll of ar on the same windows, which is the column left_to_right. They may lie on
either side of the bound, because they score another distribution: the bound is about random orders.
"""
import itertools
import json
import math
import os
import sys

import numpy as np
import torch

import model as models
from configurator import configure, fail, print_anything
from model import check
from prepare import Corpus, PrepareError
from tools.runs import as_command, check_data, check_output, check_sizes, load, sentences, with_error, write_json

orders = 0 # windows per run; 0: none. Every order costs one network call per token of a block
batch_size = 16
output = '' # write the table there as JSON too

# {field: type} that the table reads of results.json, and of the scoreboard of each reading in it
RUN = {'dataset': str, 'objective': str, 'parameters': int, 'train_tokens_seen': (int, float), 'weights': dict}
BOARD = {'name': str, 'sign': str, 'nats_per_token': (int, float), 'stderr_monte_carlo': (int, float, type(None)),
         'stderr_windows': (int, float), 'perplexity': (int, float, type(None)), 'windows': int, 'tokens': int,
         'protocol': str}

def check_fields(found, fields, path, again):
    """ a UserError if found, a part of results.json, lacks one of the fields or has another type there """
    for name, kind in fields.items():
        what = 'no' if not isinstance(found, dict) or name not in found else 'another kind of'
        fits = what != 'no' and isinstance(found[name], kind) and not isinstance(found[name], bool)
        check(fits, f"{path} has {what} {name!r}, so another version wrote it: {again}")

def read_results(folder):
    """ results.json of a run as a dict, checked to have everything that the table reads """
    path = os.path.join(os.path.expanduser(folder), 'results.json')
    again = f"finish the run, or python train.py --out_dir={folder} --eval_only=True"
    try:
        with open(path, encoding='utf-8') as f:
            results = json.load(f)
    except (OSError, ValueError, RecursionError) as e:
        why = e.strerror if isinstance(e, OSError) else f'{type(e).__name__}: {e}'
        raise PrepareError(f"{folder} has no readable results.json ({why}): {again}") from None
    check_fields(results, RUN, path, again)
    check(results['weights'], f"{path} has no scoreboard: {again}")
    for numbers in results['weights'].values():
        check_fields(numbers, {'scoreboard': dict, 'random_windows': (int, float)}, path, again)
        check_fields(numbers['scoreboard'], BOARD, path, again)
    return results

def read_runs(folders):
    """ the rows of the table, a list of dicts: one for every reading of every run (raw, ema, raw_as_ar, ...) """
    table = []
    for folder in folders:
        results = read_results(folder)
        about = {k: results[k] for k in RUN if k != 'weights'}
        for reading, numbers in results['weights'].items():
            table.append({'run': folder, 'reading': reading, **about, **numbers['scoreboard'],
                          'random_windows': numbers['random_windows']})
    return table

def order_nats(folder, n_windows, view):
    """
    {order: (nats per token, standard error over windows)} of a run. view: the objective as which its weights are read,
    '' for its own. ar has one order, left_to_right; an objective without any exact likelihood has none.
    """
    model, state = load(folder, ckpt='latest', weights='raw', view=view or None) # as the scoreboard did
    corpus, found = Corpus(state['settings']['dataset']), {}
    ordered = getattr(model, 'scores_orders', False)
    check_data(folder, state['meta'], corpus)
    there = corpus.n_windows('val', model.row_length)
    check(there > 1, f"{folder}: val has {there} windows of {model.row_length} tokens, expected at least 2")
    step, n = max(1, there // n_windows), min(there, n_windows)
    windows = itertools.islice(corpus.windows('val', 1, model.row_length), 0, step * n, step)
    spaced = [batch['idx'] for batch in windows]
    names = models.ORDERS if ordered else ['left_to_right'] if model.bound_name == 'nll' else []
    for order in names:
        means = []
        for i in range(0, n, batch_size):
            idx = torch.from_numpy(np.concatenate(spaced[i:i + batch_size]))
            nats, scored = model.nll_order(idx, idx, order) if ordered else model.nll_bound(idx, idx)
            means.append(nats.view(len(nats), -1)[:, 0] / scored)
            print(f"\r{folder}: {order}, {sum(map(len, means))} of {n} windows ", end='', file=sys.stderr)
        means = torch.cat(means)
        found[order] = means.mean().item(), means.std().item() / len(means) ** 0.5
    print(file=sys.stderr)
    return found

def show(table):
    """ print the table, the best run first """
    names = list(models.ORDERS) if orders else []
    titles = ['run', 'reading', 'parameters', 'tokens seen', 'nats/token', '+- Monte Carlo', '+- windows', 'perplexity',
              'random windows', *names]
    print('|', ' | '.join(titles), '|\n' + '|---' * len(titles) + '|')
    for row in sorted(table, key=lambda row: (math.isnan(row['nats_per_token']), row['nats_per_token'])): # nan last
        perplexity = math.nan if row['perplexity'] is None else row['perplexity']
        cells = [row['run'], f"{row['objective']}, {row['reading'].replace('_', ' ')}",
                 f"{row['parameters'] / 1e6:.2f}M", f"{row['train_tokens_seen'] / 1e6:.1f}M",
                 f"{row['name']} {row['sign']} {row['nats_per_token']:.4f}",
                 '' if row['stderr_monte_carlo'] is None else f"{row['stderr_monte_carlo']:.4f}",
                 f"{row['stderr_windows']:.4f}", f"{perplexity:.4g}", f"{row['random_windows']:.4f}"]
        found = [row.get('orders', {}).get(name) for name in names]
        print('|', ' | '.join(cells + [with_error(*pair, 3) if pair else '' for pair in found]), '|')
    if len({(row['dataset'], row['windows'], row['tokens']) for row in table}) > 1:
        scored = {f"{row['run']}: {row['dataset']}, {row['windows']} {row['protocol']}, {row['tokens']} tokens scored"
                  for row in table}
        print("note: these runs were not scored on the same tokens", *sorted(scored), sep='\n  ')

def main():
    print_anything()
    settings = configure(globals(), [a for a in sys.argv[1:] if a.startswith('-')])
    folders = [a for a in sys.argv[1:] if not a.startswith('-')]
    with sentences():
        check(orders == 0 or orders >= 2,
              f"orders is {orders}, expected 0 (none) or at least 2 windows: one says nothing of the error")
        check_sizes(settings, orders=0, batch_size=1)
        if not folders:
            fail("name the folders of the runs to compare: python -m tools.compare out-a out-b")
        if output:
            check_output(output)
        table = read_runs(folders)
        for row in table if orders else []:
            if not row['reading'].startswith('ema'):
                row['orders'] = order_nats(row['run'], orders, row['reading'].partition('_as_')[2])
        show(table)
        if output:
            write_json(output, table)

if __name__ == '__main__':
    as_command(main)
