"""
Write text with a trained model:
$ python sample.py --out_dir=out-shakespeare-char --start="ROMEO:" --num_samples=2
$ python sample.py --out_dir=out-shakespeare-char --start=FILE:prompt.txt --temperature=0.7 --top_p=0.95
The samples go to stdout as they come, everything else to stderr.
"""

import inspect
import os
import sys
import time

import torch

import model as models
from configurator import configure, fail
from prepare import PrepareError, Tokenizer, provider, read_text

# -----------------------------------------------------------------------------
out_dir = 'out' # the run's folder
ckpt = 'best' # best | latest | the path of a checkpoint
weights = 'ema' # ema (if the run averaged its weights) | raw
view = None # what else the weights can be read as: ar (of a run with clean_causal or ar_weight)
start = '' # the prompt; FILE:prompt.txt reads it from a file
num_samples = 3
max_new_tokens = 400
temperature = 0.8 # 1: as trained, below: more likely text, 0: always the likeliest token
top_k = None # draw from the k likeliest tokens only
top_p = None # draw from the fewest tokens whose probabilities add up to p
sampler = None # mdlm, bd3lm: first_hitting (their default, one token per network call) | ancestral (several, in `steps` steps)
steps = None # ancestral: reverse steps in all, split evenly over the blocks; None: as many as new tokens
stop = None # end a sample at this token: end (the end id), or the text of one token
stream = True # samples one after another, each as it is written; False: all in one batch, faster, shown at the end
seed = 1337
device = 'auto' # auto (cuda, mps, cpu, whichever there is) | cuda | cuda:1 | mps | cpu
dtype = 'auto' # auto (bfloat16 on cuda that has it, else float32) | float32 | bfloat16 | float16
# -----------------------------------------------------------------------------

def encode_prompt(tokenizer, start):
    """ (1, T) token ids of the prompt, FILE: resolved """
    text = read_text(start.removeprefix('FILE:')) if start.startswith('FILE:') else start
    return torch.tensor(tokenizer.encode(text), dtype=torch.long)[None]

def stop_id(tokenizer, stop):
    if stop is None or stop == 'end':
        return tokenizer.end_id if stop else None
    ids = tokenizer.encode(str(stop))
    if len(ids) != 1:
        raise PrepareError(f"stop {stop!r} is {len(ids)} tokens, expected text of exactly one, or end")
    return int(ids[0])

def until(ids, stop, given):
    """ a finished sample without the stop token and what follows it; the prompt may contain one """
    ended = [i for i in range(given, len(ids)) if ids[i] == stop]
    return ids[:ended[0]] if ended else ids

class Printer:
    """ an on_step that prints a single row as far as it is certain; half a UTF-8 character waits for its other half """
    def __init__(self, tokenizer, stop, given):
        self.tokenizer, self.stop, self.given, self.shown, self.nfe = tokenizer, stop, given, 0, 0

    def __call__(self, step, idx, probs, state):
        self.nfe = state['nfe']
        if len(idx) == 1: # only what nothing can change any more: up to the first gap
            self.write(until(idx[0, :state['done']].tolist(), self.stop, self.given), last=False)

    def write(self, ids, last=True):
        text = self.tokenizer.decode(ids)
        text = text if last else text.rstrip('\ufffd')
        print(text[self.shown:], end='', flush=True)
        self.shown = max(self.shown, len(text))

def main():
    config = configure(globals())
    path = os.path.join(out_dir, f'ckpt_{ckpt}.pt') if ckpt in ('best', 'latest') else ckpt
    try:
        for name in 'num_samples', 'max_new_tokens':
            if config[name] < 1:
                raise PrepareError(f"{name} is {config[name]}, expected at least 1")
        where, amp, _ = models.pick_device(device, dtype)
        if not os.path.exists(path):
            raise PrepareError(f"there is no checkpoint {path}: name the folder of a run with --out_dir, train one first with train.py")
        state = models.read_checkpoint(path)
        objectives = models.OBJECTIVES | provider(state['settings']['dataset']).get('OBJECTIVES', {})
        model, _ = models.load_checkpoint(state, where, weights, objectives, view)
        tokenizer = Tokenizer(state['meta'])
        first = start or '\n' * (model.config.begin_id is None) # something must come first
        prompt, stop_at = encode_prompt(tokenizer, first).to(where), stop_id(tokenizer, stop)
        print(f"loaded {path}: {state['objective']}{f' as {view}' if view else ''}, {model.n_params() / 1e6:.2f}M parameters, iteration {state['iteration']} on "
              f"{state['settings']['dataset']}, {'averaged' if weights == 'ema' and state['ema'] else 'raw'} weights, "
              f"{state['meta']['tokenizer']} tokens, {where}", file=sys.stderr)
        options = {k: config[k] for k in ('temperature', 'top_k', 'top_p', 'sampler', 'steps') if config[k] is not None}
        takes = inspect.signature(model.generate).parameters
        for option in sorted(options.keys() - takes.keys()):
            raise PrepareError(f"{view or state['objective']} has no use for --{option}: it takes {', '.join(k for k in config if k in takes)}")
        torch.manual_seed(seed)
        clock, evaluations = time.time(), 0
        for rows in [1] * num_samples if stream else [num_samples]:
            printer = Printer(tokenizer, stop_at, prompt.size(1))
            with amp:
                out = model.generate(prompt.expand(rows, -1), max_new_tokens, stop=stop_at, on_step=printer, **options)
            for i, ids in enumerate(out.tolist()):
                printer.shown = printer.shown if i == 0 else 0
                printer.write(until(ids, stop_at, prompt.size(1)))
                print('\n---------------', flush=True)
            evaluations += printer.nfe
    except (PrepareError, AssertionError, ValueError, OSError) as e:
        fail(str(e))
    seconds = time.time() - clock
    print(f"{num_samples * max_new_tokens} tokens at most, {evaluations} network evaluations, {seconds:.1f} s, "
          f"{num_samples * max_new_tokens / seconds:,.0f} tokens/s", file=sys.stderr)

if __name__ == '__main__':
    try:
        main()
    except KeyboardInterrupt:
        print(file=sys.stderr)
        sys.exit(130)
