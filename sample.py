"""
Write text with a trained model:
$ python sample.py --out_dir=out-shakespeare-char --start="ROMEO:" --num_samples=2
$ python sample.py --out_dir=out-shakespeare-char --start=FILE:prompt.txt --temperature=0.7 --top_p=0.95
Fill in gaps, given what stands on both sides, with a masked or block diffusion model:
$ python sample.py --out_dir=out-shakespeare-bd3lm --start="ROMEO:[[40]]and[[12]]my love." --max_new_tokens=0
Ask a model of questions, plans and executions; it writes the plan, then the execution, each up to its end:
$ python sample.py --out_dir=out-arithmetic --start="Ann has 7 figs. Bob has 5 more than Ann. Cid has 2 fewer than Bob. How many has Bob?"
The samples go to stdout as they come, everything else to stderr.
"""

import inspect
import os
import re
import sys
import time

import torch

import model as models
from configurator import configure, fail
from prepare import Layout, PrepareError, Tokenizer, provider, read_text

# -----------------------------------------------------------------------------
out_dir = 'out' # the run's folder
ckpt = 'best' # best | latest | the path of a checkpoint
weights = 'ema' # ema (if the run averaged its weights) | raw
view: str | None = None # what else the weights can be read as: ar (of a run with clean_causal or ar_weight, or of df)
start = '' # the prompt, of a model of segments the question; FILE:prompt.txt reads it from a file. [[40]] is a gap of 40 tokens to fill in, \[[ stands for [[ itself
num_samples = 3
max_new_tokens = 400 # behind the prompt; 0: only fill in its gaps; segments have lengths of their own
temperature = 0.8 # 1: as trained, below: more likely text, 0: always the likeliest token
top_k: int | None = None # draw from the k likeliest tokens only
top_p: float | None = None # draw from the fewest tokens whose probabilities add up to p
# how denoise, mdlm, bd3lm and df write; None: not given. A sampler refuses what it has no use for
sampler: str | None = None # first_hitting (their default, one token per network call) | ancestral | fixed | threshold | entropy_bound (several); of df: mixture | ddim | ddpm
steps: int | None = None # ancestral, fixed: reverse steps in all, split evenly over the blocks; None: one per new token. df: noise levels that a token passes
order: str | None = None # which hidden tokens come first, but for ancestral: random | confidence | entropy | margin | left_to_right; None: what measured best (README)
schedule: str | None = None # ancestral, fixed: linear (the default) | cosine, few tokens per step at first, many at the end
confidence_threshold: float | None = None # threshold: take every token the model is surer of than this probability; None: 0.9
entropy_budget: float | None = None # entropy_bound: nats of entropy that the tokens of one call may have together, less the largest; None: 0.1
remask: float | None = None # ancestral, fixed: share of what a block has written that each step but its last hides again, the least probable first
df_scheduling_matrix: str | None = None # df: pyramid | full_sequence | autoregressive | trapezoid, which tokens become clean when; None: as trained
df_uncertainty_scale: float | None = None # df: steps a token begins later than the one before it; None: as trained
guidance: float | None = None # how far to overstate what the prompt changes, 0 (not at all, the default) or more; doubles the cost
stop: str | None = None # end a sample at this token: end (the end id), or the text of one token
stream = True # samples one after another, each as it is written; False: all in one batch, faster, shown at the end
seed = 1337
device = 'auto' # auto (cuda, mps, cpu, whichever there is) | cuda | cuda:1 | mps | cpu
dtype = 'auto' # auto (bfloat16 on cuda that has it, else float32) | float32 | bfloat16 | float16
# -----------------------------------------------------------------------------

# what a setting may be whose default, None, does not say it
KINDS = {int: ('top_k', 'steps'), (int, float): ('top_p', 'confidence_threshold', 'entropy_budget', 'remask', 'guidance', 'df_uncertainty_scale'),
         str: ('sampler', 'order', 'schedule', 'df_scheduling_matrix')}

def check_kinds(config):
    for kind, names in KINDS.items():
        for name in names:
            if config[name] is not None and (isinstance(config[name], bool) or not isinstance(config[name], kind)):
                what = {int: 'a whole number', str: 'a name'}.get(kind, 'a number')
                raise PrepareError(f"{name} is {config[name]!r}, expected {what}")

def prompt_text(start):
    """ --start, or what is in the file that it names """
    return read_text(start.removeprefix('FILE:')) if start.startswith('FILE:') else start

def encode_prompt(tokenizer, start):
    """ (1, T) token ids of the prompt, FILE: resolved; -1, so many times, where it has a gap like [[40]] """
    ids = []
    for i, piece in enumerate(re.split(r'(?<!\\)\[\[([0-9]+)\]\]', prompt_text(start))): # text, length of a gap, text, ...
        if i % 2 and int(piece) == 0:
            raise PrepareError(f"the prompt has a gap of no tokens, [[{piece}]]; if this is text, write \\[[{piece}]]")
        ids += [-1] * int(piece) if i % 2 else list(tokenizer.encode(piece.replace('\\[[', '[[')))
    return torch.tensor(ids, dtype=torch.long)[None]

def stop_id(tokenizer, stop):
    if stop is None or stop == 'end':
        return tokenizer.end_id if stop else None
    ids = tokenizer.encode(str(stop))
    if len(ids) != 1:
        raise PrepareError(f"stop {stop!r} is {len(ids)} tokens, expected text of exactly one, or end")
    return int(ids[0])

def until(ids, stop, given):
    """ a finished sample without the first stop token the model wrote and all that it wrote after it; given: positions of the prompt's own """
    end = next((i for i, token in enumerate(ids) if token == stop and i not in given), len(ids))
    return [token for i, token in enumerate(ids) if i < end or i in given]

def labelled(layout, tokenizer, row):
    """ what is written of a row of segments, each under its name, but for the question """
    parts = layout.parts(row)
    return '\n\n'.join(f'{name}:\n{tokenizer.decode(ids)}' for name, ids in list(parts.items())[1:])

class Progress:
    """ how much of `total` tokens is written and how long the rest takes, on stderr: one changing line on a terminal, else a line every 10 s """
    def __init__(self, total, given):
        self.total, self.given, self.finished, self.live, self.shown = total, given, 0, sys.stderr.isatty(), False
        self.begun = self.told = time.time()

    def __call__(self, idx):
        """ idx (B, n): what is settled of the samples being written, their prompts included, -1 elsewhere """
        now = time.time()
        if now - self.told < (0.5 if self.live else 10):
            return
        written, self.told, self.shown = self.finished + int((idx != -1).sum()) - len(idx) * self.given, now, self.live
        left = (now - self.begun) * (self.total - written) / max(1, written)
        line = f"{written} of {self.total} tokens, {now - self.begun:.0f} s, {left:.0f} s left"
        print(f"\r{line}\033[K" if self.live else line, end='' if self.live else '\n', file=sys.stderr, flush=True)

    def clear(self):
        """ make room for text on the same terminal """
        if self.shown:
            print('\r\033[K', end='', file=sys.stderr, flush=True)
        self.shown = False

class Printer:
    """ an on_step that prints a single row as far as it is certain; half a UTF-8 character waits for its other half """
    def __init__(self, show, progress):
        self.show, self.progress, self.shown, self.nfe = show, progress, 0, 0 # show: ids of a row -> text

    def __call__(self, step, idx, probs, state):
        self.nfe = state['nfe']
        if len(idx) == 1: # only what nothing can change any more: up to the first gap
            self.write(idx[0, :state['done']].tolist(), last=False)
        if not (self.shown and sys.stdout.isatty()): # where text appears line by line, it is the progress
            self.progress(idx)

    def write(self, ids, last=True):
        text = self.show(ids)
        text = text if last else text.rstrip('\ufffd')
        if text[self.shown:]:
            self.progress.clear()
            print(text[self.shown:], end='', flush=True)
        self.shown = max(self.shown, len(text))

def main():
    config = configure(globals())
    path = os.path.join(out_dir, f'ckpt_{ckpt}.pt') if ckpt in ('best', 'latest') else ckpt
    try:
        check_kinds(config)
        if num_samples < 1:
            raise PrepareError(f"num_samples is {num_samples}, expected at least 1")
        where, amp, _ = models.pick_device(device, dtype)
        state = models.read_checkpoint(path)
        model, _ = models.load_checkpoint(state, where, weights, provider(state['settings']['dataset']).get('OBJECTIVES', {}), view)
        tokenizer = Tokenizer(state['meta'])
        more, new = {}, max_new_tokens
        if 'segments' in state['meta']:
            if not start or stop is not None:
                raise PrepareError("this model answers questions: give one with --start=" if not start else "segments end at the end id: leave out --stop")
            layout = Layout(state['meta'], getattr(model, 'id_list', None))
            more = layout.prompt([tokenizer.encode(prompt_text(start).strip())])
            new, stop_at, show = more.pop('max_new_tokens'), tokenizer.end_id, lambda ids: labelled(layout, tokenizer, ids)
            more = {k: torch.from_numpy(ids).to(where) for k, ids in more.items()}
            prompt = more.pop('idx')
        else:
            first = start or '\n' * (model.config.begin_id is None) # something must come first
            prompt, stop_at = encode_prompt(tokenizer, first).to(where), stop_id(tokenizer, stop)
            show = lambda ids: tokenizer.decode(until(ids, stop_at, given))
        given = set((prompt[0] != -1).nonzero()[:, 0].tolist())
        gaps = prompt.size(1) - len(given) # tokens
        if new < (gaps == 0):
            raise PrepareError(f"max_new_tokens is {max_new_tokens}, expected at least 1, or 0 and a gap like [[40]] in --start")
        print(f"loaded {path}: {state['objective']}{f' as {view}' if view else ''}, {model.n_params() / 1e6:.2f}M parameters, iteration {state['iteration']} on "
              f"{state['settings']['dataset']}, {'averaged' if weights == 'ema' and state['ema'] else 'raw'} weights, "
              f"{state['meta']['tokenizer']} tokens, {where}", file=sys.stderr)
        options = {k: config[k] for k in ('temperature', *(name for names in KINDS.values() for name in names)) if config[k] is not None}
        takes = inspect.signature(model.generate).parameters
        for option in sorted(options.keys() - takes.keys()):
            raise PrepareError(f"{view or state['objective']} has no use for --{option}: it takes {', '.join(k for k in config if k in takes)}")
        torch.manual_seed(seed)
        clock, evaluations, tokens = time.time(), 0, num_samples * (new + gaps)
        progress = Progress(tokens, len(given))
        for rows in [1] * num_samples if stream else [num_samples]:
            printer = Printer(show, progress)
            with amp:
                out = model.generate(prompt.expand(rows, -1), new, stop=stop_at, on_step=printer, **options, **{k: v.expand(rows, -1) for k, v in more.items()})
            for i, ids in enumerate(out.tolist()):
                printer.shown = printer.shown if i == 0 else 0
                printer.write(ids)
                print('\n---------------', flush=True)
            evaluations += printer.nfe
            progress.finished += rows * (new + gaps)
    except (PrepareError, models.UserError) as e:
        fail(str(e))
    seconds = time.time() - clock
    progress.clear()
    print(f"{tokens} tokens at most, {evaluations} network evaluations, {seconds:.1f} s, {tokens / seconds:,.0f} tokens/s", file=sys.stderr)

if __name__ == '__main__':
    try:
        main()
    except KeyboardInterrupt:
        print(file=sys.stderr)
        sys.exit(130)
