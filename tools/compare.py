"""
The scoreboard of finished runs, side by side: nats per token, exact (=) or an upper bound (<=), on the same windows of text.
$ python -m tools.compare out-ar out-mdlm out-bd3lm
$ python -m tools.compare out-mdlm out-bd3lm --orders=64 --output=table.json
--orders=N adds the exact likelihood of unmasking in deterministic orders over N windows, evenly spaced: compare those columns with each other,
and with ar's nll of the same windows, which stands under left_to_right. They belong to another model than the bound (a deterministic
order against random ones), so they may lie on either side of it.
"""
import itertools
import json
import math
import os
import sys

import numpy as np
import torch

import model as models
from configurator import configure, fail
from model import UserError
from prepare import Corpus, PrepareError
from tools.quality import load

orders = 0 # windows per run; 0: none. A network call per token of a block and order
batch_size = 16
output = '' # write the table there as JSON too

def read_results(folder):
    try:
        with open(os.path.join(folder, 'results.json')) as f:
            return json.load(f)
    except (OSError, ValueError) as e:
        fail(f"{folder} has no readable results.json ({e}): finish the run, or python train.py --out_dir={folder} --eval_only=True")

def order_nats(folder, n_windows, view):
    """ {order: (nats per token, standard error over windows)} of a run, or of what its weights can be read as; ar has one order """
    model, state = load(f'{folder}:{view}', ckpt='latest', weights='raw') # what the scoreboard read
    corpus, found, ordered = Corpus(state['settings']['dataset']), {}, hasattr(model, 'nll_order')
    step = max(1, corpus.n_windows('val', model.row_length) // n_windows)
    spaced = [batch['idx'] for batch in itertools.islice(corpus.windows('val', 1, model.row_length), 0, step * n_windows, step)]
    for order in models.ORDERS if ordered else ['left_to_right'] if model.bound_name == 'nll' else []:
        means = []
        for i in range(0, len(spaced), batch_size):
            idx = torch.from_numpy(np.concatenate(spaced[i:i + batch_size]))
            nats, scored = model.nll_order(idx, idx, order) if ordered else model.nll_bound(idx, idx)
            means.append(nats.view(len(nats), -1)[:, 0] / scored)
            print(f"\r{folder}: {order}, {sum(map(len, means))} of {n_windows} windows ", end='', file=sys.stderr)
        means = torch.cat(means)
        found[order] = means.mean().item(), means.std().item() / len(means) ** 0.5
    print(file=sys.stderr)
    return found

def main():
    folders = [a for a in sys.argv[1:] if not a.startswith('-')]
    configure(globals(), [a for a in sys.argv[1:] if a.startswith('-')])
    if orders < 0 or orders == 1:
        fail(f"orders is {orders}, expected 0 (none) or at least 2 windows: one says nothing of the error")
    if not folders:
        fail("name the folders of the runs to compare: python -m tools.compare out-a out-b")
    table = []
    for folder in folders:
        results = read_results(folder)
        for reading, numbers in results['weights'].items():
            row = {'run': folder, 'dataset': results['dataset'], 'objective': results['objective'], 'reading': reading, 'parameters': results['parameters'],
                   'train_tokens_seen': results['train_tokens_seen'], **numbers['scoreboard'], 'random_windows': numbers['random_windows']}
            if orders and not reading.startswith('ema'):
                try:
                    row['orders'] = order_nats(folder, orders, reading.partition('_as_')[2])
                except (PrepareError, UserError) as e:
                    fail(str(e))
            table.append(row)
    names = list(models.ORDERS) if orders else []
    print('| run | reading | parameters | tokens seen | nats/token | +- Monte Carlo | +- windows | perplexity | random windows |',
          *(f' {name} |' for name in names), sep='')
    print('|---' * (9 + len(names)) + '|')
    for row in sorted(table, key=lambda row: row['nats_per_token']):
        found = [row.get('orders', {}).get(name) for name in names]
        print(f"| {row['run']} | {row['objective']}, {row['reading'].replace('_', ' ')} | {row['parameters'] / 1e6:.2f}M | {row['train_tokens_seen'] / 1e6:.1f}M "
              f"| {row['name']} {row['sign']} {row['nats_per_token']:.4f} | {row['stderr_monte_carlo']:.4f} | {row['stderr_windows']:.4f} "
              f"| {row['perplexity'] or math.nan:.4g} | {row['random_windows']:.4f} |",
              *(f" {v[0]:.3f} +- {v[1]:.3f} |" if v else ' |' for v in found), sep='')
    if len({(row['dataset'], row['windows'], row['tokens']) for row in table}) > 1:
        print("note: these runs were not scored on the same tokens", *sorted({f"{r['run']}: {r['dataset']}, {r['windows']} {r['protocol']}, {r['tokens']} tokens scored" for r in table}), sep='\n  ')
    if output:
        with open(output, 'w') as f:
            json.dump(table, f, indent=2)

if __name__ == '__main__':
    main()
