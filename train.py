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
import functools
import inspect
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
from configurator import configure, settings_of
from model import UserError, check
from prepare import Layout, PrepareError, ensure, open_corpus, provider, replacing

# -----------------------------------------------------------------------------
# the run
out_dir = 'out' # the run's folder; a second run never overwrites it
# also weights to start from: a checkpoint of ours or of nanoGPT, or a GPT-2 of Hugging Face
init_from = 'scratch' # scratch | resume: the run in out_dir, under its own settings | the path or name of weights
ckpt = 'latest' # where to resume: latest | best | the path of a checkpoint
eval_only = False # evaluate the run in out_dir, write results.json, leave
seed = 1337 # of initialisation, data order, corruption and dropout
# data
dataset = 'shakespeare_char' # a name under data/, or the path of a prepared folder
batch_size = 16 # rows per micro-step
gradient_accumulation_steps = 1 # micro-steps per iteration, over all processes
skip = '' # segments to do without: plan makes question -> execution
begin = True # ar reads a begin id first, so every token of a row is scored; False: nanoGPT's windows
# model; config/README.md has what the defaults are worth
objective = 'ar' # a row of OBJECTIVES in model.py, or of the dataset's provider.py
block_size = 128 # tokens of context; 0: of a dataset with segments, what they add up to
n_layer = 4
n_head = 4
n_embd = 128
dropout = 0.0 # for small data, many epochs: 0.2
bias = False # in linear layers and in layernorm
pos = 'rope' # rope | learned
# both norms are equally good, ar on tiny shakespeare ends at 1.519 | 1.518, but on a CPU layernorm has a fused kernel
norm = 'layernorm' # layernorm | rmsnorm
mlp = 'swiglu' # swiglu | gelu | gelu_tanh
qk_norm = True # layernorm on queries and keys
# after 1,500 iterations mdlm has 2.04 with tied weights and 2.05 without; after 500 the difference was larger
tie_weights = False # one matrix for embedding and head
init = 'zero' # zero | gpt2: how output projections start
# None: hierarchical if the data has segments and the objective can use them, else the objective's default
attention: str | None = None # causal | full | block | hierarchical; None: the objective's own
# None: the objective's own, 16 for bd3lm and 1 for aogpt; 0: segments of a hierarchy stay whole
diffusion_block_size: int | None = None # tokens per block, not of the context
segments = '' # lengths of a hierarchy on plain text, the question first: 32,32,64
causal_within_block = False # plan and execution see no later tokens of their own block
# with question, plan and execution, 0.3 means: the plan's loss alone in the first 30 % of the iterations
curriculum = 0.0 # share of the iterations in which segments join the loss one by one
t_min = 0.0 # noise levels that training draws; bounds always use all of (0, 1]
t_max = 1.0
t_dist = 'uniform' # uniform | bell: another weighting of the same losses, better for mdlm and bd3lm
single_ratio_per_sequence = True # False: a noise level per token, no bound
clean_causal = False # bd3lm: the clean stream is a GPT, so one run answers as bd3lm and as ar
ar_weight = 0.0 # weight of a next-token loss: bd3lm's on the clean_causal stream, mdlm's on half of the rows
attn_backend = 'auto' # auto | sdpa | flex
grad_checkpointing = False # less memory, about a third more time
# optimizer
optimizer = 'muon' # muon (attention and MLP matrices; AdamW for the rest) | adamw
learning_rate = 4e-3 # peak, of AdamW
muon_learning_rate = 0.02 # peak, of Muon
weight_decay = 0.1 # of 2-D parameters
beta1 = 0.9
beta2 = 0.99
grad_clip = 1.0 # on the norm of all gradients; 0: off
# averages are no better where the learning rate falls to 0
ema = 0.0 # decay of the averaged weights, reached as min(ema, (1+n)/(10+n)); 0: off
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
# what the objective, and the run that this one goes on with, add to these settings

COMPUTED = 'vocab_size', 'text_size', 'begin_id', 'mask_id' # fields of a model's config that depend on the data

@functools.cache
def objectives(dataset):
    """ {name: class}: the objectives of model.py, and those of the dataset's provider.py """
    own = provider(dataset).get('OBJECTIVES', {})
    twice = ', '.join(own.keys() & models.OBJECTIVES.keys())
    assert not twice, f"OBJECTIVES in the provider.py of {dataset} has {twice}, which model.py has: take another name"
    return models.OBJECTIVES | own

def own_settings(settings):
    """ {objective: {name: (default, types, comment)}}: a field of its config that is neither above nor computed """
    known, found = {*settings, *COMPUTED}, {}
    usual = {field.name for field in fields(models.GPTConfig)}
    for name, kind in objectives(settings['dataset']).items():
        twice = known & {field.name for field in fields(kind.config_class)} - usual
        assert not twice, f"{kind.config_class.__name__} has {', '.join(twice)}, which train.py has: take another name"
        found[name] = settings_of(kind.config_class, known)
    return found

def fail(sentence):
    """ end this process with a sentence; of several processes the first one says it """
    sys.exit(2) if int(os.environ.get('RANK', 0)) else configurator.fail(str(sentence))

def read_settings(settings):
    """ what settings.json says of the run that these settings go on with; {} if they begin a new one """
    if settings['init_from'] != 'resume' and not settings['eval_only']:
        return {}
    path = os.path.join(os.path.expanduser(settings['out_dir']), 'settings.json')
    no_run = f"there is no run to resume in {settings['out_dir']}: {path}"
    try:
        with open(path) as f:
            saved = json.load(f)
    except (OSError, ValueError) as e:
        fail(f"{no_run} cannot be read ({e})")
    if not isinstance(saved, dict) or 'init_from' not in saved:
        fail(f"{no_run} is not what a run writes there")
    return saved

def earlier_settings(settings):
    """ the settings among them; each holds until this command line says something else """
    return {k: v for k, v in read_settings(settings).items() if k not in ('out_dir', 'init_from', 'ckpt', 'eval_only')}

configurator.print_anything()
given = {} # which settings the command line and its config files name, and where
config = configure(globals(), given=given, saved=earlier_settings, own=('objective', own_settings))

rank, world, local_rank = (int(os.environ.get(k, d)) for k, d in (('RANK', 0), ('WORLD_SIZE', 1), ('LOCAL_RANK', 0)))
master = rank == 0 # of the processes that torchrun starts, this one evaluates, logs and saves

# -----------------------------------------------------------------------------
# the run, from here to its scoreboard

def main():
    """ what happens, in order; the names given here are global, like the settings: every function below knows them """
    global saved, resume, origin, where, amp, precision, scaler, corpus, raw_model, optimizers, network, ema_weights
    global iteration, tokens, best, tokens_per_iter, tokens_per_epoch, n_iters, save_interval, wandb_run

    # a new run, or the one in out_dir
    saved = read_settings(config)
    origin = saved.get('init_from', init_from) # of the first weights: scratch, or where they were read
    resume = has_checkpoint()
    start_processes()
    where, amp, precision = start_device()
    scaler = torch.amp.GradScaler(where.type, enabled=precision == 'float16')

    # data, model, optimizer
    check_settings()
    corpus = open_data()
    raw_model = build_model()
    try_a_batch()
    optimizers = make_optimizers()
    tokens_per_iter = gradient_accumulation_steps * batch_size * raw_model.config.block_size
    tokens_per_epoch = corpus.tokens('train')

    # where the run stands
    iteration, tokens, best, averages = load_state() if resume else (0, 0, math.inf, None)
    n_iters, save_interval = how_long()
    averaged = ema > 0 and (averages is not None or not eval_only) # a finished run that kept none gets none
    ema_weights = copy_of(averages or raw_model.state_dict()) if averaged else None
    say_what_begins()
    if compiles() and not eval_only:
        start_compiling()
    network = share_gradients() if world > 1 else raw_model

    # the loop, then the scoreboard
    if not eval_only:
        wandb_run = start_wandb() # what can fail does so before there is a folder
        if master:
            open_folder()
        catch_signals(ask_to_stop)
        with sentences(how_to_go_on):
            train()
        catch_signals() # as usual: from here on there is nothing to save
    if world > 1:
        dist.destroy_process_group()
    done = iteration == n_iters and not stop_asked and scoreboard_windows != 0
    if master and (done or eval_only):
        finish()
    leave_folder()

# ---- data and model

def open_data():
    """ the corpus that batches come from; it is prepared first if it is not there """
    if master:
        ensure(dataset)
    if world > 1:
        dist.barrier()
    found, config['block_size'] = open_corpus(dataset, block_size, skip)
    check(not curriculum or 'segments' in found.meta,
          f"curriculum={curriculum} lets segments join the loss one by one, and {dataset} is plain text, "
          "which has none")
    return found

def build_model():
    """ the model of the objective, on its device, with new weights or those of a checkpoint """
    check(objective in objectives(dataset), f"objective is {objective!r}, expected one of "
          f"{', '.join(objectives(dataset))}; others come from a provider.py in the folder of {dataset}")
    kind, weights = objectives(dataset)[objective], None
    torch.manual_seed(seed)
    if origin != 'scratch' and not resume:
        architecture, weights, text = models.read_pretrained(os.path.expanduser(origin), objectives(dataset))
        take_architecture(kind, architecture, text)
    data = {name: corpus.meta[name] for name in ('vocab_size', 'text_size', 'mask_id')}
    data |= {'begin_id': corpus.meta['begin_id'] if begin else None, 'segments': corpus.meta.get('segments', segments)}
    known = config | data | {'diffusion_block_size': kind.block_size_for(diffusion_block_size)}
    names = [field.name for field in fields(kind.config_class)]
    model = kind(kind.config_class(**{name: known[name] for name in names if name in known})).to(where)
    if 'segments' in corpus.meta:
        fit_segments(model)
    if weights:
        model.load_pretrained(weights)
    return model

def take_architecture(kind, architecture, text):
    """ weights bring their architecture along, into config, and must read the tokens that the dataset has """
    fixed = [name for name in models.fields_of(kind.config_class, 'weights') if name in config]
    brought = {k: v for k, v in architecture.items() if k in fixed and v != config[k]}
    for k in brought:
        check(k not in given, f"{k} is {config[k]} {given.get(k)}, but the weights of {origin} have {k}={brought[k]}: "
                              f"leave {k} out, or start from scratch")
    config.update(brought)
    say(f"weights of {origin}", *(f"{k}={v}" for k, v in brought.items()), sep=', ')
    for k, v in text.items():
        check(corpus.meta.get(k) == v, f"the weights of {origin} read other tokens than {dataset} has: "
                                       f"{k} is {v!r} there, {corpus.meta.get(k)!r} here")

def fit_segments(model):
    """ rows of segments are laid out as the model wants them """
    own = corpus.meta['segments']
    check(not segments, f"segments is {segments!r}, but {dataset} has its own, {own}: prepare other lengths")
    reads_rows = lambda view: 'block_ids' in inspect.signature(view.nll_bound).parameters
    views = ', '.join(name for name, view in model.views().items() if not reads_rows(view))
    check(not views, f"rows of segments cannot be read as {views}, as this model would be: leave out ar_weight and "
                     "clean_causal, or take --objective=ar, mdlm or bd3lm")
    corpus.layout = Layout(corpus.meta, getattr(model, 'id_list', None))

def try_a_batch():
    """ what is wrong with the rows, or too large for the memory, is better said now, before there is a run folder """
    next(corpus.windows('val', 1, raw_model.row_length))
    batch = corpus.batch('train', batch_size, raw_model.row_length, np.random.default_rng(seed))
    raw_model.eval()
    with torch.no_grad(), amp:
        raw_model(**to_device(batch))
    raw_model.train()

def make_optimizers():
    """ a list, because Muon takes the matrices only; every group remembers its peak learning rate """
    betas = beta1, beta2
    found = raw_model.configure_optimizers(optimizer, learning_rate, muon_learning_rate, weight_decay, betas)
    for opt in found:
        for group in opt.param_groups:
            group['peak_lr'] = group['lr']
    return found

def to_device(batch):
    """ {name: array} -> {name: tensor}, where the model is """
    return {k: torch.from_numpy(v).to(where, non_blocking=True) for k, v in batch.items()}

# ---- the loop

def train():
    """ all iterations that are left, unless somebody asks to stop """
    global iteration, tokens, best
    clock, since = time.time(), iteration # of the last line that told the speed
    while iteration < n_iters:
        loss, norm = train_step()
        iteration += 1
        tokens += tokens_per_iter
        stops, last = somebody_asked_to_stop(), iteration == n_iters
        logs = last or iteration == 1 or iteration % log_interval == 0
        evaluates = last or iteration % eval_interval == 0
        saves = last or stops or iteration % save_interval == 0
        if logs or evaluates or saves:
            check_finite(loss, norm)
        row, is_best = {'iteration': iteration, 'epoch': tokens / tokens_per_epoch, 'tokens': tokens}, False
        if master and logs:
            speed = (iteration - since) * tokens_per_iter / (time.time() - clock)
            clock, since = time.time(), iteration
            row |= tell_progress(loss.item(), norm.item(), speed)
        paused = time.time()
        if master and evaluates:
            result = evaluate()
            watched = result[f"val_{raw_model.measured}{'_ema' * (ema_weights is not None)}"]
            check(not math.isnan(watched), f"the evaluation at iteration {iteration} gives no number, but nan: "
                                           f"see {'nll_bound' if raw_model.bound_name else 'forward'} of {objective}")
            is_best, best = watched < best, min(best, watched)
            row |= result
            numbers = ' | '.join(f"{k} {v:.4f}" for k, v in result.items())
            say(f"iter {iteration} | {numbers}{' | best so far' * is_best}")
        if master and (logs or evaluates):
            log(row)
        if master and (saves or is_best):
            save(is_best)
        clock += time.time() - paused # only training counts for the speed
        if stops:
            say(f"asked to stop: saved iteration {iteration}; "
                f"go on with python train.py --out_dir={out_dir} --init_from=resume")
            return

def train_step():
    """ one iteration: (mean loss, gradient norm), both over all processes """
    for opt in optimizers:
        for group in opt.param_groups:
            group['lr'] = group['peak_lr'] * learning_rate_factor(iteration)
    micro_steps, total = gradient_accumulation_steps // world, torch.zeros((), device=where)
    for micro_step in range(micro_steps):
        total += backward(micro_step, micro_steps) / micro_steps
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
        weights = [v.detach() for v in raw_model.state_dict().values()]
        torch._foreach_lerp_(list(ema_weights.values()), weights, 1 - beta)
    return sum_over_processes(total) / world, norm

def backward(micro_step, micro_steps):
    """ adds the gradients of one batch, one of so many, to those there are; returns its loss, a tensor () """
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

def reseed(*numbers):
    """
    From here on everything random depends on seed and numbers alone, so a resumed run and any number of processes
    repeat it. Returns the numpy generator that draws the rows of a batch.
    """
    torch.manual_seed(int(np.random.SeedSequence((seed, *numbers)).generate_state(1)[0]))
    return np.random.default_rng((seed, *numbers))

def learning_rate_factor(it):
    """ the share of the peak learning rate at iteration it: warm-up, then decay to final_lr """
    if it < warmup_iters:
        return (it + 1) / (warmup_iters + 1)
    done = min(1.0, (it - warmup_iters) / max(1, (decay_iters or n_iters) - warmup_iters)) # 0 to 1
    shapes = {'linear': 1 - done, 'cosine': 0.5 * (1 + math.cos(math.pi * done)), 'constant': 1.0}
    return final_lr + (1 - final_lr) * shapes[decay]

def how_long():
    """ (iterations of the whole run, iterations between checkpoints); an epoch has the tokens of the train split """
    iterations, between = max_iters, ckpt_interval or eval_interval
    if max_epochs > 0:
        iterations = iteration + max(0, math.ceil((max_epochs * tokens_per_epoch - tokens) / tokens_per_iter))
    if ckpt_epochs > 0:
        between = max(1, round(ckpt_epochs * tokens_per_epoch / tokens_per_iter))
    if iteration > iterations and not eval_only:
        fail(f"{checkpoint_path()} is at iteration {iteration}, beyond max_iters {iterations}: "
             "raise --max_iters, or evaluate it with --eval_only=True")
    return iterations, between

# ---- evaluation

def evaluate():
    """ {'train_nll': ..., 'val_nll': ..., 'val_nll_ema': ...} and the objective's own metrics """
    row = {}
    for weights, view, model in readings():
        for split in 'train', 'val':
            row[f"{split}_{model.measured}{view}{'_ema' * (weights == 'ema')}"] = random_windows(model, split)
        if weights == 'raw' and model is raw_model:
            row |= model.metrics(**to_device(corpus.batch('val', batch_size, model.row_length, reseed(2 ** 31 + 2))))
    return row

def readings():
    """ raw and averaged weights, and whatever else they can be read as: ('raw' or 'ema', '' or '_as_NAME', model) """
    for weights in ['raw'] + ['ema'] * (ema_weights is not None):
        with evaluating(weights):
            for name, model in ({'': raw_model} | raw_model.views()).items():
                yield weights, f'_as_{name}' if name else '', model

@contextlib.contextmanager
def evaluating(weights):
    """ eval mode, with the averaged weights in place of the raw ones where weights is 'ema' """
    if weights == 'ema':
        raw = copy_of(raw_model.state_dict())
        raw_model.load_state_dict(ema_weights)
    raw_model.eval()
    try:
        with torch.no_grad(), amp:
            yield
    finally:
        if weights == 'ema':
            raw_model.load_state_dict(raw)
        raw_model.train()

def random_windows(model, split):
    """ nanoGPT's protocol: the mean over eval_iters batches of random windows, the same ones at every call """
    draw = functools.partial(corpus.batch, split, batch_size, model.row_length)
    numbers = 2 ** 31, ('train', 'val').index(split)
    return models.score(model, (to_device(draw(reseed(*numbers, i))) for i in range(eval_iters)))['nats_per_token']

def every_window(model):
    """ the scoreboard: every non-overlapping window of the validation split, without context from outside of it """
    there, shown = corpus.n_windows('val', model.row_length), time.time()
    total = min(there, scoreboard_windows) if scoreboard_windows > 0 else there
    for i, batch in enumerate(corpus.windows('val', batch_size, model.row_length, total)):
        reseed(2 ** 31 + 1, i)
        if time.time() - shown > 10:
            shown = time.time()
            say(f"scoreboard: {i * batch_size:,} of {total:,} windows")
        yield to_device(batch)

def finish():
    """ the scoreboard, a run's last act; who cannot wait for it loses nothing else """
    try:
        say("now the scoreboard; Ctrl-C leaves it out")
        write_results()
    except KeyboardInterrupt:
        say(f"asked to stop: {inside('results.json')} is as it was; "
            f"python train.py --out_dir={out_dir} --eval_only=True writes it")
        sys.exit(130)

def write_results():
    """ score everything that the weights can be read as, print it and write results.json """
    results = {'objective': objective, 'dataset': dataset, 'iteration': iteration, 'parameters': raw_model.n_params(),
               'train_tokens_seen': tokens, 'device': str(where), 'dtype': precision, 'weights': {}}
    for weights, view, model in readings():
        board = models.score(model, every_window(model), bound_samples)
        windows = random_windows(model, 'val')
        board['protocol'] = (f"non-overlapping windows of {model.row_length} tokens of val, "
                             f"{corpus.n_windows('val', model.row_length):,} in all")
        results['weights'][weights + view] = {'scoreboard': board, 'random_windows': windows}
        error = board['stderr_monte_carlo']
        monte_carlo = '' if error is None else f"+- {error:.4f} Monte Carlo, "
        perplexity = f", perplexity {board['perplexity']:.5g}" if board['perplexity'] else ''
        say(f"{weights} weights{view.replace('_', ' ')}, {board['windows']:,} {board['protocol']}:\n"
            f"  {board['name']} {board['sign']} {board['nats_per_token']:.4f} {board['unit']} "
            f"({monte_carlo}+- {board['stderr_windows']:.4f} windows)"
            f"{perplexity}; by nanoGPT's random windows {windows:.4f}")
    write_json('results.json', results)

# ---- checkpoints

def save(is_best):
    """ the whole state, as ckpt_latest.pt and under what other names it deserves """
    state = {'format': 1, 'objective': objective, 'config': asdict(raw_model.config), 'model': raw_model.state_dict(),
             'ema': ema_weights, 'optimizers': [opt.state_dict() for opt in optimizers], 'scaler': scaler.state_dict(),
             'iteration': iteration, 'tokens': tokens, 'best': float(best), 'measured': raw_model.measured,
             'settings': config, 'meta': corpus.meta}
    names = ['best'] * is_best + [f'{iteration:06d}'] * (not cleanup_checkpoints)
    for name in [*names, 'latest']: # the one that knows of the others last
        write_atomically(inside(f'ckpt_{name}.pt'), lambda f: torch.save(state, f))

def checkpoint_path():
    """ where to resume """
    return inside(f'ckpt_{ckpt}.pt') if ckpt in ('latest', 'best') else os.path.expanduser(ckpt)

def load_state():
    """ take weights and moments from a checkpoint; returns (iteration, tokens, best, averaged weights or None) """
    path = checkpoint_path()
    state = models.read_checkpoint(path)
    check_same_model(path, state)
    raw_model.load_state_dict(state['model'])
    for opt, moments in zip(optimizers, state['optimizers']): # rates and decay are this command line's
        opt.load_state_dict({'state': moments['state'], 'param_groups': opt.state_dict()['param_groups']})
    if state['scaler']: # a run in float16 until now
        scaler.load_state_dict(state['scaler'])
    was = state['settings'] # a checkpoint from before tokens were counted had one batch size throughout
    per_iter = was['gradient_accumulation_steps'] * was['batch_size'] * raw_model.config.block_size
    seen = state.get('tokens', state['iteration'] * per_iter) # in batches of the sizes that they had
    return state['iteration'], seen, best_of(state), state['ema']

def best_of(state):
    """ the best evaluation that a checkpoint knows of, as far as it is comparable with those to come """
    same = state.get('measured', raw_model.measured) == raw_model.measured # a bound may have been defined since
    return state['best'] if same else math.inf

def check_same_model(path, state):
    """ a sentence where a checkpoint is of another model, text or optimizer """
    free = models.fields_of(type(raw_model.config), 'free') # what weights and their moments do not depend on
    # a field that the checkpoint lacks had its default, unless it is of the other objective
    defaults = {field.name: field.default for field in fields(raw_model.config)}
    ours, theirs = asdict(raw_model.config), defaults | state['config']
    other = state['objective'] != objective
    names = [k for k in ours if k in state['config']] if other else theirs
    differ = [f"objective ({state['objective']} there, {objective} here)"] * other
    differ += [f"{k} ({theirs[k]} there, {ours.get(k)} here)" for k in names
               if k not in free and theirs[k] != ours.get(k)]
    # the same ids may be other letters
    differ += [k for k in ('tokenizer', 'chars') if state['meta'].get(k) != corpus.meta.get(k)]
    check(not differ, f"{path} is another model: it differs in {', '.join(differ)}; "
                      "resume with the run's own settings, or start anew in another --out_dir")
    check(len(optimizers) == len(state['optimizers']),
          f"{path} was trained with another optimizer than {optimizer}: "
          f"leave --optimizer as it was, or start anew with --init_from={path}")

def copy_of(weights):
    """ {name: tensor} on the device, apart from the originals """
    return {k: v.detach().clone().to(where) for k, v in weights.items()}

# -----------------------------------------------------------------------------
# what serves the run: its folder, its log, processes and devices, torch.compile, sentences

# ---- the run folder

def inside(name):
    return os.path.join(os.path.expanduser(out_dir), name)

def results_in_folder():
    """ names of what a run left in out_dir and only its continuation may overwrite """
    folder = inside('')
    names = sorted(os.listdir(folder)) if os.path.isdir(folder) else []
    return [name for name in names if name in ('settings.json', 'log.csv', 'results.json') or name.endswith('.pt')]

def has_checkpoint():
    """ is there anything to go on from? A sentence where this run would overwrite what another has left """
    there = results_in_folder()
    if not saved:
        if there:
            fail(f"{out_dir} already holds a run ({', '.join(there)}): go on with it by --init_from=resume, "
                 "or choose another --out_dir")
        return False
    if master and not eval_only: # before anything is read that another process may replace
        claim_folder()
    if ckpt != 'latest' or eval_only or os.path.exists(inside('ckpt_latest.pt')):
        return True
    left = [name for name in results_in_folder() if name not in ('settings.json', 'log.csv')]
    if left:
        other = 'best' if 'ckpt_best.pt' in left else 'PATH'
        fail(f"{out_dir} has no ckpt_latest.pt, but {', '.join(left)}, which a new beginning would overwrite: "
             f"go on with --ckpt={other}, or start anew in another --out_dir")
    say(f"nothing was saved in {out_dir} yet: beginning at iteration 0") # killed before its first checkpoint
    return False

claimed = None # the open folder; its lock ends with this process, however that ends

def claim_folder():
    """ from now on the run folder belongs to this process """
    global claimed
    try:
        os.makedirs(inside(''), exist_ok=True)
        claimed = os.open(inside(''), os.O_RDONLY)
    except OSError as e:
        fail(f"cannot create the run folder {out_dir}: {e.strerror}; choose another --out_dir")
    try:
        fcntl.flock(claimed, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        fail(f"another process is training into {out_dir}: wait until it is done, or choose another --out_dir")
    except OSError: # a file system without locks: go on, as everybody did before there were locks
        pass

def leave_folder():
    """ whoever runs this inside another program may go on with the folder """
    if claimed is not None:
        os.close(claimed)

def open_folder():
    """ claim the folder of a new run, write settings.json, and read what of log.csv still holds """
    global best
    if resume:
        set_aside_what_came_later()
        if os.path.exists(inside('ckpt_best.pt')): # it is replaced by a better one only
            best = min(best, best_of(models.read_checkpoint(inside('ckpt_best.pt'))))
    elif not saved: # else nothing was saved yet, and the folder is claimed already
        claim_folder()
        if results_in_folder(): # another process was faster
            fail(f"{out_dir} already holds a run: go on with it by --init_from=resume, or choose another --out_dir")
    remembered = config | {'init_from': origin, 'eval_only': False, 'commit': commit(), 'torch': torch.__version__}
    write_json('settings.json', remembered | ({'wandb_id': wandb_run.id} if wandb_run else {}))
    if resume and os.path.exists(inside('log.csv')): # what the checkpoint does not know of happens again
        with open(inside('log.csv'), newline='') as f:
            rows = [row for row in csv.DictReader(f) if (row.get('iteration') or '').isdigit()]
        log_rows[:] = [row for row in rows if int(row['iteration']) <= iteration]

def set_aside_what_came_later():
    """ to go on from an older checkpoint is to begin another run there: what came after it gets names of its own """
    latest = inside('ckpt_latest.pt')
    later = models.read_checkpoint(latest)['iteration'] if os.path.exists(latest) else 0
    if later <= iteration:
        return
    kept = []
    for name in ('ckpt_latest.pt', 'log.csv', 'results.json'):
        stem, ending = name.replace('_latest', '').split('.')
        aside = f'{stem}_{later:06d}.{ending}'
        if os.path.exists(inside(name)) and not os.path.exists(inside(aside)):
            shutil.copyfile(inside(name), inside(aside))
            kept.append(aside)
    say(f"what the run had at iteration {later} is kept as {', '.join(kept)}")

def commit():
    """ the commit of this code, None where it is no git clone """
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        git = ['git', '-C', os.path.dirname(os.path.abspath(__file__)), 'rev-parse', 'HEAD']
        return subprocess.check_output(git, stderr=subprocess.DEVNULL, text=True).strip()

def write_atomically(path, write):
    """ write(file) into a temporary file, then rename: a reader sees the old file or the new one, never half of one """
    try:
        with replacing(path) as (temporary,), open(temporary, 'wb') as f:
            write(f)
    except (PrepareError, RuntimeError) as e:
        if isinstance(e, RuntimeError) and 'PytorchStreamWriter' not in str(e) and 'inline_container' not in str(e):
            raise
        # torch.save says it in its own words
        problem = str(e) if isinstance(e, PrepareError) else f"cannot write {path}, is the disk full?"
        fail(f"{problem}; what was saved before is untouched. Free some space or choose another --out_dir")

def write_json(name, content):
    write_atomically(inside(name), lambda f: f.write(json.dumps(content, indent=2).encode() + b'\n'))

# ---- what is printed and logged

stop_asked = False # by a signal, or because nobody reads what is printed

def say(*words, sep=' '):
    """ print, from the first of several processes """
    global stop_asked
    if not master:
        return
    try:
        print(*words, sep=sep, flush=True)
    except BrokenPipeError: # as in `train.py | head`: save and leave, in silence
        stop_asked = True
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())

def say_what_begins():
    if resume:
        known = f"best {raw_model.measured} {best:.4f}" if best < math.inf else f"no {raw_model.measured} so far"
        say(f"resumed {checkpoint_path()}: iteration {iteration}, {known}")
    epochs = (tokens + (n_iters - iteration) * tokens_per_iter) / tokens_per_epoch
    say(f"{objective} on {dataset}: {raw_model.n_params() / 1e6:.2f}M parameters, "
        f"attention {raw_model.config.attention}, {tokens_per_iter:,} tokens per iteration, "
        f"{n_iters:,} iterations = {epochs:.2f} epochs, {where} {precision}{f' x {world}' if world > 1 else ''}")

def tell_progress(loss, norm, speed):
    """ print a line of the log; returns the numbers for log.csv """
    lr, flops = optimizers[0].param_groups[0]['lr'], promised_flops()
    mfu = f" | mfu {raw_model.estimate_mfu(speed, flops * world):.1%}" if flops else ''
    left = timedelta(seconds=round((n_iters - iteration) * tokens_per_iter / speed))
    say(f"iter {iteration}/{n_iters} | epoch {tokens / tokens_per_epoch:.2f} | {raw_model.loss_name} {loss:.4f} | "
        f"lr {lr:.1e} | {speed:,.0f} tok/s{mfu} | eta {left}")
    return {raw_model.loss_name: loss, 'grad_norm': norm, 'lr': lr, 'tokens_per_second': round(speed)}

log_rows, log_columns = [], [] # of log.csv

def log(row):
    """ one more line of log.csv; the whole file again where a column is new, or the first time after a resume """
    if wandb_run:
        wandb_run.log(row, step=row['iteration'])
    log_rows.append({k: repr(v) if isinstance(v, float) else v for k, v in row.items()})
    whole = not row.keys() <= set(log_columns)
    if whole:
        log_columns[:] = dict.fromkeys(k for r in log_rows for k in r)
    rows = log_rows if whole else log_rows[-1:]
    table = [log_columns] * whole + [[r.get(k, '') for k in log_columns] for r in rows]
    text = ''.join(','.join(map(str, line)) + '\n' for line in table).encode()
    if whole:
        return write_atomically(inside('log.csv'), lambda f: f.write(text))
    try:
        with open(inside('log.csv'), 'ab') as f:
            f.write(text)
    except OSError as e:
        fail(f"cannot write {inside('log.csv')}: {e.strerror}; {how_to_go_on()}")

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

# ---- processes, device, signals

def start_processes():
    """ meet the other processes, if there are any """
    if world > 1:
        dist.init_process_group('nccl' if torch.cuda.is_available() and device != 'cpu' else 'gloo')

def start_device():
    """ (torch.device, a context for autocast, the name of the precision) """
    global shared, held_by_us
    own_gpu = world > 1 and dist.get_backend() == 'nccl'
    found, *low = models.pick_device(f'cuda:{local_rank}' if own_gpu else device, dtype)
    if found.type == 'cuda':
        torch.cuda.set_device(found)
    torch.set_float32_matmul_precision('high') # tf32 where there is such a thing
    shared = torch.zeros((), device=found) # all sums over processes go by this tensor
    held_by_us = sys.getrefcount(shared) # what holds it besides is gloo's
    if world > 1:
        atexit.register(let_go)
    return found, *low

def sum_over_processes(value):
    """ a number or a tensor () -> its sum, a tensor () if there are several processes """
    if world == 1:
        return value
    dist.all_reduce(shared.fill_(value))
    return shared.clone()

def let_go():
    """
    The last act of one process of several. gloo's thread holds the summed tensor a little longer than the sum takes.
    It needs python's lock to drop the tensor, and if python is being torn down by then, it aborts the process (torch
    2.13). So wait for it, but at most 1 s: the thread may hang.
    """
    until = time.time() + 1
    while sys.getrefcount(shared) > held_by_us and time.time() < until:
        time.sleep(0.001) # without the lock

def share_gradients():
    """ raw_model, whose backward pass averages gradients over all processes """
    # ranks seed and evaluate by themselves, so there is nothing to broadcast; torch 2.13 calls that something else
    warnings.filterwarnings('ignore', '`broadcast_buffers` is deprecated')
    return DDP(raw_model, device_ids=[local_rank] if where.type == 'cuda' else None, broadcast_buffers=False)

def catch_signals(act=None):
    """ Ctrl-C and SIGTERM call act; None: they do what they usually do """
    for s in signal.SIGINT, signal.SIGTERM:
        usual = signal.default_int_handler if s == signal.SIGINT else signal.SIG_DFL
        signal.signal(s, act or usual)

def ask_to_stop(signum, frame):
    global stop_asked
    stop_asked = True
    catch_signals() # a second one is final

def somebody_asked_to_stop():
    """ the same answer in every process """
    return bool(sum_over_processes(stop_asked))

FLOPS = {'H100': 989e12, 'H200': 989e12, 'A100': 312e12, 'L40S': 362e12, 'L4': 121e12, '4090': 165e12, '3090': 71e12,
         'V100': 125e12, 'T4': 65e12} # per second, in bf16 and dense, as their makers promise

def promised_flops():
    """ of the GPU we are on, None if we do not know it """
    name = torch.cuda.get_device_name(where) if where.type == 'cuda' else ''
    return next((flops for known, flops in FLOPS.items() if known in name), None)

# ---- torch.compile

compile_errors = () # exceptions after which a run goes on without torch.compile

def compiles():
    return where.type == 'cuda' if compile is None else compile

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

# ---- sentences

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
            fits = config[name] is None or least <= config[name] < below
            check(fits, f"{name} is {config[name]}, expected {expected}")
    check(0 <= curriculum <= 1, f"curriculum is {curriculum}, expected a share of the iterations, 0 to 1")
    check(decay in ('linear', 'cosine', 'constant'), f"decay is {decay!r}, expected linear, cosine or constant")
    check(gradient_accumulation_steps % world == 0,
          f"gradient_accumulation_steps {gradient_accumulation_steps} is not a multiple of the {world} processes")
    check(attn_backend != 'flex' or where.type == 'cuda',
          f"attn_backend=flex trains on cuda only: FlexAttention has no backward pass on {where}")

def check_finite(loss, norm):
    """ a sentence for a run that diverged; in float16 the scaler deals with gradients that overflow """
    if not math.isfinite(loss) or not (math.isfinite(norm) or scaler.is_enabled()):
        fail(f"the run diverged: loss {loss.item():.4g}, gradient norm {norm.item():.4g} at iteration {iteration}; "
             f"lower learning_rate and muon_learning_rate, or lengthen warmup_iters; {how_to_go_on()}")

@contextlib.contextmanager
def sentences(advice=lambda: ''):
    """ an error that the person at the keyboard can act on becomes a sentence, with advice() added; a bug does not """
    try:
        yield
    except (PrepareError, UserError) as e:
        fail('; '.join(filter(None, [str(e), advice()])))
    except (MemoryError, RuntimeError) as e:
        if world > 1 and (isinstance(e, dist.DistError) or 'Connection' in str(e)):
            sentence = f"process {rank} lost another process of the run"
            sys.exit('; '.join(filter(None, [f"error: {sentence}", advice()])))
        if not out_of_memory(e):
            raise
        sentence = (f"out of memory on {where} at batch_size={batch_size}, block_size={config['block_size']}: "
                    "lower batch_size and raise gradient_accumulation_steps by the same factor, or set "
                    "grad_checkpointing=True")
        configurator.fail('; '.join(filter(None, [sentence, advice()]))) # said by whichever process it is

def out_of_memory(e):
    """ does an exception say that memory did not suffice? On a CPU torch says so in words only """
    words = "can't allocate memory", 'Storage size calculation overflowed'
    return isinstance(e, (MemoryError, torch.OutOfMemoryError)) or any(said in str(e) for said in words)

def how_to_go_on():
    """ what a run that ends early says """
    if not os.path.exists(inside('ckpt_latest.pt')):
        return "nothing was saved yet"
    return f"go on from the last checkpoint with --out_dir={out_dir} --init_from=resume"

def first_line(e):
    """ what an exception says, without the pages that follow """
    return next((line.strip()[:200] for line in str(e).splitlines() if line.strip()), '')

# -----------------------------------------------------------------------------
with sentences():
    main()
