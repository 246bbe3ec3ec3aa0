"""
Write text with a trained model:
$ python sample.py --out_dir=out-shakespeare-char --start="ROMEO:" --num_samples=2
$ python sample.py --out_dir=out-shakespeare-char --start=FILE:prompt.txt --temperature=0.7 --top_p=0.95
Fill in gaps, given what stands on both sides, with a masked or block diffusion model:
$ python sample.py --out_dir=out-shakespeare-bd3lm --start="ROMEO:[[40]]and[[12]]my love." --max_new_tokens=0
Ask a model of questions, plans and executions; it writes the plan, then the execution, each up to its end:
$ python sample.py --out_dir=out-arithmetic --start="Ann has 7 figs. Bob has 5 more than Ann. Cid has 2 fewer than Bob. How many has Bob?"
[[40]] in --start is a gap of 40 tokens to fill in, \\[[ stands for [[ itself. The samples go to stdout as they come,
everything else to stderr.
"""

import errno
import inspect
import itertools
import os
import re
import sys
import time

import torch

import model as models
from configurator import configure, fail, print_anything, shown
from prepare import Layout, PrepareError, Tokenizer, data_folder, provider, read_text

# -----------------------------------------------------------------------------
out_dir = 'out' # the run's folder
ckpt = 'best' # best | latest | the path of a checkpoint
weights = 'ema' # ema (if the run averaged its weights) | raw
view: str | None = None # what else the weights can be read as: ar (of a run with clean_causal or ar_weight, or of df)
start = '' # the prompt, of a model of segments the question; FILE:prompt.txt reads it from a file
# '' is the begin id, or without one what the vocabulary has: a newline, else the end id, else its first character
num_samples = 3
max_new_tokens = 400 # behind the prompt; 0: only fill in its gaps; segments have lengths of their own
temperature = 0.8 # 1: as trained, below: more likely text, 0: always the likeliest token
top_k: int | None = None # draw from the k likeliest tokens only
top_p: float | None = None # draw from the fewest tokens whose probabilities add up to p
# how denoise, mdlm, bd3lm and df write; None: not given. A sampler refuses what it has no use for
sampler: str | None = None # first_hitting (their default, one token per network call) | ancestral | fixed | threshold | entropy_bound (several); of df: mixture | ddim | ddpm
steps: int | None = None # ancestral, fixed: reverse steps in all, split evenly over the blocks; None: one per new token. df: noise levels that a token passes
order: str | None = None # which hidden tokens come first, but for ancestral: random | confidence | entropy | margin | left_to_right; None: what measured best (config/README.md)
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

# the settings that generate is told as they are
OPTIONS = [name for name in models.OPTIONS if name not in ('max_new_tokens', 'stop')]
_MOST = 10_000_000 # tokens at once, and samples: what is more is a slip of the finger, or would not fit the memory

def check_sizes(config):
    """ a sentence for numbers that no machine has the memory or anybody the patience for """
    for name in 'num_samples', 'max_new_tokens':
        if config[name] > _MOST:
            raise PrepareError(f"{name} is {shown(config[name])}, expected at most {_MOST:,}")
    if config['num_samples'] < 1:
        raise PrepareError(f"num_samples is {shown(config['num_samples'])}, expected at least 1")
    if not 0 <= config['seed'] < 2 ** 64:
        raise PrepareError(f"seed is {shown(config['seed'])}, expected 0 or more and below 2 ** 64")

def checkpoint_path(out_dir, ckpt):
    """ the path of the checkpoint that the two settings name """
    path = os.path.expanduser(os.path.join(out_dir, f'ckpt_{ckpt}.pt') if ckpt in ('best', 'latest') else ckpt)
    if os.path.isdir(path):
        found = [name for name in sorted(os.listdir(path)) if name.endswith('.pt')]
        has = f"it has {', '.join(found)}" if found else "it has none"
        raise PrepareError(f"ckpt is the folder {path}, expected a checkpoint ({has}); "
                           "--out_dir= takes the folder of a run")
    return path

def objectives_of(state):
    """ the objectives that the provider.py of a checkpoint's dataset defines, {name: class} """
    dataset, objective = state['settings']['dataset'], state['objective']
    found = provider(dataset).get('OBJECTIVES', {})
    if objective not in models.OBJECTIVES | found:
        where = os.path.join(data_folder(dataset), 'provider.py')
        how = 'defines others' if os.path.exists(where) else 'is not there'
        raise PrepareError(f"the checkpoint has the objective {objective}, from the provider.py of its dataset, "
                           f"but {where} {how}: put it back, or run this where train.py was run")
    return found

def prompt_text(start):
    """ --start, or what is in the file that it names """
    if start == 'FILE:':
        raise PrepareError("--start=FILE: names no file, expected --start=FILE:prompt.txt")
    return read_text(start.removeprefix('FILE:')) if start.startswith('FILE:') else start

def first_token(tokenizer):
    """ the id that an empty prompt stands for: the first that texts have of a newline, the end id, any character """
    if tokenizer.meta['tokenizer'] != 'char' or '\n' in tokenizer.meta['chars']:
        return int(tokenizer.encode('\n')[0])
    return tokenizer.end_id if tokenizer.meta['text_size'] > tokenizer.end_id else 0

def encode_prompt(tokenizer, start):
    """ (1, T) token ids of the prompt, FILE: resolved; -1, so many times, where it has a gap like [[40]] """
    ids = []
    for i, piece in enumerate(re.split(r'(?<!\\)\[\[([0-9]+)\]\]', prompt_text(start))): # text, length of a gap, text, ...
        if i % 2 == 0:
            ids += list(tokenizer.encode(piece.replace('\\[[', '[[')))
            continue
        digits = piece.lstrip('0') or '0'
        n = int(digits) if len(digits) <= len(str(_MOST)) else _MOST + 1 # python reads no number of thousands of digits
        if n == 0:
            raise PrepareError(f"the prompt has a gap of no tokens, [[{piece}]]; if this is text, write \\[[{piece}]]")
        if len(ids) + n > _MOST:
            raise PrepareError(f"the prompt has a gap, [[{piece}]], with which it has more than {_MOST:,} tokens; "
                               f"if this is text, write \\[[{piece}]]")
        ids += [-1] * n
    return torch.tensor(ids, dtype=torch.long)[None]

def stop_id(tokenizer, stop):
    """ --stop as the id of a token, None as None """
    if stop is None:
        return None
    if stop == 'end':
        if tokenizer.meta['text_size'] <= tokenizer.end_id:
            raise PrepareError("stop is end, but the text of this model has no end id: give the text of one token")
        return tokenizer.end_id
    ids = tokenizer.encode(stop)
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

def out_of_memory(e):
    """ does an exception say that memory did not suffice? On a CPU torch says so in words only """
    return isinstance(e, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in str(e)

def read_question(state, model, tokenizer):
    """ --start for a model of segments: (idx (1, T), new tokens, what else generate is told, ids -> text to show) """
    if not start:
        raise PrepareError("this model answers questions: give one with --start=")
    if stop is not None:
        raise PrepareError("segments end at the end id: leave out --stop")
    layout = Layout(state['meta'], getattr(model, 'id_list', None))
    asked = layout.prompt([tokenizer.encode(prompt_text(start).strip())])
    new = asked.pop('max_new_tokens')
    asked = {name: torch.from_numpy(ids) for name, ids in asked.items()} | {'stop': tokenizer.end_id}
    return asked.pop('idx'), new, asked, lambda ids: labelled(layout, tokenizer, ids)

def read_prompt(model, tokenizer):
    """ --start for any other model: (idx (1, T), new tokens, what else generate is told, ids -> text to show) """
    if start or model.config.begin_id is not None:
        prompt = encode_prompt(tokenizer, start)
    else:
        prompt = torch.tensor([[first_token(tokenizer)]])
    given, end = set((prompt[0] != -1).nonzero()[:, 0].tolist()), stop_id(tokenizer, stop)
    if max_new_tokens < (prompt.size(1) == len(given)):
        raise PrepareError(f"max_new_tokens is {shown(max_new_tokens)}, expected at least 1, "
                           "or 0 and a gap like [[40]] in --start")
    return prompt, max_new_tokens, {'stop': end}, lambda ids: tokenizer.decode(until(ids, end, given))

def options_for(generate, config, given, name):
    """ {option: value} of those that this generate takes; a sentence where somebody gave another """
    takes = inspect.signature(generate).parameters
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in takes.values()):
        takes = {**takes, **dict.fromkeys(OPTIONS)}
    for option in OPTIONS:
        if option not in takes and option in given and config[option] is not None:
            others = ', '.join(k for k in config if k in takes)
            raise PrepareError(f"{name} has no use for --{option}: it takes {others}")
    return {option: config[option] for option in OPTIONS if option in takes and config[option] is not None}

def write(config, given):
    """ print what the settings ask for; given: those of them that somebody gave """
    check_sizes(config)
    where, amp, _ = models.pick_device(device, dtype)
    path = checkpoint_path(out_dir, ckpt)
    state = models.read_checkpoint(path)
    model, _ = models.load_checkpoint(state, where, weights, objectives_of(state), view)
    tokenizer, dataset = Tokenizer(state['meta']), state['settings']['dataset']
    if 'segments' in state['meta']:
        prompt, new, told, show = read_question(state, model, tokenizer)
    else:
        prompt, new, told, show = read_prompt(model, tokenizer)
    prompt, told = prompt.to(where), {k: v.to(where) if torch.is_tensor(v) else v for k, v in told.items()}
    gaps, length = int((prompt == -1).sum()), prompt.size(1) + new
    at_once = 1 if stream else num_samples
    if at_once * length > _MOST:
        raise PrepareError(f"{at_once:,} x {length:,} tokens at once are more than {_MOST:,}: ask for fewer"
                           + " or leave out --stream=False" * (not stream))
    print(f"loaded {path}: {state['objective']}{f' as {view}' if view else ''}, "
          f"{model.n_params() / 1e6:.2f}M parameters, iteration {state['iteration']} on {dataset}, "
          f"{'averaged' if weights == 'ema' and state['ema'] else 'raw'} weights, "
          f"{state['meta']['tokenizer']} tokens, {where}", file=sys.stderr)
    options = options_for(model.generate, config, given, view or state['objective'])
    torch.manual_seed(seed)
    clock, evaluations, tokens = time.time(), 0, num_samples * (new + gaps)
    progress = Progress(tokens, prompt.size(1) - gaps)
    for rows in itertools.repeat(1, num_samples) if stream else [num_samples]:
        printer = Printer(show, progress)
        many = {k: v.expand(rows, -1) if torch.is_tensor(v) else v for k, v in told.items()} # block_ids
        with amp:
            out = model.generate(prompt.expand(rows, -1), new, on_step=printer, **options, **many)
        for i, ids in enumerate(out.tolist()):
            printer.shown = printer.shown if i == 0 else 0
            printer.write(ids)
            print('\n---------------', flush=True)
        evaluations += printer.nfe
        progress.finished += rows * (new + gaps)
    seconds = max(time.time() - clock, 1e-9)
    progress.clear()
    print(f"{tokens} tokens at most, {evaluations} network evaluations, {seconds:.1f} s, "
          f"{tokens / seconds:,.0f} tokens/s", file=sys.stderr)

def main():
    print_anything()
    given = {}
    config = configure(globals(), given=given)
    try:
        write(config, given)
    except (PrepareError, models.UserError) as e:
        fail(str(e))
    except (MemoryError, RuntimeError) as e:
        if not out_of_memory(e):
            raise
        fail("out of memory: lower num_samples, max_new_tokens or steps, or leave out --stream=False")

if __name__ == '__main__':
    try:
        try:
            main()
        finally:
            print(end='', flush=True) # here, where it can be caught
    except BrokenPipeError: # whoever reads what we print, such as head, has enough
        os._exit(141) # as if by SIGPIPE, and at once: python would flush again, and complain
    except OSError as e:
        if e.errno != errno.ENOSPC:
            raise
        print(f"error: cannot write the samples: {e.strerror}", file=sys.stderr)
        os._exit(2) # for the same reason
    except KeyboardInterrupt:
        print(file=sys.stderr)
        sys.exit(130)
