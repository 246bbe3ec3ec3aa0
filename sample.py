"""
Write text with a trained model:
$ python sample.py --out_dir=out-shakespeare-char --start="ROMEO:" --num_samples=2
$ python sample.py --out_dir=out-shakespeare-char --start=FILE:prompt.txt --temperature=0.7 --top_p=0.95
Fill in gaps, given the text on both sides, with a model of masked or block diffusion:
$ python sample.py --out_dir=out-shakespeare-bd3lm --start="ROMEO:[[40]]and[[12]]my love." --max_new_tokens=0
Ask a model of questions, plans and executions. It writes the plan, then the execution, each up to its end:
$ python sample.py --out_dir=out-arithmetic \\
    --start="Ann has 7 figs. Bob has 5 more than Ann. Cid has 2 fewer than Bob. How many has Bob?"
[[40]] in --start is a gap of 40 tokens to fill in; \\[[ stands for the text [[. The samples go to stdout while they
are written, everything else goes to stderr.
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
view: str | None = None # read the weights as another model: ar (of df, or a run with clean_causal or ar_weight)
# start: '' is the begin id. A model without one begins with a newline, else the end id, else its first character
start = '' # the prompt; of a model of segments the question; FILE:prompt.txt reads it from a file
num_samples = 3
max_new_tokens = 400 # after the prompt; 0: only fill in its gaps. Segments have their own lengths
temperature = 0.8 # 1: as trained; below 1: more likely text; 0: always the likeliest token
top_k: int | None = None # draw from the k likeliest tokens only
top_p: float | None = None # draw from the fewest tokens whose probabilities add up to p
# How denoise, mdlm, bd3lm and df write. None: not given
# sampler: None is the one that reads the options below; without any of them first_hitting, one token per network call
sampler: str | None = None # first_hitting | ancestral | fixed | threshold | entropy_bound; of df: mixture | ddim | ddpm
# steps: None is one per new token; of df, as trained
steps: int | None = None # ancestral, fixed: reverse steps of all blocks together; df: noise levels per token
# order: None is what measured best (config/README.md). ancestral has no order but random
order: str | None = None # hidden tokens to write first: random | confidence | entropy | margin | left_to_right
schedule: str | None = None # ancestral, fixed: linear (the default) | cosine (few tokens per step first, many last)
confidence_threshold: float | None = None # threshold: write all tokens of a higher probability than this; None: 0.9
# entropy_budget: counts the entropies of the tokens that one call writes, without the largest of them
entropy_budget: float | None = None # entropy_bound: nats per network call; None: 0.1
# remask: the least probable tokens are hidden, after every step of a block but its last
remask: float | None = None # ancestral, fixed: share of the tokens written in a block to hide again
# df_...: which tokens become clean when; None is as trained
df_scheduling_matrix: str | None = None # df: pyramid | full_sequence | autoregressive | trapezoid
df_uncertainty_scale: float | None = None # df: steps that a token begins later than the one before it
guidance: float | None = None # overstates the effect of the prompt: 0 (off, the default) or more; doubles the cost
stop: str | None = None # end a sample at this token: end (the end id), or the text of one token
stream = True # samples one after another, each as it is written; False: all in one batch, faster, shown at the end
seed = 1337
device = 'auto' # auto (cuda, mps, cpu, whichever there is) | cuda | cuda:1 | mps | cpu
dtype = 'auto' # auto (bfloat16 on cuda that has it, else float32) | float32 | bfloat16 | float16
# -----------------------------------------------------------------------------

# settings that generate receives unchanged
OPTIONS = [name for name in models.OPTIONS if name not in ('max_new_tokens', 'stop')]
# Where several samplers read the given options, the first of these that does is taken. One token per network call is
# best (config/README.md). With 64 steps for 128 tokens, a judge has 2.96 nats per character for fixed and 3.03 for
# ancestral (+- 0.02) with mdlm, 3.35 and 3.73 with bd3lm of blocks of 4
MEASURED_BEST = 'first_hitting', 'threshold', 'entropy_bound', 'fixed', 'ancestral'
_MOST = 10_000_000 # samples, and tokens at once: more is a typing error, or does not fit into memory

def check_sizes(config):
    """ a sentence for numbers that need more memory than a machine has, or more time than anybody has """
    for name in 'num_samples', 'max_new_tokens':
        if config[name] > _MOST:
            raise PrepareError(f"{name} is {shown(config[name])}, expected at most {_MOST:,}")
    if config['num_samples'] < 1:
        raise PrepareError(f"num_samples is {shown(config['num_samples'])}, expected at least 1")
    if not 0 <= config['seed'] < 2 ** 64:
        raise PrepareError(f"seed is {shown(config['seed'])}, expected 0 or more and below 2 ** 64")

# -----------------------------------------------------------------------------
# the checkpoint

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
    """ objectives defined by the provider.py of the dataset that a checkpoint was trained on, {name: class} """
    dataset, objective = state['settings']['dataset'], state['objective']
    found = provider(dataset).get('OBJECTIVES', {})
    if objective not in models.OBJECTIVES | found:
        where = os.path.join(data_folder(dataset), 'provider.py')
        how = 'defines others' if os.path.exists(where) else 'is not there'
        raise PrepareError(f"the checkpoint has the objective {objective}, from the provider.py of its dataset, "
                           f"but {where} {how}: put it back, or run this where train.py was run")
    return found

def introduce(path, state, model, where):
    """ say on stderr which model was loaded """
    dataset = state['settings']['dataset']
    print(f"loaded {path}: {state['objective']}{f' as {view}' if view else ''}, "
          f"{model.n_params() / 1e6:.2f}M parameters, iteration {state['iteration']} on {dataset}, "
          f"{'averaged' if weights == 'ema' and state['ema'] else 'raw'} weights, "
          f"{state['meta']['tokenizer']} tokens, {where}", file=sys.stderr)

# -----------------------------------------------------------------------------
# the prompt

def prompt_text(start):
    """ the text of --start, or of the file that it names """
    if start == 'FILE:':
        raise PrepareError("--start=FILE: names no file, expected --start=FILE:prompt.txt")
    return read_text(start.removeprefix('FILE:')) if start.startswith('FILE:') else start

def first_token(tokenizer):
    """ the id that stands for an empty prompt: newline, else the end id, else the first character, as texts have it """
    if tokenizer.meta['tokenizer'] != 'char' or '\n' in tokenizer.meta['chars']:
        return int(tokenizer.encode('\n')[0])
    return tokenizer.end_id if tokenizer.meta['text_size'] > tokenizer.end_id else 0

def gap_length(digits, before):
    """ the length of the gap [[digits]] as a number, given `before` tokens of prompt; a sentence if it cannot be """
    plain, text = digits.lstrip('0') or '0', f"if this is text, write \\[[{digits}]]"
    n = int(plain) if len(plain) <= len(str(_MOST)) else _MOST + 1 # python cannot read thousands of digits
    if n == 0:
        raise PrepareError(f"the prompt has a gap of no tokens, [[{digits}]]; {text}")
    if before + n > _MOST:
        raise PrepareError(f"the prompt has a gap, [[{digits}]], with which it has more than {_MOST:,} tokens; {text}")
    return n

def encode_prompt(tokenizer, start):
    """ (1, T) token ids of the prompt, read from its file if it names one; a gap such as [[40]] becomes 40 times -1 """
    pieces = re.split(r'(?<!\\)\[\[([0-9]+)\]\]', prompt_text(start)) # text, digits of a gap, text, ...
    ids = []
    for i, piece in enumerate(pieces):
        if i % 2 == 0:
            ids += list(tokenizer.encode(piece.replace('\\[[', '[[')))
        else:
            ids += [-1] * gap_length(piece, len(ids))
    return torch.tensor(ids, dtype=torch.long)[None]

def stop_id(tokenizer, stop):
    """ the id of the token that --stop names, or None """
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

def read_question(state, model, tokenizer):
    """ --start for a model of segments: (idx (1, T), new tokens, other arguments of generate, ids -> text to show) """
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
    """ --start for any other model: (idx (1, T), new tokens, other arguments of generate, ids -> text to show) """
    if start or model.config.begin_id is not None:
        prompt = encode_prompt(tokenizer, start)
    else:
        prompt = torch.tensor([[first_token(tokenizer)]])
    given, end = set((prompt[0] != -1).nonzero()[:, 0].tolist()), stop_id(tokenizer, stop)
    has_gap = prompt.size(1) > len(given)
    if max_new_tokens < (0 if has_gap else 1):
        raise PrepareError(f"max_new_tokens is {shown(max_new_tokens)}, expected at least 1, "
                           "or 0 and a gap like [[40]] in --start")
    return prompt, max_new_tokens, {'stop': end}, lambda ids: tokenizer.decode(until(ids, end, given))

# -----------------------------------------------------------------------------
# the options

def options_for(generate, config, given, name):
    """ {option: value} of the options that this generate takes; a sentence if somebody gave another one """
    takes = inspect.signature(generate).parameters
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in takes.values()):
        takes = {**takes, **dict.fromkeys(OPTIONS)}
    for option in OPTIONS:
        if option not in takes and option in given and config[option] is not None:
            others = ', '.join(k for k in config if k in takes)
            raise PrepareError(f"{name} has no use for --{option}: it takes {others}")
    return {option: config[option] for option in OPTIONS if option in takes and config[option] is not None}

def asked_of_samplers(options, samplers):
    """ {option: value} of the options that some samplers read and others refuse """
    read = {option for reads in samplers.values() for option in reads}
    return {k: v for k, v in options.items() if k in read and v is not None and v != models.NEUTRAL.get(k)}

def listed(options):
    """ {'steps': 20, 'remask': 0.2} -> 'steps=20 and remask=0.2' """
    *most, last = [f'{name}={shown(value)}' for name, value in options.items()]
    return f"{', '.join(most)} and {last}" if most else last

def sampler_for(options, default, samplers=models.SAMPLERS):
    """
    The name of a sampler that reads all options, {name: value}. That is the default if it reads them, otherwise the
    sampler that measured best. Two kinds of options do not count: those that no sampler reads, and values that change
    nothing, such as remask=0. If no sampler reads all options, a sentence says which option belongs to which sampler.
    samplers: {name: options that it reads}.
    """
    asked = asked_of_samplers(options, samplers)
    fitting = [name for name, reads in samplers.items() if asked.keys() <= set(reads)]
    if not fitting:
        readers = {k: ' | '.join(name for name, reads in samplers.items() if k in reads) for k in asked}
        raise PrepareError(f"no sampler reads {listed(asked)} together: "
                           + ', '.join(f"{option} belongs to {names}" for option, names in readers.items())
                           + "; leave out what belongs to another sampler than the one you want")
    best_first = default, *MEASURED_BEST, *samplers # at the end: samplers of your own
    return next(name for name in best_first if name in fitting)

def with_sampler(generate, options):
    """ options, and the sampler that reads them if nobody named one; stderr says which one was picked, and why """
    parameter = inspect.signature(generate).parameters.get('sampler')
    if 'sampler' in options or parameter is None or parameter.default not in models.SAMPLERS:
        return options # a model without these samplers has its own meaning of steps
    default = parameter.default
    sampler = sampler_for(options, default)
    if sampler == default:
        return options
    asked = asked_of_samplers(options, models.SAMPLERS)
    because = {k: v for k, v in asked.items() if k not in models.SAMPLERS[default]}
    print(f"sampler={sampler}, because of {listed(because)}", file=sys.stderr)
    return options | {'sampler': sampler}

# -----------------------------------------------------------------------------
# the text

def until(ids, stop, given):
    """ a finished sample up to its first written stop token; tokens of the prompt, at positions `given`, all stay """
    end = next((i for i, token in enumerate(ids) if token == stop and i not in given), len(ids))
    return [token for i, token in enumerate(ids) if i < end or i in given]

def labelled(layout, tokenizer, row):
    """ the text of a row of segments as far as it is written: each segment after its name, without the question """
    parts = layout.parts(row)
    return '\n\n'.join(f'{name}:\n{tokenizer.decode(ids)}' for name, ids in list(parts.items())[1:])

class Progress:
    """
    How many of `total` tokens are written and how long the rest takes, on stderr: on a terminal one line that changes,
    elsewhere a line every 10 s. given: tokens of each prompt, which do not count.
    """
    def __init__(self, total, given):
        self.total, self.given, self.finished = total, given, 0
        self.live, self.shown = sys.stderr.isatty(), False
        self.begun = self.told = time.time()

    def __call__(self, idx):
        """ idx (B, n): settled tokens of the samples being written, prompts included, -1 elsewhere """
        now = time.time()
        if now - self.told < (0.5 if self.live else 10):
            return
        self.told, self.shown = now, self.live
        written = self.finished + int((idx != -1).sum()) - len(idx) * self.given
        left = (now - self.begun) * (self.total - written) / max(1, written)
        line = f"{written} of {self.total} tokens, {now - self.begun:.0f} s, {left:.0f} s left"
        print(f"\r{line}\033[K" if self.live else line, end='' if self.live else '\n', file=sys.stderr, flush=True)

    def clear(self):
        """ remove the line, so that text can take its place on the same terminal """
        if self.shown:
            print('\r\033[K', end='', file=sys.stderr, flush=True)
        self.shown = False

class Printer:
    """
    An on_step for generate that prints a single row as far as it is settled. Half a UTF-8 character is held back until
    its other half is there. show: ids of a row -> text.
    """
    def __init__(self, show, progress):
        self.show, self.progress = show, progress
        self.shown, self.nfe = 0, 0 # characters printed, network evaluations

    def __call__(self, step, idx, probs, state):
        self.nfe = state['nfe']
        if len(idx) == 1: # up to the first gap: these tokens never change again
            self.write(idx[0, :state['done']].tolist(), last=False)
        if not (self.shown and sys.stdout.isatty()): # text that appears on a terminal shows the progress itself
            self.progress(idx)

    def write(self, ids, last=True):
        text = self.show(ids)
        text = text if last else text.rstrip('\ufffd')
        if text[self.shown:]:
            self.progress.clear()
            print(text[self.shown:], end='', flush=True)
        self.shown = max(self.shown, len(text))

def write_samples(model, prompt, new, told, show):
    """ generate and print all samples; told: arguments of generate, tensors of them (1, T) like the prompt """
    gaps = int((prompt == -1).sum())
    tokens, clock, evaluations = num_samples * (new + gaps), time.time(), 0
    progress = Progress(tokens, prompt.size(1) - gaps)
    for rows in itertools.repeat(1, num_samples) if stream else [num_samples]:
        printer = Printer(show, progress)
        many = {k: v.expand(rows, -1) if torch.is_tensor(v) else v for k, v in told.items()}
        out = model.generate(prompt.expand(rows, -1), new, on_step=printer, **many)
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

# -----------------------------------------------------------------------------
# from the checkpoint to the text

def write(config, given):
    """ print what the settings ask for; given: names of the settings that somebody gave """
    check_sizes(config)
    where, amp, _ = models.pick_device(device, dtype)
    path = checkpoint_path(out_dir, ckpt)
    state = models.read_checkpoint(path)
    model, _ = models.load_checkpoint(state, where, weights, objectives_of(state), view)
    tokenizer = Tokenizer(state['meta'])
    if 'segments' in state['meta']:
        prompt, new, told, show = read_question(state, model, tokenizer)
    else:
        prompt, new, told, show = read_prompt(model, tokenizer)
    at_once, length = 1 if stream else num_samples, prompt.size(1) + new
    if at_once * length > _MOST:
        raise PrepareError(f"{at_once:,} x {length:,} tokens at once are more than {_MOST:,}: ask for fewer"
                           + " or leave out --stream=False" * (not stream))
    introduce(path, state, model, where)
    options = options_for(model.generate, config, given, view or state['objective'])
    told |= with_sampler(model.generate, options)
    told = {k: v.to(where) if torch.is_tensor(v) else v for k, v in told.items()}
    torch.manual_seed(seed)
    with amp:
        write_samples(model, prompt.to(where), new, told, show)

def out_of_memory(e):
    """ does this exception mean that memory ran out? On a CPU, torch says so only in the text of a RuntimeError """
    return isinstance(e, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in str(e)

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
            print(end='', flush=True) # here, where the exceptions of stdout can be caught
    except BrokenPipeError: # the reader of our output, such as head, has enough
        os._exit(141) # as if by SIGPIPE, and at once: python would flush again, and complain
    except OSError as e:
        if e.errno != errno.ENOSPC:
            raise
        print(f"error: cannot write the samples: {e.strerror}", file=sys.stderr)
        os._exit(2) # at once, for the same reason
    except KeyboardInterrupt:
        print(file=sys.stderr)
        sys.exit(130)
