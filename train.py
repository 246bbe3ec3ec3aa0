"""
Train any objective on any prepared dataset, on one device or, under torchrun, on many:
$ python train.py config/train_shakespeare_char.py --objective=ar
$ python train.py --out_dir=out-shakespeare-char --init_from=resume
$ torchrun --standalone --nproc_per_node=4 train.py config/train_shakespeare_char.py --gradient_accumulation_steps=4
Everything a run is lands in out_dir: settings.json, log.csv, ckpt_latest.pt, ckpt_best.pt, results.json.
Ctrl-C (or SIGTERM) finishes the iteration, saves and leaves.
"""

import atexit
import contextlib
import csv
import fcntl
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
import warnings
from dataclasses import asdict, fields
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel as DDP

import configurator
import model as models
from configurator import configure
from model import UserError, check
from prepare import Layout, PrepareError, ensure, open_corpus, provider, replacing

# -----------------------------------------------------------------------------
# the run
out_dir = 'out' # the run's folder; a second run never overwrites it
init_from = 'scratch' # scratch | resume (the run in out_dir, under its own settings) | weights: a checkpoint of ours or nanoGPT's, a GPT-2 of Hugging Face
ckpt = 'latest' # where to resume: latest | best | the path of a checkpoint
eval_only = False # evaluate the run in out_dir, write results.json, leave
seed = 1337 # of initialisation, data order, corruption and dropout
# data
dataset = 'shakespeare_char' # a name under data/, or the path of a prepared folder
batch_size = 16 # rows per micro-step
gradient_accumulation_steps = 1 # micro-steps per iteration, over all processes
skip = '' # segments to do without: plan makes question -> execution
begin = True # ar reads a begin id first, so every token of a row is scored; False: nanoGPT's windows
# model
objective = 'ar' # a row of OBJECTIVES in model.py, or of the dataset's provider.py
block_size = 128 # tokens of context; 0: of a dataset with segments, what they add up to
n_layer = 4
n_head = 4
n_embd = 128
dropout = 0.0 # for small data, many epochs: 0.2
bias = False # in linear layers and in layernorm
pos = 'rope' # rope | learned
norm = 'layernorm' # layernorm | rmsnorm (ar on tiny shakespeare: 1.519 | 1.518 nats/char; layernorm's CPU kernel is fused)
mlp = 'swiglu' # swiglu | gelu (ar after 500 iterations: 1.631 | 1.674) | gelu_tanh
qk_norm = True # layernorm on queries and keys (ar after 500 iterations with | without: 1.631 | 1.715, mdlm 2.30 | 2.70)
tie_weights = False # one matrix for embedding and head (after 500 iterations with | without: ar 1.667 | 1.631, mdlm 2.24 | 2.30, after 1,500 2.04 | 2.05)
init = 'zero' # zero | gpt2: how output projections start
attention: str | None = None # causal | full | block | hierarchical; None: hierarchical where data has segments and the objective knows it, else the objective's default
diffusion_block_size = 16 # tokens per block; block_size is the whole context. 0: segments of a hierarchy stay whole
segments = '' # lengths of a hierarchy on plain text, the question first: 32,32,64; other datasets bring their own
causal_within_block = False # plan and execution see no later tokens of their own block
curriculum = 0.0 # share of the iterations in which segments join the loss one by one: 0.3 is the plan's loss alone for that long
t_min = 0.0 # noise levels that training draws; bounds always use all of (0, 1]
t_max = 1.0
t_dist = 'uniform' # uniform | bell: another weighting of the same losses, 0.06 nats/char better for mdlm and bd3lm on tiny shakespeare
single_ratio_per_sequence = True # False: a noise level per token, no bound
clean_causal = False # bd3lm: the clean stream is a GPT, so one run answers as bd3lm and as ar
ar_weight = 0.0 # weight of a next-token loss: bd3lm's on the clean_causal stream, mdlm's on half of the rows
df_timesteps = 32 # noise levels of training
df_sampling_timesteps = 4 # noise levels that a token passes when it is written
df_sampler = 'auto' # mixture | ddpm | ddim. auto: mixture for pred_token, else ddpm, or ddim where sampling leaves levels out
df_objective = 'pred_token' # what the network predicts: pred_token, by cross-entropy; as published, by squared error, pred_noise | pred_x0 | pred_v
df_embed_norm = 4.0 # pred_token: length of every embedding, so that a noise level means the same whatever n_embd is
df_clean_share = 0.5 # pred_token, causal attention: share of the training rows in which all that a token sees is clean, as in ar. 0.5 | 0.75 on tiny shakespeare: 1.568 | 1.541 nats/char behind clean text, 2.41 | 2.49 along a pyramid; ar 1.520
df_beta_schedule = 'cosine' # linear | cosine | sigmoid
df_loss_weight = 'fused' # of squared errors: fused | min_snr | uniform
df_snr_clip = 5.0 # signal-to-noise ratios above it weigh no more
df_cum_snr_decay = 0.95 # of the average over earlier tokens in fused weights, per token
df_clip_noise = 5.0 # of squared errors: noise is clamped to +- this
df_ddim_eta = 0.0 # share of fresh noise in a DDIM step: 0 none, 1 as much as DDPM
df_stabilization_level = 1 # finished tokens are read as if at this level, 1 the least noisy
df_scheduling_matrix = 'autoregressive' # pyramid | full_sequence | autoregressive | trapezoid: how the tokens of a chunk become clean. An ar run's nll of the text: 1.67 nats/char, of pyramids of 2 | 4 | 32 levels 1.95 | 2.51 | 4.20
df_uncertainty_scale = 1.0 # steps a token begins later than the one before it; 0: all at once
df_chunk_size: int | None = None # tokens denoised together; 0: all that are asked for. None: half of the context
df_x0_wpe = False # add positions to the embeddings that get noisy, instead of in the network; needs pos='learned'
df_level_embed = 'add' # of squared errors: add | concat (and an MLP): how the network reads noise levels
attn_backend = 'auto' # auto | sdpa | flex
grad_checkpointing = False # less memory, about a third more time
# optimizer
optimizer = 'muon' # muon (attention and MLP matrices; AdamW for the rest) | adamw (ar on tiny shakespeare, 500 iterations: 1.631 | 1.908 nats/char, mdlm 2.30 | 2.70)
learning_rate = 4e-3 # peak, of AdamW
muon_learning_rate = 0.02 # peak, of Muon
weight_decay = 0.1 # of 2-D parameters
beta1 = 0.9
beta2 = 0.99
grad_clip = 1.0 # on the norm of all gradients; 0: off
ema = 0.0 # decay of the averaged weights, reached as min(ema, (1+n)/(10+n)); 0: off (0.995 is no better where the rate falls to 0: ar 1.632 | 1.631)
# schedule
max_iters = 1500
max_epochs = 0.0 # if set, it decides max_iters; an epoch is as many tokens as the train split has
warmup_iters = 100
decay = 'linear' # linear | cosine | constant, after the warm-up
decay_iters = 0 # iterations after which the decay is over; 0: max_iters
final_lr = 0.0 # share of the peak that is left then
# evaluation and log
log_interval = 10 # iterations between lines
eval_interval = 250 # iterations between evaluations
eval_iters = 20 # batches of random windows per split and evaluation, always the same ones
bound_samples = 4 # corruptions per text where the likelihood is a Monte Carlo bound
scoreboard_windows = -1 # at the end, score so many non-overlapping windows of val; -1: all, 0: no scoreboard
wandb_log = False # Weights & Biases, if installed
wandb_project = 'text-diffusion'
wandb_tags = '' # comma-separated
# checkpoints
ckpt_interval = 0 # iterations between checkpoints; 0: at every evaluation
ckpt_epochs = 0.0 # epochs between checkpoints; if set, it decides ckpt_interval
cleanup_checkpoints = True # keep latest and best only; False: also every ckpt_NNNNNN.pt
# device
device = 'auto' # auto (cuda, mps, cpu, whichever there is) | cuda | cuda:1 | mps | cpu
dtype = 'auto' # auto (bfloat16 on cuda that has it, else float32) | float32 | bfloat16 | float16
compile: bool | None = None # torch.compile; None: on cuda only, because on a cpu it takes minutes
# -----------------------------------------------------------------------------
configurator.print_anything()
given = {} # which settings the command line and its config files name, and where
config = configure(globals(), given=given)

rank, world, local_rank = (int(os.environ.get(k, d)) for k, d in (('RANK', 0), ('WORLD_SIZE', 1), ('LOCAL_RANK', 0)))
master = rank == 0

def fail(sentence):
    sys.exit(2) if not master else configurator.fail(str(sentence))

stop_asked = False # by a signal, or because nobody reads on

def say(*words, sep=' '):
    global stop_asked
    if not master:
        return
    try:
        print(*words, sep=sep, flush=True)
    except BrokenPipeError: # as in `train.py | head`: save and leave, in silence
        stop_asked = True
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())

def first_line(e):
    """ what an exception says, without the pages that follow """
    return next((line.strip()[:200] for line in str(e).splitlines() if line.strip()), '')

def fail_for_memory(e, *more):
    """ a sentence where an exception says that memory did not suffice, on whichever rank; others go on as they are """
    said = isinstance(e, (MemoryError, torch.OutOfMemoryError)) or any(
        words in str(e) for words in ("can't allocate memory", 'Storage size calculation overflowed'))
    if not said:
        raise e
    configurator.fail('; '.join([
        f"out of memory on {where} at batch_size={batch_size}, block_size={config['block_size']}: lower batch_size and "
        "raise gradient_accumulation_steps by the same factor, or set grad_checkpointing=True", *more]))

# ---- the run folder

def inside(name):
    return os.path.join(os.path.expanduser(out_dir), name)

def write_atomically(path, write):
    """ write(file) into a temporary file, then rename: a reader sees the old file or the new one, never half of one """
    try:
        with replacing(path) as (temporary,), open(temporary, 'wb') as f:
            write(f)
    except (PrepareError, RuntimeError) as e:
        if isinstance(e, RuntimeError) and 'PytorchStreamWriter' not in str(e) and 'inline_container' not in str(e):
            raise
        problem = str(e) if isinstance(e, PrepareError) else f"cannot write {path}, is the disk full?" # torch.save's news
        fail(f"{problem}; what was saved before is untouched. Free some space or choose another --out_dir")

def write_json(name, content):
    write_atomically(inside(name), lambda f: f.write(json.dumps(content, indent=2).encode() + b'\n'))

def results_in_folder():
    """ names of what a run left in out_dir and only its continuation may overwrite """
    folder = inside('')
    names = sorted(os.listdir(folder)) if os.path.isdir(folder) else []
    return [name for name in names if name in ('settings.json', 'log.csv', 'results.json') or name.endswith('.pt')]

def claim_folder():
    """ the run folder belongs to this process until it ends, however it ends; returns what keeps it so, a file """
    try:
        os.makedirs(inside(''), exist_ok=True)
        folder = os.open(inside(''), os.O_RDONLY)
    except OSError as e:
        fail(f"cannot create the run folder {out_dir}: {e.strerror}; choose another --out_dir")
    try:
        fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        fail(f"another process is training into {out_dir}: wait until it is done, or choose another --out_dir")
    except OSError: # a file system without locks: go on, as everybody did before there were locks
        pass
    return folder

def read_settings():
    """ what settings.json of the run in out_dir says """
    try:
        with open(inside('settings.json')) as f:
            saved = json.load(f)
    except (OSError, ValueError) as e:
        fail(f"there is no run to resume in {out_dir}: {inside('settings.json')} cannot be read ({e})")
    if not isinstance(saved, dict) or 'init_from' not in saved:
        fail(f"there is no run to resume in {out_dir}: {inside('settings.json')} is not what a run writes there")
    return saved

resume, origin, saved = init_from == 'resume' or eval_only, init_from, {} # origin: what the first weights are
if resume: # the run's own settings, then what this command line says
    saved = read_settings()
    origin = saved['init_from']
    own = {k: v for k, v in saved.items() if k in config and k not in ('out_dir', 'init_from', 'ckpt', 'eval_only')}
    config = configure(globals(), saved=own, given=given)
    claimed = claim_folder() if master and not eval_only else None # before anything is read that another may replace
    if ckpt == 'latest' and not eval_only and not os.path.exists(inside('ckpt_latest.pt')):
        left = [name for name in results_in_folder() if name not in ('settings.json', 'log.csv')]
        if left:
            best = 'ckpt_best.pt' in left
            fail(f"{out_dir} has no ckpt_latest.pt, but {', '.join(left)}, which a new beginning would overwrite: "
                 f"go on with --ckpt={'best' if best else 'PATH'}, or start anew in another --out_dir")
        say(f"nothing was saved in {out_dir} yet: beginning at iteration 0") # killed before its first checkpoint
        resume = False
elif results_in_folder():
    fail(f"{out_dir} already holds a run ({', '.join(results_in_folder())}): go on with it by --init_from=resume, "
         "or choose another --out_dir")

# ---- device

if world > 1:
    dist.init_process_group('nccl' if torch.cuda.is_available() and device != 'cpu' else 'gloo')
try:
    own_gpu = world > 1 and dist.get_backend() == 'nccl'
    where, amp, precision = models.pick_device(f'cuda:{local_rank}' if own_gpu else device, dtype)
except UserError as e:
    fail(e)
if where.type == 'cuda':
    torch.cuda.set_device(where)
torch.set_float32_matmul_precision('high') # tf32 where there is such a thing
scaler = torch.amp.GradScaler(where.type, enabled=precision == 'float16')
compiles = where.type == 'cuda' if compile is None else compile
# bf16 FLOP/s that the makers promise, dense
peak_flops = next((flops for name, flops in {'H100': 989e12, 'H200': 989e12, 'A100': 312e12, 'L40S': 362e12, 'L4': 121e12,
                                             '4090': 165e12, '3090': 71e12, 'V100': 125e12, 'T4': 65e12}.items()
                   if where.type == 'cuda' and name in torch.cuda.get_device_name(where)), None)

shared = torch.zeros((), device=where)
held_by_us = sys.getrefcount(shared) # what holds it besides is gloo's

def sum_over_processes(value):
    """ a number or a tensor () -> its sum, a tensor () if there are several processes; all sums go by the one tensor that let_go waits for """
    if world == 1:
        return value
    dist.all_reduce(shared.fill_(value))
    return shared.clone()

def let_go():
    """
    The last act of one process of several: gloo's thread holds the summed tensor a little longer than the sum takes, needs python's
    lock to drop it, and aborts the process if python is being torn down by then (torch 2.13). At most 1 s, for a thread that hangs.
    """
    until = time.time() + 1
    while sys.getrefcount(shared) > held_by_us and time.time() < until:
        time.sleep(0.001) # without the lock

if world > 1:
    atexit.register(let_go)

def to_device(batch):
    return {k: torch.from_numpy(v).to(where, non_blocking=True) for k, v in batch.items()}

# ---- data and model

LIMITS = [ # settings, the least that makes sense, and what they must stay below; models check their own fields
    ('batch_size gradient_accumulation_steps n_layer n_head n_embd max_iters eval_iters log_interval eval_interval '
     'bound_samples', 1, math.inf),
    ('block_size diffusion_block_size learning_rate muon_learning_rate weight_decay grad_clip max_epochs warmup_iters '
     'decay_iters final_lr ckpt_interval ckpt_epochs', 0, math.inf),
    ('dropout beta1 beta2 ema', 0, 1), ('scoreboard_windows', -1, math.inf), ('seed', 0, 2 ** 64)]

def check_settings():
    for names, least, below in LIMITS:
        for name in names.split():
            expected = f"{least} or more{f' and below {below}' if below != math.inf else ''}"
            check(least <= config[name] < below, f"{name} is {config[name]}, expected {expected}")
    check(0 <= curriculum <= 1, f"curriculum is {curriculum}, expected a share of the iterations, 0 to 1")
    check(decay in ('linear', 'cosine', 'constant'), f"decay is {decay!r}, expected linear, cosine or constant")
    check(gradient_accumulation_steps % world == 0,
          f"gradient_accumulation_steps {gradient_accumulation_steps} is not a multiple of the {world} processes")
    check(attn_backend != 'flex' or where.type == 'cuda',
          f"attn_backend=flex trains on cuda only: FlexAttention has no backward pass on {where}")

def take_architecture(architecture, text):
    """ weights bring their architecture along, into config, and must read the tokens that the dataset has """
    fixed = models.ARCHITECTURE + models.DF_ARCHITECTURE
    brought = {k: v for k, v in architecture.items() if k in fixed and v != config[k]}
    for k in brought:
        check(k not in given, f"{k} is {config[k]} {given.get(k)}, but the weights of {origin} have {k}={brought[k]}: "
                              f"leave {k} out, or start from scratch")
    config.update(brought)
    say(f"weights of {origin}", *(f"{k}={v}" for k, v in brought.items()), sep=', ')
    for k, v in text.items():
        check(corpus.meta.get(k) == v, f"the weights of {origin} read other tokens than {dataset} has: "
                                       f"{k} is {v!r} there, {corpus.meta.get(k)!r} here")

def build_model(kind):
    """ the model of config for the text of corpus, on its device """
    text = {k: corpus.meta[k] for k in ('vocab_size', 'text_size', 'mask_id')}
    text |= {'begin_id': corpus.meta['begin_id'] if begin else None,
             'segments': corpus.meta.get('segments', segments), 'diffusion_block_size': diffusion_block_size or None}
    known = config | text
    return kind(models.GPTConfig(**{f.name: known[f.name] for f in fields(models.GPTConfig) if f.name in known})).to(where)

def fit_segments():
    """ rows of segments are laid out as the model wants them """
    check(not segments, f"segments is {segments!r}, but {dataset} has its own, {corpus.meta['segments']}: prepare other lengths")
    views = ', '.join(raw_model.views())
    check(not views, f"rows of segments cannot be read as {views}, as this model would be: leave out ar_weight and "
                     "clean_causal, or take --objective=ar, mdlm or bd3lm")
    corpus.layout = Layout(corpus.meta, getattr(raw_model, 'id_list', None))

def try_a_batch():
    """ what is wrong with the rows, or too large for the memory, is better said now, before there is a run folder """
    next(corpus.windows('val', 1, raw_model.row_length))
    raw_model.eval()
    with torch.no_grad(), amp:
        raw_model(**to_device(corpus.batch('train', batch_size, raw_model.row_length, np.random.default_rng(seed))))
    raw_model.train()

micro_steps = gradient_accumulation_steps // world
try:
    check_settings()
    if master:
        ensure(dataset)
    if world > 1:
        dist.barrier()
    corpus, config['block_size'] = open_corpus(dataset, block_size, skip)
    check(not curriculum or 'segments' in corpus.meta,
          f"curriculum={curriculum} lets segments join the loss one by one, and {dataset} is plain text, which has none")
    objectives = models.OBJECTIVES | provider(dataset).get('OBJECTIVES', {})
    check(objective in objectives, f"objective is {objective!r}, expected one of {', '.join(objectives)}; "
                                   f"others come from a provider.py in the folder of {dataset}")
    torch.manual_seed(seed)
    weights = None
    if origin != 'scratch' and not resume:
        architecture, weights, text = models.read_pretrained(os.path.expanduser(origin))
        take_architecture(architecture, text)
    raw_model = build_model(objectives[objective])
    if 'segments' in corpus.meta:
        fit_segments()
    if weights:
        raw_model.load_pretrained(weights)
    try_a_batch()
    optimizers = raw_model.configure_optimizers(optimizer, learning_rate, muon_learning_rate, weight_decay, (beta1, beta2))
except (PrepareError, UserError) as e:
    fail(e)
except (MemoryError, RuntimeError) as e:
    fail_for_memory(e)
tokens_per_iter = gradient_accumulation_steps * batch_size * raw_model.config.block_size
tokens_per_epoch = corpus.tokens('train')
for group in (group for opt in optimizers for group in opt.param_groups):
    group['peak_lr'] = group['lr']

# ---- where the run stands

iteration, tokens, best = 0, 0, math.inf # tokens: seen in training, of batches as they were
if resume:
    path = inside(f'ckpt_{ckpt}.pt') if ckpt in ('latest', 'best') else os.path.expanduser(ckpt)
    try:
        state = models.read_checkpoint(path)
    except UserError as e:
        fail(e)
    free = ('dropout', 'attn_backend', 'grad_checkpointing', 't_min', 't_max', 't_dist', 'ar_weight', 'df_clean_share', # of training and, the others,
            'df_sampling_timesteps', 'df_sampler', 'df_ddim_eta', 'df_scheduling_matrix', 'df_uncertainty_scale', 'df_chunk_size') # of writing, not of the weights
    ours, theirs = asdict(raw_model.config), state['config']
    differ = ['objective'] if state['objective'] != objective else []
    differ += [k for k in ours | theirs if k not in free and ours.get(k) != theirs.get(k)] # a field that only they have is another version's
    differ += [k for k in ('tokenizer', 'chars') if state['meta'].get(k) != corpus.meta.get(k)] # the same ids, other letters
    if differ:
        fail(f"{path} is another model: it differs in {', '.join(differ)}; "
             f"resume with the run's own settings, or start anew in another --out_dir")
    if len(optimizers) != len(state['optimizers']):
        fail(f"{path} was trained with another optimizer than {optimizer}: leave --optimizer as it was, or start anew with --init_from={path}")
    raw_model.load_state_dict(state['model'])
    for opt, moments in zip(optimizers, state['optimizers']): # rates and decay are this command line's
        opt.load_state_dict({'state': moments['state'], 'param_groups': opt.state_dict()['param_groups']})
    if state['scaler']: # a run in float16 until now
        scaler.load_state_dict(state['scaler'])
    iteration, best = state['iteration'], state['best']
    was = state['settings'] # a checkpoint from before tokens were counted had one batch size throughout
    tokens = state.get('tokens', iteration * was['gradient_accumulation_steps'] * was['batch_size'] * ours['block_size'])

n_iters = max_iters
if max_epochs > 0:
    n_iters = iteration + max(0, math.ceil((max_epochs * tokens_per_epoch - tokens) / tokens_per_iter))
save_interval = ckpt_interval or eval_interval
if ckpt_epochs > 0:
    save_interval = max(1, round(ckpt_epochs * tokens_per_epoch / tokens_per_iter))
if resume:
    if iteration > n_iters and not eval_only:
        fail(f"{path} is at iteration {iteration}, beyond max_iters {n_iters}: raise --max_iters, or evaluate it with --eval_only=True")
    say(f"resumed {path}: iteration {iteration}, best {raw_model.measured} {best:.4f}")

averages = ema > 0 and not (eval_only and not state['ema']) # a finished run that kept none gets none
averaged = state['ema'] if resume and state['ema'] else raw_model.state_dict()
ema_weights = {k: v.detach().clone().to(where) for k, v in averaged.items()} if averages else None
say(f"{objective} on {dataset}: {raw_model.n_params() / 1e6:.2f}M parameters, attention {raw_model.config.attention}, "
    f"{tokens_per_iter:,} tokens per iteration, {n_iters:,} iterations = "
    f"{(tokens + (n_iters - iteration) * tokens_per_iter) / tokens_per_epoch:.2f} epochs, "
    f"{where} {precision}{f' x {world}' if world > 1 else ''}")

compile_errors = () # exceptions after which a run goes on without torch.compile

def start_compiling():
    """ in place, so that names stay and checkpoints do not care; the work is done when the first batch comes """
    global compile_errors
    try:
        from torch._dynamo.exc import TorchDynamoException
        if where.type == 'cpu':
            from torch._inductor.cpp_builder import get_cpp_compiler
            get_cpp_compiler()
    except Exception as e: # whatever is missing: compiling is an optimisation
        return stop_compiling(e)
    compile_errors = (TorchDynamoException,)
    raw_model.compile()

def stop_compiling(e):
    raw_model._compiled_call_impl = None # what raw_model.compile() sets
    say(f"torch.compile cannot work here ({type(e).__name__}: {first_line(e)}); going on without it")

if compiles and not eval_only:
    start_compiling()
# ranks seed and evaluate by themselves, so there is nothing to broadcast; torch 2.13 has another name for that, 2.9 knows this one only
warnings.filterwarnings('ignore', '`broadcast_buffers` is deprecated')
network = DDP(raw_model, device_ids=[local_rank] if where.type == 'cuda' else None, broadcast_buffers=False) if world > 1 else raw_model

def reseed(*numbers):
    """ everything random after this depends on seed and numbers alone, so a resumed run and any split over processes repeat it """
    torch.manual_seed(int(np.random.SeedSequence((seed, *numbers)).generate_state(1)[0]))
    return np.random.default_rng((seed, *numbers))

# ---- evaluation

@contextlib.contextmanager
def evaluating(weights):
    """ eval mode, with the averaged weights in place of the raw ones where weights is 'ema' """
    if weights == 'ema':
        raw = {k: v.clone() for k, v in raw_model.state_dict().items()}
        raw_model.load_state_dict(ema_weights)
    raw_model.eval()
    try:
        with torch.no_grad(), amp:
            yield
    finally:
        if weights == 'ema':
            raw_model.load_state_dict(raw)
        raw_model.train()

def readings():
    """ raw and averaged weights, and whatever else they can be read as: ('raw' or 'ema', '' or '_as_NAME', model) """
    for weights in ['raw'] + ['ema'] * (ema_weights is not None):
        with evaluating(weights):
            for name, model in ({'': raw_model} | raw_model.views()).items():
                yield weights, f'_as_{name}' if name else '', model

def random_windows(model, split):
    """ nanoGPT's protocol: the mean over eval_iters batches of random windows, the same ones at every call """
    batches = (to_device(corpus.batch(split, batch_size, model.row_length, reseed(2 ** 31, ('train', 'val').index(split), i)))
               for i in range(eval_iters))
    return models.score(model, batches)['nats_per_token']

def every_window(model):
    """ the scoreboard: every non-overlapping window of the validation split, nothing from outside the window as context """
    there, shown = corpus.n_windows('val', model.row_length), time.time()
    total = min(there, scoreboard_windows) if scoreboard_windows > 0 else there
    for i, batch in enumerate(corpus.windows('val', batch_size, model.row_length, total)):
        reseed(2 ** 31 + 1, i)
        if time.time() - shown > 10:
            shown = time.time()
            say(f"scoreboard: {i * batch_size:,} of {total:,} windows")
        yield to_device(batch)

def evaluate():
    """ {'train_nll': ..., 'val_nll': ..., 'val_nll_ema': ...} and the objective's own metrics """
    row = {}
    for weights, view, model in readings():
        row |= {f"{split}_{model.measured}{view}{'_ema' * (weights == 'ema')}": random_windows(model, split) for split in ('train', 'val')}
        if weights == 'raw' and model is raw_model:
            row |= model.metrics(**to_device(corpus.batch('val', batch_size, model.row_length, reseed(2 ** 31 + 2))))
    return row

def write_results():
    results = {'objective': objective, 'dataset': dataset, 'iteration': iteration, 'parameters': raw_model.n_params(),
               'train_tokens_seen': tokens, 'device': str(where), 'dtype': precision, 'weights': {}}
    for weights, view, model in readings():
        board, windows = models.score(model, every_window(model), bound_samples), random_windows(model, 'val')
        board['protocol'] = f"non-overlapping windows of {model.row_length} tokens of val, {corpus.n_windows('val', model.row_length):,} in all"
        results['weights'][weights + view] = {'scoreboard': board, 'random_windows': windows}
        say(f"{weights} weights{view.replace('_', ' ')}, {board['windows']:,} {board['protocol']}:\n  {board['name']} {board['sign']} "
            f"{board['nats_per_token']:.4f} {board['unit']} (+- {board['stderr_monte_carlo']:.4f} Monte Carlo, "
            f"+- {board['stderr_windows']:.4f} windows){', perplexity %.5g' % board['perplexity'] if board['perplexity'] else ''}; "
            f"by nanoGPT's random windows {windows:.4f}")
    write_json('results.json', results)

def finish():
    """ the last words of a run; who cannot wait for them loses nothing else """
    try:
        say("now the scoreboard; Ctrl-C leaves it out")
        write_results()
    except KeyboardInterrupt:
        say(f"asked to stop: {inside('results.json')} is as it was; python train.py --out_dir={out_dir} --eval_only=True writes it")
        sys.exit(130)
    except (PrepareError, UserError) as e:
        fail(e)

if eval_only:
    if master:
        finish()
    if world > 1:
        dist.destroy_process_group()
    sys.exit()

# ---- the run remembers itself

def commit():
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        git = ['git', '-C', os.path.dirname(os.path.abspath(__file__)), 'rev-parse', 'HEAD']
        return subprocess.check_output(git, stderr=subprocess.DEVNULL, text=True).strip()

def start_wandb():
    """ a run of Weights & Biases, the same one after a resume; None if it is off """
    if not (wandb_log and master):
        return None
    try:
        import wandb
    except ImportError:
        fail("wandb_log=True needs Weights & Biases: pip install wandb, or leave it off; log.csv has the same numbers")
    try:
        return wandb.init(project=wandb_project, name=out_dir, config=config, id=saved.get('wandb_id'), resume='allow',
                          tags=wandb_tags.split(',') if wandb_tags else None)
    except Exception as e: # no account, no network, a wrong mode: its kinds of exception are many, the news is one
        fail(f"Weights & Biases does not start ({type(e).__name__}: {first_line(e)}): try wandb login, or "
             "leave wandb_log off; log.csv has the same numbers")

def set_aside_what_came_later():
    """ going on from an older checkpoint is another run from there: what the folder has of the later iterations gets names of its own """
    latest = inside('ckpt_latest.pt')
    later = models.read_checkpoint(latest)['iteration'] if os.path.exists(latest) else 0
    if later <= iteration:
        return
    kept = []
    for name in ('ckpt_latest.pt', 'log.csv', 'results.json'):
        stem, ending = name.replace('_latest', '').split('.')
        if os.path.exists(inside(name)) and not os.path.exists(inside(f'{stem}_{later:06d}.{ending}')):
            shutil.copyfile(inside(name), inside(f'{stem}_{later:06d}.{ending}'))
            kept.append(f'{stem}_{later:06d}.{ending}')
    say(f"what the run had at iteration {later} is kept as {', '.join(kept)}")

def best_so_far():
    """ the best evaluation that the state or ckpt_best.pt knows of: a checkpoint is replaced by a better one only """
    if not os.path.exists(inside('ckpt_best.pt')):
        return best
    return min(best, models.read_checkpoint(inside('ckpt_best.pt'))['best'])

wandb_run = start_wandb() # what can fail does so before there is a folder
log_rows, log_columns = [], []
if master:
    if resume:
        set_aside_what_came_later()
        best = best_so_far()
    else:
        began_again = saved != {} # the folder is claimed already
        claimed = claimed if began_again else claim_folder()
        if results_in_folder() and not began_again: # another process was faster
            fail(f"{out_dir} already holds a run: go on with it by --init_from=resume, or choose another --out_dir")
    remembered = config | {'init_from': origin, 'eval_only': False, 'commit': commit(), 'torch': torch.__version__}
    write_json('settings.json', remembered | ({'wandb_id': wandb_run.id} if wandb_run else {}))
    if resume and os.path.exists(inside('log.csv')): # what the checkpoint does not know of happens again
        with open(inside('log.csv'), newline='') as f:
            rows = [row for row in csv.DictReader(f) if (row.get('iteration') or '').isdigit()]
        log_rows = [row for row in rows if int(row['iteration']) <= iteration]

def log(row):
    """ one more line of log.csv; the whole file again where a column is new, or the first time after a resume """
    log_rows.append({k: repr(v) if isinstance(v, float) else v for k, v in row.items()})
    whole = not row.keys() <= set(log_columns)
    if whole:
        log_columns[:] = dict.fromkeys(k for r in log_rows for k in r)
    table = [log_columns] * whole + [[r.get(k, '') for k in log_columns] for r in (log_rows if whole else log_rows[-1:])]
    text = ''.join(','.join(map(str, line)) + '\n' for line in table).encode()
    if whole:
        write_atomically(inside('log.csv'), lambda f: f.write(text))
    else:
        try:
            with open(inside('log.csv'), 'ab') as f:
                f.write(text)
        except OSError as e:
            fail(f"cannot write {inside('log.csv')}: {e.strerror}; {how_to_go_on()}")

def how_to_go_on():
    """ what a run that ends early says """
    return f"go on from the last checkpoint with --out_dir={out_dir} --init_from=resume" if os.path.exists(inside('ckpt_latest.pt')) else "nothing was saved yet"

def save(is_best):
    state = {'format': 1, 'objective': objective, 'config': asdict(raw_model.config), 'model': raw_model.state_dict(),
             'ema': ema_weights, 'optimizers': [opt.state_dict() for opt in optimizers], 'scaler': scaler.state_dict(),
             'iteration': iteration, 'tokens': tokens, 'best': float(best), 'settings': config, 'meta': corpus.meta}
    for name in ['best'] * is_best + [f'{iteration:06d}'] * (not cleanup_checkpoints) + ['latest']: # the one that knows of the others last
        write_atomically(inside(f'ckpt_{name}.pt'), lambda f: torch.save(state, f))

# ---- the loop

def learning_rate_factor(it):
    if it < warmup_iters:
        return (it + 1) / (warmup_iters + 1)
    done = min(1.0, (it - warmup_iters) / max(1, (decay_iters or n_iters) - warmup_iters)) # 0 to 1
    shapes = {'linear': 1 - done, 'cosine': 0.5 * (1 + math.cos(math.pi * done)), 'constant': 1.0}
    return final_lr + (1 - final_lr) * shapes[decay]

def ask_to_stop(signum, frame):
    global stop_asked
    stop_asked = True
    signal.signal(signum, signal.default_int_handler if signum == signal.SIGINT else signal.SIG_DFL) # a second one is final

def somebody_asked_to_stop():
    return bool(sum_over_processes(stop_asked))

def backward(micro_step):
    """ the gradients of one micro-step are added to those there are; returns its loss, a tensor () """
    numbers = iteration, micro_step * world + rank
    done = iteration / (curriculum * n_iters) if curriculum else 1.0
    batch = to_device(corpus.batch('train', batch_size, raw_model.row_length, reseed(*numbers), done))
    last = micro_step == micro_steps - 1
    with contextlib.nullcontext() if world == 1 or last else network.no_sync():
        try:
            with amp:
                _, loss = network(**batch)
        except compile_errors as e:
            stop_compiling(e)
            reseed(*numbers)
            with amp:
                _, loss = network(**batch)
        scaler.scale(loss / micro_steps).backward()
    return loss.detach()

def train_step():
    """ one iteration: (mean loss, gradient norm), both over all processes """
    for opt in optimizers:
        for group in opt.param_groups:
            group['lr'] = group['peak_lr'] * learning_rate_factor(iteration)
    total = torch.zeros((), device=where)
    for micro_step in range(micro_steps):
        total += backward(micro_step) / micro_steps
    for opt in optimizers:
        scaler.unscale_(opt)
    parameters = list(raw_model.parameters())
    if grad_clip > 0:
        norm = torch.nn.utils.clip_grad_norm_(parameters, grad_clip)
    else: # clipping to infinity would turn an infinite gradient into NaN
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    overflowed = scaler.is_enabled() and not math.isfinite(norm)
    if not overflowed: # the scaler would leave out only the optimizer whose own gradients overflowed
        for opt in optimizers:
            scaler.step(opt)
    scaler.update()
    for opt in optimizers:
        opt.zero_grad(set_to_none=True)
    if ema_weights is not None: # a young average would otherwise remember the initialisation for ever
        beta = min(ema, (1 + iteration) / (10 + iteration))
        torch._foreach_lerp_(list(ema_weights.values()), [v.detach() for v in raw_model.state_dict().values()], 1 - beta)
    return sum_over_processes(total) / world, norm

def train():
    global iteration, tokens, best
    clock, since = time.time(), iteration
    while iteration < n_iters:
        loss, norm = train_step()
        iteration += 1
        tokens += tokens_per_iter
        leave = somebody_asked_to_stop()
        logs = iteration % log_interval == 0 or iteration in (1, n_iters)
        evaluates = iteration % eval_interval == 0 or iteration == n_iters
        saves = leave or iteration % save_interval == 0 or iteration == n_iters
        if (logs or evaluates or saves) and not (math.isfinite(loss) and (math.isfinite(norm) or scaler.is_enabled())):
            fail(f"the run diverged: loss {loss.item():.4g}, gradient norm {norm.item():.4g} at iteration {iteration}; lower learning_rate "
                 f"and muon_learning_rate, or lengthen warmup_iters; {how_to_go_on()}")
        row = {'iteration': iteration, 'epoch': tokens / tokens_per_epoch, 'tokens': tokens}
        if logs and master:
            speed = (iteration - since) * tokens_per_iter / (time.time() - clock)
            clock, since = time.time(), iteration
            row |= {raw_model.loss_name: loss.item(), 'grad_norm': norm.item(), 'lr': optimizers[0].param_groups[0]['lr'],
                    'tokens_per_second': round(speed)}
            mfu = raw_model.estimate_mfu(speed, peak_flops * world) if peak_flops else None
            eta = (n_iters - iteration) * tokens_per_iter / speed
            say(f"iter {iteration}/{n_iters} | epoch {row['epoch']:.2f} | {raw_model.loss_name} {row[raw_model.loss_name]:.4f} | "
                f"lr {row['lr']:.1e} | {speed:,.0f} tok/s{f' | mfu {mfu:.1%}' if mfu else ''} | eta {timedelta(seconds=round(eta))}")
        is_best = False
        if evaluates and master:
            paused = time.time()
            result = evaluate()
            watched = result[f"val_{raw_model.measured}{'_ema' * (ema_weights is not None)}"]
            is_best, best, row = watched < best, min(best, watched), row | result
            say(f"iter {iteration} | " + ' | '.join(f"{k} {v:.4f}" for k, v in result.items()) + (' | best so far' if is_best else ''))
            clock += time.time() - paused
        if (logs or evaluates) and master:
            log(row)
            if wandb_run:
                wandb_run.log(row, step=iteration)
        if master and (is_best or saves):
            paused = time.time()
            save(is_best)
            clock += time.time() - paused
        if leave:
            say(f"asked to stop: saved iteration {iteration}; go on with python train.py --out_dir={out_dir} --init_from=resume")
            break
    return iteration == n_iters

for s in (signal.SIGINT, signal.SIGTERM):
    signal.signal(s, ask_to_stop)
try:
    finished = train()
except (PrepareError, UserError) as e:
    fail(f"{e}; {how_to_go_on()}")
except (MemoryError, RuntimeError) as e:
    if world > 1 and (isinstance(e, dist.DistError) or 'Connection' in str(e)):
        sys.exit(f"error: process {rank} lost another process of the run; {how_to_go_on()}")
    fail_for_memory(e, how_to_go_on())
if world > 1:
    dist.destroy_process_group()
for s in (signal.SIGINT, signal.SIGTERM): # from here on there is nothing to save
    signal.signal(s, signal.default_int_handler if s == signal.SIGINT else signal.SIG_DFL)
if finished and not stop_asked and scoreboard_windows != 0 and master:
    finish()
if master:
    os.close(claimed) # whoever runs this inside another program may go on with the folder
