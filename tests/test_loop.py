"""
The loop, watched while it turns: at which rate it steps, what it draws, sums, clips, averages, evaluates and keeps.
Every test compares runs in this process with the same thing written out by hand.
"""
import csv
import functools
import json
import math
import random
import re
import signal
import time
from typing import NamedTuple

import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

import model as models
import prepare
from configurator import configure
from tests.test_train import here, log_of # noqa: F401, here is a fixture

SMALL = ('--block_size=16 --batch_size=4 --n_layer=1 --n_head=2 --n_embd=16 --warmup_iters=2 --init=gpt2 '
         '--eval_iters=2 --log_interval=1 --scoreboard_windows=0 --device=cpu --compile=False').split()
EACH = '--ckpt_interval=1 --cleanup_checkpoints=False' # a checkpoint after every iteration
STILL = '--learning_rate=0 --muon_learning_rate=0' # the weights stay what they were

# ---- what is watched

class Call(NamedTuple):
    """ one call of the model that had targets """
    what: str # forward, nll_bound or metrics
    rows: torch.Tensor # (B, T)
    scored: torch.Tensor # (B, T), which tokens the targets name
    weights: dict
    modes: set # `training` of all modules
    learns: bool # are gradients on?
    noise: torch.Tensor # the state of the random number generator
    dtype: torch.dtype # of matrix products

class Step(NamedTuple):
    """ one step of one optimizer """
    kind: str # AdamW or Muon
    rates: list # of its groups
    decays: list
    grads: dict # of all parameters of the model

def copies(tensors):
    return {k: v.detach().clone() for k, v in tensors.items()}

def same(a, b):
    """ do two dicts hold the same tensors? """
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)

def near(a, b, tolerance=1e-5):
    """ do they, up to a share of the largest number? """
    largest = max(v.abs().max() for v in b.values())
    return a.keys() == b.keys() and all((a[k] - b[k]).abs().max() <= tolerance * largest for k in a)

def distinct(tensors):
    return all(not torch.equal(a, b) for i, a in enumerate(tensors) for b in tensors[:i])

def norm(grads):
    return math.sqrt(sum((g.double() ** 2).sum().item() for g in grads.values()))

class Watch:
    """
    Runs in one folder. calls and steps are what the last one did, in order. on_batch(n, model, loss) hears of its n-th
    training batch, n from 1, and may return another loss.
    """
    def __init__(self, here, dataset, out):
        self.here, self.dataset, self.out, self.on_batch = here, dataset, out, None

    def __call__(self, args, code=0):
        """ train.py with small numbers, or the run in out once more; returns what was printed """
        self.calls, self.steps = [], []
        again = 'init_from' in args or 'eval_only' in args
        first = [] if again else [*SMALL, f'--dataset={self.dataset}']
        return self.here('train.py', *first, f'--out_dir={self.out}', *args.split(), code=code)

    def recorded(self, what, method):
        @functools.wraps(method)
        def call(model, idx, targets=None, *args, **more):
            learns = torch.is_grad_enabled()
            if targets is not None:
                modes, weights = {module.training for module in model.modules()}, copies(model.state_dict())
                dtype = torch.get_autocast_dtype('cpu') if torch.is_autocast_enabled('cpu') else torch.float32
                self.calls.append(Call(what, idx, targets != -1, weights, modes, learns, torch.get_rng_state(), dtype))
            found = method(model, idx, targets, *args, **more)
            if learns and what == 'forward':
                self.model = model
                loss = self.on_batch and self.on_batch(len(self.learned), model, found[1])
                return found[0], found[1] if loss is None else loss
            return found
        return call

    def step(self, opt, args, kwargs):
        rates, decays = ([group[k] for group in opt.param_groups] for k in ('lr', 'weight_decay'))
        grads = copies({k: p.grad for k, p in self.model.named_parameters()})
        self.steps.append(Step(type(opt).__name__, rates, decays, grads))

    @property
    def learned(self):
        """ the calls with gradients, which are those of training """
        return [call for call in self.calls if call.learns]

    def called(self, what):
        return [call for call in self.calls if call.what == what]

    def column(self, name):
        """ of log.csv, where it is not empty """
        with open(self.out / 'log.csv', newline='') as f:
            return [float(row[name]) for row in csv.DictReader(f) if row.get(name)]

    def state(self, name='latest'):
        return torch.load(self.out / f'ckpt_{name}.pt', weights_only=True)

    def numbered(self):
        """ the iterations whose checkpoints are kept """
        return sorted(int(path.stem[5:]) for path in self.out.glob('ckpt_0*.pt'))

    def results(self):
        return json.loads((self.out / 'results.json').read_text())

    def by_hand(self, weights, rows):
        """ loss and gradients of ar on rows, in float32 without dropout """
        model = models.GPT(models.GPTConfig(**self.state()['config'])).eval()
        model.load_state_dict(weights)
        inputs, targets = model.shift(rows, rows)
        loss = model.next_token_loss(model.next_token_logits(inputs), targets)
        return loss.item(), dict(zip(weights, torch.autograd.grad(loss, [*model.parameters()])))

TRAIN, VAL = 2880, 320 # tokens: 45 iterations are an epoch, and 20 windows do not overlap

@pytest.fixture(scope='module')
def letters(tmp_path_factory):
    """ (a prepared folder, its text): so random that no two windows are alike """
    folder, text = tmp_path_factory.mktemp('letters'), ''.join(random.Random(3).choices('abcdefgh', k=TRAIN + VAL))
    (folder / 'a.txt').write_text(text)
    return prepare.prepare('text', str(folder / 'data'), input=str(folder / 'a.txt')), text

@pytest.fixture
def watch(here, letters, tmp_path, monkeypatch):
    watch = Watch(here, letters[0], tmp_path / 'run')
    for kind in models.GPT, models.MDLM:
        for what in 'forward', 'nll_bound', 'metrics':
            monkeypatch.setattr(kind, what, watch.recorded(what, getattr(kind, what)))
    hook = register_optimizer_step_pre_hook(watch.step)
    unheard = lambda signum, frame: pytest.fail(f"nobody listens to signal {signum}")
    handlers = {s: signal.signal(s, unheard) for s in (signal.SIGINT, signal.SIGTERM)}
    yield watch
    hook.remove()
    for s, handler in handlers.items():
        signal.signal(s, handler)

@pytest.fixture
def split_of(letters):
    def split_of(rows):
        """ the split that all windows in rows (B, T) are from """
        places = [letters[1].find(''.join('abcdefgh'[i] for i in row)) for row in rows.tolist()]
        assert all(0 <= place <= TRAIN - 16 for place in places) or all(place >= TRAIN for place in places)
        return 'train' if places[0] < TRAIN else 'val'
    return split_of

# ---- rates

@pytest.mark.parametrize('args, shares', [
    ('--decay=linear --warmup_iters=3 --max_iters=8', [1/4, 2/4, 3/4, 1, 0.8, 0.6, 0.4, 0.2]),
    ('--decay=linear --warmup_iters=0 --max_iters=4 --final_lr=0.2', [1, 0.8, 0.6, 0.4]),
    ('--decay=linear --warmup_iters=1 --max_iters=5 --decay_iters=3 --final_lr=0.5', [1/2, 1, 0.75, 0.5, 0.5]),
    ('--decay=linear --warmup_iters=2 --max_iters=4 --decay_iters=12', [1/3, 2/3, 1, 0.9]),
    ('--decay=linear --warmup_iters=9 --max_iters=3', [0.1, 0.2, 0.3]),
    ('--decay=linear --warmup_iters=0 --max_iters=9 --max_epochs=0.1', [1, 0.8, 0.6, 0.4, 0.2]), # 4.5 iterations
    ('--decay=cosine --warmup_iters=1 --max_iters=5', [1/2, 1, (2 + 2 ** 0.5) / 4, 1/2, (2 - 2 ** 0.5) / 4]),
    ('--decay=cosine --warmup_iters=0 --max_iters=5 --decay_iters=3 --final_lr=0.4', [1, 0.85, 0.55, 0.4, 0.4]),
    ('--decay=constant --warmup_iters=2 --max_iters=5 --decay_iters=3 --final_lr=0.3', [1/3, 2/3, 1, 1, 1])])
def test_every_group_of_every_optimizer_follows_the_schedule(watch, args, shares):
    """ shares of the peak, iteration by iteration """
    watch(args + ' --learning_rate=0.002 --muon_learning_rate=0.03')
    for kind, groups, peak in ('AdamW', 2, 0.002), ('Muon', 1, 0.03):
        rates = [step.rates for step in watch.steps if step.kind == kind]
        assert rates == [pytest.approx([peak * share] * groups, rel=1e-9) for share in shares]
    assert watch.column('lr') == pytest.approx([0.002 * share for share in shares], rel=1e-9)

# ---- what is drawn

def test_an_iteration_draws_its_own_batch_and_noise_and_always_the_same(watch, split_of):
    args = '--objective=mdlm --gradient_accumulation_steps=2 --max_iters=4 --eval_interval=4 ' + EACH
    watch(args)
    rows, noise = [call.rows for call in watch.learned], [call.noise for call in watch.learned]
    assert len(rows) == 4 * 2 and distinct(rows) and distinct(noise) and {split_of(r) for r in rows} == {'train'}
    watch(f'--init_from=resume --ckpt={watch.out}/ckpt_000002.pt --eval_interval=1') # whatever else happens in between
    assert all(torch.equal(a.rows, b) and torch.equal(a.noise, c) for a, b, c in
               zip(watch.learned, rows[4:], noise[4:], strict=True))
    watch.out = watch.out.parent / 'other'
    watch(args + ' --seed=2')
    assert distinct(rows + [call.rows for call in watch.learned])
    assert distinct(noise + [call.noise for call in watch.learned])

def test_the_seed_decides_the_first_weights(watch):
    first = []
    for seed in 1, 1, 2:
        watch.out = watch.out.parent / f'run{len(first)}'
        watch(f'--max_iters=1 --seed={seed}')
        first.append(watch.learned[0].weights)
    assert same(first[0], first[1])
    assert not any(torch.equal(first[0][k], first[2][k]) for k in first[0] if 'ln_' not in k and 'norm' not in k)

def test_every_evaluation_scores_the_same_random_windows(watch, split_of):
    """ eval_iters batches of each split, and their mean is what the log says """
    watch(f'{STILL} --max_iters=6 --eval_interval=2 --eval_iters=3')
    calls = watch.called('nll_bound')
    rows, weights = [call.rows for call in calls[:6]], calls[0].weights
    assert [split_of(r) for r in rows] == ['train'] * 3 + ['val'] * 3 and distinct(rows)
    assert all(r.shape == (4, 16) for r in rows) and all(call.scored.all() for call in calls)
    assert all(torch.equal(call.rows, r) for call, r in zip(calls, rows * 3, strict=True))
    assert distinct([call.noise for call in calls[:6] + watch.learned]) # none is that of a training batch
    for split, part in ('train', rows[:3]), ('val', rows[3:]):
        expected = sum(watch.by_hand(weights, r)[0] for r in part) / 3
        assert watch.column(f'{split}_nll') == pytest.approx([expected] * 3, rel=1e-6)
    metrics = watch.called('metrics')
    assert [split_of(call.rows) for call in metrics] == ['val'] * 3 and not distinct([call.rows for call in metrics])
    assert len({*watch.column('accuracy')}) == len({*watch.column('entropy')}) == 1

def test_every_evaluation_corrupts_in_the_same_way(watch):
    watch(f'{STILL} --objective=mdlm --max_iters=3 --eval_interval=1 --ema=0.5')
    noise = [call.noise for call in watch.called('nll_bound')]
    assert len(noise) == 3 * 2 * 4 and distinct(noise[:4]) # two splits of two batches, by raw weights
    assert all(torch.equal(a, b) for a, b in zip(noise, noise[:4] * 6, strict=True))
    names = 'train_nelbo', 'val_nelbo', 'accuracy_50_hidden'
    assert [len({*watch.column(name)}) for name in names] == [1, 1, 1]

# ---- what a step does with gradients

@pytest.mark.parametrize('clip', [0, 0.02, 100])
def test_a_step_takes_the_clipped_gradient_of_all_its_micro_steps(watch, clip):
    """ as of one large batch, and of no other iteration; the log has the loss, and the norm before clipping """
    watch(f'--gradient_accumulation_steps=3 --max_iters=4 --eval_interval=4 --grad_clip={clip}')
    assert [step.kind for step in watch.steps] == ['AdamW', 'Muon'] * 4
    for i in range(4):
        calls = watch.learned[3 * i:3 * i + 3]
        assert same(calls[0].weights, calls[2].weights)
        loss, grads = watch.by_hand(calls[0].weights, torch.cat([call.rows for call in calls]))
        assert watch.column('nll')[i] == pytest.approx(loss, rel=1e-5)
        assert watch.column('grad_norm')[i] == pytest.approx(norm(grads), rel=1e-4)
        assert 0.02 < norm(grads) < 100
        share = 0.02 / norm(grads) if clip == 0.02 else 1
        for step in watch.steps[2 * i:2 * i + 2]:
            assert near(step.grads, {k: g * share for k, g in grads.items()}, 1e-4)

def test_float16_clips_what_is_no_longer_scaled(watch):
    """ losses are multiplied so that small gradients survive; limits and logs are about the true ones """
    watch('--dtype=float16 --max_iters=4 --grad_clip=0.02')
    assert [step.kind for step in watch.steps] == ['AdamW', 'Muon'] * 4 # none overflowed
    for i, call in enumerate(watch.learned):
        loss, grads = watch.by_hand(call.weights, call.rows)
        assert watch.column('nll')[i] == pytest.approx(loss, rel=1e-2)
        assert watch.column('grad_norm')[i] == pytest.approx(norm(grads), rel=2e-2)
        for step in watch.steps[2 * i:2 * i + 2]:
            assert near(step.grads, {k: g * 0.02 / norm(grads) for k, g in grads.items()}, 5e-2)

def overflows(n, model, loss):
    """ a gradient too large for float32 once it is scaled, at iteration 2, in a matrix: one of Muon's """
    return loss + 1e38 * model.transformer.h[0].attn.c_attn.weight.flatten()[0] if n == 2 else None

@pytest.mark.parametrize('clip', [0, 1])
def test_an_overflow_of_one_optimizer_stops_both_for_an_iteration(watch, clip):
    """ and is nothing to complain about """
    watch.on_batch = overflows
    watch(f'--dtype=float16 --max_iters=4 --eval_interval=4 --warmup_iters=0 --grad_clip={clip}')
    assert watch.column('grad_norm')[1] == math.inf
    assert [step.kind for step in watch.steps] == ['AdamW', 'Muon'] * 3
    before, after, later = (call.weights for call in watch.learned[1:])
    assert same(before, after) and not same(after, later)
    assert watch.state()['scaler']['scale'] == 65536 / 2
    assert not near(watch.steps[2].grads, watch.steps[0].grads) # gone with their iteration

@pytest.mark.parametrize('dtype', ['float32', 'bfloat16', 'float16'])
def test_training_and_evaluation_compute_in_the_same_dtype(watch, dtype):
    watch(f'--dtype={dtype} --max_iters=2 --eval_interval=2 --scoreboard_windows=4')
    assert {call.what for call in watch.calls} == {'forward', 'nll_bound', 'metrics'}
    assert {call.dtype for call in watch.calls} == {getattr(torch, dtype)}

def test_settings_of_the_optimizers_reach_them(watch):
    watch('--max_iters=1 --weight_decay=0.3')
    assert [step.decays for step in watch.steps] == [[0.3, 0.0], [0.3]]
    moments = watch.state()['optimizers'][0]['param_groups']
    assert [group['betas'] for group in moments] == [(0.9, 0.99)] * 2

# ---- averages, and the modes of the model

@pytest.mark.parametrize('more', ['', '--dtype=float16'])
def test_the_average_is_the_one_of_a_loop_in_plain_python(watch, more):
    """ a young one forgets the first weights: 1/10, 2/11, 3/12, 4/13, then 0.35; an overflow is an iteration too """
    watch.on_batch = overflows if more else None
    watch(f'--ema=0.35 --max_iters=8 --eval_interval=8 {EACH} {more}')
    average = {k: v.double() for k, v in watch.learned[0].weights.items()}
    for n, beta in enumerate([1/10, 2/11, 3/12, 4/13, 0.35, 0.35, 0.35, 0.35], 1):
        state = watch.state(f'{n:06d}')
        average = {k: beta * v + (1 - beta) * state['model'][k].double() for k, v in average.items()}
        assert near(state['ema'], average, 1e-6)
        assert not near(state['ema'], state['model'], 1e-4) or more and n == 2 # where it took no step

def test_dropout_is_for_training_alone(watch):
    """ before and after an evaluation; no reading of the weights has any, nor has the scoreboard """
    watch('--objective=mdlm --ar_weight=1 --dropout=0.4 --ema=0.5 '
          '--max_iters=4 --eval_interval=2 --scoreboard_windows=4')
    assert len(watch.learned) >= 4 and all(call.modes == {True} for call in watch.learned)
    others = [call for call in watch.calls if not call.learns]
    assert {call.what for call in others} == {'forward', 'nll_bound', 'metrics'}
    assert all(call.modes == {False} for call in others)

def test_every_reading_has_a_name_of_its_own(watch):
    """ of raw and averaged weights, as they are and as a GPT; the objective's own metrics are those of the raw ones """
    watch('--objective=mdlm --ar_weight=1 --ema=0.5 --max_iters=1 --eval_interval=1 --scoreboard_windows=4')
    names = 'nelbo', 'nll_as_ar', 'nelbo_ema', 'nll_as_ar_ema'
    numbers = [f'{split}_{name}' for name in names for split in ('train', 'val')]
    metrics = [f'accuracy_{level}_hidden' for level in (15, 50, 85)]
    assert {*log_of(watch.out)[0]} == {'iteration', 'epoch', 'tokens', 'ce', 'grad_norm', 'lr', *numbers, *metrics}
    readings = watch.results()['weights']
    assert [*readings] == ['raw', 'raw_as_ar', 'ema', 'ema_as_ar']
    assert [reading['scoreboard']['name'] for reading in readings.values()] == ['nelbo', 'nll'] * 2

def test_dropout_changes_losses_and_no_evaluation(watch):
    watch('--dropout=0.4 --max_iters=4 --eval_interval=2')
    for call, loss in zip(watch.learned, watch.column('nll'), strict=True):
        assert abs(loss - watch.by_hand(call.weights, call.rows)[0]) > 1e-4
    for calls, nats in zip((watch.called('nll_bound')[2:4], watch.called('nll_bound')[6:8]), watch.column('val_nll')):
        assert nats == pytest.approx(sum(watch.by_hand(call.weights, call.rows)[0] for call in calls) / 2, rel=1e-6)

def test_evaluations_read_the_weights_they_name_and_leave_the_raw_ones(watch):
    watch('--ema=0.5 --max_iters=3 --eval_interval=1 --scoreboard_windows=4 ' + EACH)
    for n, row in enumerate(log_of(watch.out), 1):
        state, calls = watch.state(f'{n:06d}'), watch.called('nll_bound')[8 * n - 8:8 * n]
        assert all(same(call.weights, state['model' if i < 4 else 'ema']) for i, call in enumerate(calls))
        assert same(watch.called('metrics')[n - 1].weights, state['model'])
        for name, weights in ('', state['model']), ('_ema', state['ema']):
            expected = sum(watch.by_hand(weights, call.rows)[0] for call in calls[2:4]) / 2
            assert float(row['val_nll' + name]) == pytest.approx(expected, rel=1e-6)
        assert n == 3 or same(watch.learned[n].weights, state['model'])

# ---- what is kept

def scripted(watch, monkeypatch, split_of, values):
    """ evaluations of val find these numbers, one after the other, and those of train fall all the time """
    score, values, falling = models.score, iter(values), iter(range(1000, 0, -1))
    def found(*args):
        board = score(*args)
        split = split_of(watch.calls[-1].rows)
        return board | {'nats_per_token': float(next(values if split == 'val' else falling))}
    monkeypatch.setattr(models, 'score', found)

def test_the_best_checkpoint_is_that_of_the_least_number(watch, monkeypatch, split_of):
    scripted(watch, monkeypatch, split_of, [3, 2, 2.5, 2, 1, 1.5])
    text = watch('--max_iters=6 --eval_interval=1 --ckpt_interval=4 --cleanup_checkpoints=False')
    assert watch.column('val_nll') == [3, 2, 2.5, 2, 1, 1.5]
    assert re.findall(r'iter (\d) .*best so far', text) == ['1', '2', '5']
    assert watch.numbered() == [1, 2, 4, 5, 6] # the better ones, and those that are due
    assert [watch.state(f'{n:06d}')['best'] for n in watch.numbered()] == [3, 2, 2, 1, 1]
    assert watch.state('best')['iteration'] == 5 and same(watch.state('best')['model'], watch.state('000005')['model'])
    assert watch.state()['iteration'] == 6 and not same(watch.state()['model'], watch.state('best')['model'])

def test_where_there_is_an_average_the_best_is_its(watch):
    watch('--ema=0.5 --max_iters=4 --eval_interval=1')
    averaged, state = watch.column('val_nll_ema'), watch.state('best')
    assert state['best'] == min(averaged) != min(watch.column('val_nll'))
    assert state['iteration'] == averaged.index(min(averaged)) + 1
    assert watch.numbered() == [] # nobody asked for them

def test_a_resumed_run_knows_the_best_of_its_first_part(watch, monkeypatch, split_of):
    """ even where its checkpoint is gone """
    scripted(watch, monkeypatch, split_of, [1, 2, 3, 4])
    watch('--max_iters=2 --eval_interval=1')
    (watch.out / 'ckpt_best.pt').unlink()
    text = watch('--init_from=resume --max_iters=4')
    assert 'best so far' not in text and watch.state()['best'] == 1 and not (watch.out / 'ckpt_best.pt').exists()

def test_a_checkpoint_that_cannot_be_written_leaves_the_one_before(watch, monkeypatch):
    """ a full disk at the second one, in the middle of the file """
    save = torch.save
    def fills(state, file):
        if state['iteration'] == 2:
            file.write(b'half of it')
            raise RuntimeError('PytorchStreamWriter failed writing file')
        save(state, file)
    monkeypatch.setattr(torch, 'save', fills)
    text = watch('--max_iters=3 --ckpt_interval=1 --eval_interval=9', code=2)
    assert 'what was saved before is untouched' in text and watch.state()['iteration'] == 1
    assert not [*watch.out.glob('*.tmp')]

def test_the_best_or_the_latest_goes_on(watch, monkeypatch, split_of):
    scripted(watch, monkeypatch, split_of, [1, 2] + [3] * 9)
    watch('--max_iters=2 --eval_interval=1')
    for name, iteration in ('best', 1), ('latest', 2):
        watch(f'--eval_only=True --ckpt={name}')
        assert watch.results()['iteration'] == iteration
        assert same(watch.called('nll_bound')[0].weights, watch.state(name)['model'])
    watch('--init_from=resume --ckpt=best --max_iters=3')
    assert len(watch.learned) == 2 and watch.state()['iteration'] == 3

@pytest.mark.parametrize('args, kept', [
    ('--ckpt_interval=2 --eval_interval=7', [2, 4, 6, 7]), ('--ckpt_interval=0 --eval_interval=3', [3, 6, 7]),
    ('--ckpt_epochs=0.05 --eval_interval=7', [2, 4, 6, 7]), # 2.25 iterations
    ('--ckpt_epochs=0.06 --eval_interval=7', [3, 6, 7]), # 2.7
    ('--ckpt_epochs=0.001 --eval_interval=7', [1, 2, 3, 4, 5, 6, 7]), ('--ckpt_interval=9 --eval_interval=9', [7])])
def test_checkpoints_come_when_they_are_due_and_at_the_end(watch, args, kept):
    watch(f'{args} --max_iters=7 --cleanup_checkpoints=False {STILL}')
    assert watch.numbered() == kept
    for n in kept:
        state = watch.state(f'{n:06d}')
        assert state['iteration'] == n and state['tokens'] == 64 * n

def test_lines_of_the_log(watch):
    """ of losses, of evaluations, and of both at the last iteration """
    text = watch('--log_interval=3 --eval_interval=5 --max_iters=7 --gradient_accumulation_steps=2')
    rows = log_of(watch.out)
    assert [*rows[0]][:6] == ['iteration', 'epoch', 'tokens', 'nll', 'grad_norm', 'lr']
    assert [int(row['iteration']) for row in rows] == [1, 3, 5, 6, 7]
    assert [bool(row['nll']) for row in rows] == [True, True, False, True, True]
    assert [bool(row['val_nll']) for row in rows] == [False, False, True, False, True]
    assert [int(row['tokens']) for row in rows] == [128, 384, 640, 768, 896]
    assert watch.column('epoch') == [tokens / 2880 for tokens in (128, 384, 640, 768, 896)]
    lines = [line for line in text.splitlines() if line.startswith('iter ')]
    assert [line.split()[1] for line in lines] == ['1/7', '3/7', '5', '6/7', '7/7', '7']

def test_only_training_counts_for_the_speed(watch, monkeypatch):
    """ since the last line; by this clock batch n takes n seconds, an evaluation minutes and a checkpoint hours """
    now = [0.0]
    def spend(seconds, act=lambda *args: None):
        def acts(*args):
            now[0] += seconds or args[0]
            return act(*args)
        return acts
    watch.on_batch = spend(None)
    monkeypatch.setattr(models, 'score', spend(100, models.score))
    monkeypatch.setattr(torch, 'save', spend(10_000, torch.save))
    monkeypatch.setattr(time, 'time', lambda: now[0])
    text = watch('--log_interval=2 --eval_interval=3 --ckpt_interval=2 --max_iters=6')
    assert watch.column('tokens_per_second') == [64, 32, 18, 12] # of 64 tokens in 1 and 2 s, 128 in 3 + 4 and 5 + 6 s
    found = re.findall(r'/6 .* (\d+) tok/s . eta 0:00:0(\d)', text)
    assert found == [('64', '5'), ('32', '8'), ('18', '7'), ('12', '0')]

# ---- the end

@pytest.mark.parametrize('asked', [signal.SIGTERM, signal.SIGINT])
def test_who_is_asked_to_stop_finishes_the_iteration_saves_and_leaves(watch, asked):
    watch.on_batch = lambda n, model, loss: signal.raise_signal(asked) if n == 3 else None
    text = watch('--max_iters=5 --eval_interval=5 --log_interval=5 --scoreboard_windows=4')
    assert 'asked to stop: saved iteration 3' in text and watch.state()['iteration'] == 3
    assert len(watch.steps) == 6 and not watch.called('nll_bound') and not (watch.out / 'results.json').exists()
    watch.on_batch = None
    watch('--init_from=resume')
    assert watch.state()['iteration'] == 5 and watch.results()['iteration'] == 5

def test_asking_twice_is_not_waiting(watch):
    watch.on_batch = lambda n, model, loss: [signal.raise_signal(signal.SIGINT) for _ in range(2)] if n == 3 else None
    with pytest.raises(KeyboardInterrupt):
        watch('--max_iters=5')
    assert len(watch.learned) == 3 and len(watch.steps) == 4

NO_LOSS = 4, lambda model, loss: loss * math.nan, 'loss nan, gradient norm nan'
INFINITE_LOSS = 6, lambda model, loss: loss + math.inf, r'loss inf, gradient norm \d'
NO_GRADIENT = 6, lambda model, loss: loss + (model.lm_head.weight[0, 0] * 0).sqrt(), r'loss \d.*, gradient norm nan'

@pytest.mark.parametrize('due, first, spoil, said', [
    ('--ckpt_interval=6', *NO_LOSS), ('--eval_interval=6 --ckpt_interval=9', *NO_LOSS), ('--log_interval=6', *NO_LOSS),
    ('--log_interval=6', *INFINITE_LOSS), ('--log_interval=6', *NO_GRADIENT),
    ('--ckpt_interval=6 --dtype=float16', *NO_LOSS)])
def test_what_diverged_is_not_saved(watch, due, first, spoil, said):
    """ a loss or a gradient that is no number, at the first iteration that would log, evaluate or save it """
    watch.on_batch = lambda n, model, loss: spoil(model, loss) if n >= first else None
    text = watch(f'--max_iters=9 --eval_interval=9 --log_interval=9 {due}', code=2)
    assert re.search(f'the run diverged: {said}.* at iteration 6', text) and 'nothing was saved yet' in text
    assert watch.column('iteration') == [1] and not [*watch.out.glob('*.pt')]

@pytest.mark.parametrize('objective', ['ar', 'mdlm'])
def test_a_resumed_run_is_the_whole_one(watch, objective):
    """ bit for bit: weights, averages, moments and schedule of both optimizers, log and scoreboard """
    watch(f'--objective={objective} --ema=0.9 --dropout=0.1 --gradient_accumulation_steps=2 --dtype=float16 '
          f'--max_iters=6 --eval_interval=2 --scoreboard_windows=4 {EACH}')
    whole, log, results, steps = watch.state(), log_of(watch.out), watch.results(), watch.steps
    watch(f'--init_from=resume --ckpt={watch.out}/ckpt_000003.pt')
    again = watch.state()
    assert same(again['model'], whole['model']) and same(again['ema'], whole['ema']) and again['best'] == whole['best']
    for a, b in zip(again['optimizers'], whole['optimizers'], strict=True):
        assert all(same(a['state'][n], b['state'][n]) for n in b['state']) and len(b['state']) == len(a['state']) > 0
    assert again['scaler'] == whole['scaler'] and again['tokens'] == whole['tokens']
    assert log_of(watch.out) == log and watch.results() == results
    assert [step.rates for step in watch.steps] == [step.rates for step in steps[6:]]

def test_rates_and_decay_are_those_of_the_command_line_that_resumes(watch):
    watch('--max_iters=3 --decay=constant --warmup_iters=0 --weight_decay=0.3')
    watch('--init_from=resume --max_iters=5 --learning_rate=0.007 --muon_learning_rate=0.08 --weight_decay=0.2')
    assert [step.rates for step in watch.steps] == [[0.007, 0.007], [0.08]] * 2
    assert [step.decays for step in watch.steps] == [[0.2, 0.0], [0.2]] * 2

def test_epochs_decide_how_long_a_run_is(watch):
    """ an epoch is 45 iterations; after a resume the tokens of both parts count """
    watch('--max_iters=9 --max_epochs=0.1') # 4.5 of them
    assert watch.state()['iteration'] == 5 and len(watch.learned) == 5
    watch('--init_from=resume --max_epochs=0.2 --batch_size=2') # 576 tokens, of which 256 are left, 32 at a time
    assert watch.state()['tokens'] == 576 and watch.state()['iteration'] == 5 + 8
    text = watch('--init_from=resume --max_epochs=0.2')
    assert not watch.steps and watch.state()['iteration'] == 13
    assert 'is kept as' not in text and not [*watch.out.glob('*_0*')] # nothing came later

# ---- the scoreboard

def ids(text):
    return torch.tensor(['abcdefgh'.index(letter) for letter in text])

def test_what_results_say(watch, letters):
    """ every window of val, once and in order, by the weights that are named; beside it the number of the log """
    watch('--ema=0.5 --max_iters=3 --eval_interval=3 --gradient_accumulation_steps=2 --scoreboard_windows=-1')
    results, state, rows = watch.results(), watch.state(), ids(letters[1][TRAIN:]).view(20, 16)
    readings, parameters = results.pop('weights'), results.pop('parameters')
    assert parameters == sum(v.numel() for v in state['model'].values())
    assert results == {'objective': 'ar', 'dataset': letters[0], 'iteration': 3, 'train_tokens_seen': 384,
                       'device': 'cpu', 'dtype': 'float32'}
    assert readings.keys() == {'raw', 'ema'}
    for name, weights, column in ('raw', 'model', 'val_nll'), ('ema', 'ema', 'val_nll_ema'):
        board = readings[name]['scoreboard']
        nats = torch.tensor([watch.by_hand(state[weights], row[None])[0] for row in rows], dtype=torch.double)
        assert board['nats_per_token'] == pytest.approx(nats.mean().item(), rel=1e-6)
        assert board['stderr_windows'] == pytest.approx(nats.std().item() / 20 ** 0.5, rel=1e-4)
        assert (board['windows'], board['tokens'], board['exact']) == (20, 320, True)
        assert 'windows of 16 tokens of val, 20 in all' in board['protocol']
        assert readings[name]['random_windows'] == watch.column(column)[-1]

@pytest.mark.parametrize('asked, windows', [(0, 0), (1, 1), (6, 6), (50, 20)])
def test_so_many_windows_are_scored(watch, letters, asked, windows):
    """ the first ones, after the random ones of the only evaluation: 2 splits, 2 batches """
    watch(f'--max_iters=1 --eval_interval=1 --scoreboard_windows={asked}')
    scored = [call.rows for call in watch.called('nll_bound')][4:-2 if asked else None] # and random ones once more
    assert sum(len(rows) for rows in scored) == windows and (watch.out / 'results.json').exists() == (windows > 0)
    if windows:
        assert torch.equal(torch.cat(scored).flatten(), ids(letters[1][TRAIN:])[:16 * windows])
        assert watch.results()['weights']['raw']['scoreboard']['windows'] == windows

def test_evaluating_again_finds_the_same_and_touches_nothing_else(watch):
    """ Monte Carlo included; other weights of the run find something else """
    watch('--objective=mdlm --ema=0.5 --max_iters=4 --eval_interval=2 --scoreboard_windows=6 --bound_samples=3 ' + EACH)
    results, before = watch.results(), {path.name: path.read_bytes() for path in watch.out.iterdir()}
    assert [results['weights'][name]['scoreboard']['samples_per_window'] for name in ('raw', 'ema')] == [3, 3]
    text = watch('--eval_only=True')
    assert watch.results() == results and 'iter ' not in text and not watch.learned
    assert {path.name: path.read_bytes() for path in watch.out.iterdir()} == before
    noise = [call.noise for call in watch.called('nll_bound')] # 2 batches of the scoreboard, then 2 of random windows
    assert distinct(noise[:4]) and all(torch.equal(a, b) for a, b in zip(noise[:4], noise[4:], strict=True))
    watch(f'--eval_only=True --ckpt={watch.out}/ckpt_000002.pt') # with the same noise
    assert all(torch.equal(call.noise, state) for call, state in zip(watch.called('nll_bound'), noise, strict=True))
    assert watch.results()['iteration'] == 2 and watch.results()['weights'] != results['weights']

def test_without_a_begin_id_the_first_token_is_only_context(watch):
    """ nanoGPT's rows: one token longer, and as many are scored """
    watch('--begin=False --max_iters=2 --eval_interval=2 --scoreboard_windows=-1')
    assert all(call.rows.shape == (4, 17) for call in watch.learned) and watch.state()['tokens'] == 2 * 64
    for call, loss in zip(watch.learned, watch.column('nll'), strict=True):
        assert loss == pytest.approx(watch.by_hand(call.weights, call.rows)[0], rel=1e-6)
    board = watch.results()['weights']['raw']['scoreboard']
    assert (board['windows'], board['tokens']) == (18, 18 * 16) # 18 * 17 of the 320 tokens
    assert 'windows of 17 tokens' in board['protocol']

# ---- settings

def test_a_run_remembers_its_settings_and_what_it_began_with(watch):
    def remembered():
        return json.loads((watch.out / 'settings.json').read_text())
    watch('--max_iters=2 --seed=7 --weight_decay=0.3')
    assert remembered() == watch.state()['settings'] | {k: remembered()[k] for k in ('commit', 'torch')}
    first = remembered()
    assert (first['seed'], first['weight_decay'], first['n_layer'], first['eval_only']) == (7, 0.3, 1, False)
    watch('--init_from=resume --max_iters=3')
    assert remembered() == first | {'max_iters': 3} and first['init_from'] == 'scratch'
    assert watch.state()['settings']['max_iters'] == 3

def test_settings_of_the_model_reach_it(watch):
    others = dict(attention='causal', bias=True, pos='learned', norm='rmsnorm', mlp='gelu', qk_norm=False,
                  tie_weights=True, dropout=0.1, t_min=0.1, t_max=0.9, t_dist='bell', grad_checkpointing=True)
    args = ' '.join(f'--{k}={v}' for k, v in others.items())
    watch(f'--objective=mdlm --max_iters=1 --diffusion_block_size=0 {args}')
    config = watch.state()['config']
    assert {k: config[k] for k in others} == others and config['diffusion_block_size'] is None
    assert watch.state()['objective'] == 'mdlm'

def test_a_cpu_compiles_only_where_it_is_asked_to(watch, monkeypatch):
    compiled = []
    monkeypatch.setattr(models.GPT, 'compile', lambda model: compiled.append(model))
    assert 'torch.compile' not in watch('--max_iters=1 --compile=None') and not compiled

def test_no_setting_may_be_out_of_its_range(watch):
    positive = ('batch_size gradient_accumulation_steps n_layer n_head n_embd max_iters eval_iters log_interval '
                'eval_interval bound_samples')
    rest = ('block_size diffusion_block_size learning_rate muon_learning_rate weight_decay grad_clip max_epochs '
            'warmup_iters decay_iters final_lr ckpt_interval ckpt_epochs seed curriculum')
    shares = 'dropout beta1 beta2 ema'
    wrong = [(name, 0) for name in positive.split()] + [(name, -1) for name in (rest + ' ' + shares).split()]
    wrong += [(name, 1) for name in shares.split()] + [('scoreboard_windows', -2), ('curriculum', 1.5)]
    for name, value in wrong:
        assert f'error: {name} is {value}' in watch(f'--{name}={value}', code=2) and not watch.out.exists()

# ---- segments

def test_the_curriculum_adds_segments_to_the_loss_one_by_one(watch, tmp_path):
    """ over half of 8 iterations; evaluations always score all of them """
    records = [{name: 'abc' for name in ('question', 'plan', 'check', 'execution')} for _ in range(20)]
    (tmp_path / 'a.json').write_text(json.dumps(records))
    watch.dataset = prepare.prepare('records', str(tmp_path / 'records'), input=str(tmp_path / 'a.json'),
                                    segments='question:4,plan:4,check:4,execution:4')
    watch('--curriculum=0.5 --max_iters=8 --eval_interval=4 --decay=constant')
    scored = [[call.scored[:, i:i + 4].all().item() for i in (0, 4, 8, 12)] for call in watch.learned]
    assert [sum(segments) for segments in scored] == [1, 1, 2, 2, 3, 3, 3, 3]
    assert scored[2] == [False, True, True, False]
    assert all(call.scored[:, 4:].all() for call in watch.called('nll_bound')) and watch.called('nll_bound')

# ---- what the command line says

@pytest.fixture
def script(tmp_path, monkeypatch):
    """ script(*argv, saved={}): what configure makes of it, (config, given) """
    monkeypatch.chdir(tmp_path)
    def configured(*argv, saved={}, annotated='int | None'):
        source = f"size = 3 # of what\nword = 'né' # é, or another\nknob: {annotated} = None # anything\n"
        (tmp_path / 'script.py').write_text(source, encoding='utf-8')
        settings, given = {'__file__': str(tmp_path / 'script.py')}, {}
        exec(source, settings)
        return configure(settings, list(argv), saved, given), given
    return configured

def test_given_are_the_settings_that_the_command_line_and_its_files_name(script, tmp_path):
    """ also where they change nothing; those of an earlier run are older than either """
    (tmp_path / 'a.py').write_text('size = 3\n')
    config, given = script('a.py', '--knob=5', saved={'size': 9, 'word': 'old'})
    assert config == {'size': 3, 'word': 'old', 'knob': 5}
    assert given == {'size': 'in config file a.py', 'knob': 'on the command line'}
    assert script(saved={'size': 9}) == ({'size': 9, 'word': 'né', 'knob': None}, {})

def test_a_wrong_setting_of_an_earlier_run_says_where_it_is_from(script, capsys):
    for saved, said in ({'sise': 3}, 'unknown setting sise in the settings of the run; did you mean size?'), \
            ({'size': 'x'}, 'size must be int (default 3), got str x in the settings of the run'):
        with pytest.raises(SystemExit):
            script(saved=saved)
        assert capsys.readouterr().err == f'error: {said}\n'

def test_help_reads_comments_behind_any_letters(script, capsys):
    with pytest.raises(SystemExit):
        script('--help')
    assert capsys.readouterr().out.splitlines()[-3:] == [
        '--size=3      of what', '--word=né     é, or another', '--knob=None   (int or None) anything']

@pytest.mark.parametrize('annotated', ['list | None', 'dict', 'complex | None'])
def test_a_setting_that_cannot_be_typed_is_a_bug_of_the_script(script, annotated):
    with pytest.raises(AssertionError, match='a setting is a bool, int, float or str'):
        script(annotated=annotated)
