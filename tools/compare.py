"""
The scoreboard of finished runs, side by side: nats per token, exact (=) or an upper bound (<=), on the same windows of text.
$ python -m tools.compare out-ar out-mdlm out-bd3lm
$ python -m tools.compare out-mdlm out-bd3lm --orders=64 --output=table.json
--orders=N adds the exact likelihood of unmasking left to right, by confidence and by margin, over the first N windows; it belongs to
another model than the bound (a deterministic order against random ones), so it may lie on either side of it.
"""
import json
import math
import os
import sys

import torch

import model as models
from configurator import configure, fail
from prepare import Corpus, PrepareError, provider

orders = 0 # windows per run; 0: none. A pass per token of a block
batch_size = 16
output = '' # write the table there as JSON too

def read_results(folder):
    try:
        with open(os.path.join(folder, 'results.json')) as f:
            return json.load(f)
    except (OSError, ValueError) as e:
        fail(f"{folder} has no readable results.json ({e}): finish the run, or python train.py --out_dir={folder} --eval_only=True")

def order_nats(folder, n_windows):
    """ {order: (nats per token, standard error over windows)} of a run, {} for ar, which has one order """
    state = models.read_checkpoint(os.path.join(folder, 'ckpt_latest.pt')) # what the scoreboard read
    dataset = state['settings']['dataset']
    model, _ = models.load_checkpoint(state, 'cpu', 'raw', models.OBJECTIVES | provider(dataset).get('OBJECTIVES', {}))
    if not hasattr(model, 'nll_order'):
        return {}
    found = {}
    for order in models.ORDERS:
        means = []
        for batch in Corpus(dataset).windows('val', batch_size, model.row_length, n_windows):
            nats, scored = model.nll_order(*(torch.from_numpy(v) for v in batch.values()), order)
            means.append(nats / scored)
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
            row = {'run': folder, 'objective': results['objective'], 'reading': reading, 'parameters': results['parameters'],
                   'train_tokens_seen': results['train_tokens_seen'], **numbers['scoreboard'], 'random_windows': numbers['random_windows']}
            if orders and reading == 'raw':
                try:
                    row['orders'] = order_nats(folder, orders)
                except (PrepareError, OSError, ValueError) as e:
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
              f"| {row['perplexity'] or math.nan:.2f} | {row['random_windows']:.4f} |",
              *(f" {v[0]:.3f} +- {v[1]:.3f} |" if v else ' |' for v in found), sep='')
    if len({(row['windows'], row['tokens']) for row in table}) > 1:
        print("note: these runs were not scored on the same tokens", *sorted({f"{r['run']}: {r['windows']} {r['protocol']}, {r['tokens']} tokens scored" for r in table}), sep='\n  ')
    if output:
        with open(output, 'w') as f:
            json.dump(table, f, indent=2)

if __name__ == '__main__':
    main()
