"""
Laws of tools/ and of data/*/check.py: what is counted as right, what a bound may see, what a table says; and that
whatever was typed wrong is one sentence. Runs are untrained and made by hand, of what train.py's save() writes.
"""
import contextlib
import functools
import importlib.machinery
import inspect
import io
import json
import math
import multiprocessing
import os
import runpy
import sys
import time
import types
from dataclasses import asdict
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch

import model as models
import prepare
from configurator import configure
from model import UserError, block_ids
from tests.test_train import ROOT, here # noqa: F401, a fixture
from tools import answers, bench, compare, plot, quality

def check_of(name):
    return prepare.load(os.path.join(prepare._DATA, name), 'check.py')

@pytest.fixture(scope='module')
def book(tmp_path_factory):
    """ plain text, prepared: 54 characters and a newline, 60 times """
    folder = tmp_path_factory.mktemp('book')
    (folder / 'a.txt').write_text('The quick brown fox jumps over the lazy dog, and so on.\n' * 60)
    return prepare.prepare('text', str(folder), 'char', input=str(folder / 'a.txt'))

@pytest.fixture(scope='module')
def problems(tmp_path_factory):
    return prepare.prepare('arithmetic', str(tmp_path_factory.mktemp('problems')), max_records=120, difficulty=2)

def save(folder, objective, dataset, skip='', **config):
    """ an untrained run of a dataset, whose predictions are far from uniform; best, latest and averages differ """
    corpus, block_size = prepare.open_corpus(dataset, config.pop('block_size', 0), skip)
    names = 'vocab_size', 'text_size', 'begin_id', 'mask_id', 'segments'
    known = {k: v for k, v in corpus.meta.items() if k in names}
    kind = models.OBJECTIVES[objective]
    shape = dict(block_size=block_size, n_layer=1, n_head=2, n_embd=16, init='gpt2', **known,
                 attention=kind.usual_attention(known.get('segments')))
    os.makedirs(folder, exist_ok=True)
    for i, name in enumerate(('best', 'latest')):
        weights = []
        for seed in 2 * i, 2 * i + 1:
            torch.manual_seed(seed)
            model = kind(models.GPTConfig(**{**shape, **config}))
            weights.append({k: v * 8 if v.dim() > 1 else v for k, v in model.state_dict().items()})
        torch.save({'format': 1, 'objective': objective, 'config': asdict(model.config), 'model': weights[0],
                    'ema': weights[1], 'optimizers': [], 'scaler': {}, 'iteration': 3, 'tokens': 48, 'best': 1.0,
                    'settings': {'dataset': dataset, 'skip': skip}, 'meta': corpus.meta}, folder / f'ckpt_{name}.pt')

@pytest.fixture(scope='module')
def runs(book, problems, tmp_path_factory):
    """ {name: folder} of untrained runs """
    place = tmp_path_factory.mktemp('runs')
    save(place / 'ar', 'ar', book, block_size=16)
    save(place / 'mdlm', 'mdlm', book, block_size=16)
    save(place / 'two', 'mdlm', book, block_size=16, ar_weight=1.0)
    save(place / 'plain', 'ar', book, block_size=16, begin_id=None)
    save(place / 'asked', 'mdlm', problems, attention='full')
    save(place / 'asked-ar', 'ar', problems)
    save(place / 'asked-bd3lm', 'bd3lm', problems, diffusion_block_size=8)
    save(place / 'short', 'mdlm', problems, 'plan')
    return {name: str(place / name) for name in os.listdir(place)}

# ---- answers: what is right

@pytest.mark.parametrize('ways', [
    ['9007199254740993', '9007199254740993.0', '9,007,199,254,740,993', '+9007199254740993'],
    ['1234', '1,234', '1,234.', '1\u00a0234', '1\u202f234', '1\u2009234.00', '01234', '1.234e3', '1234E0', '$1,234.00'],
    ['1.5', '1.50', '3/2', '6/4', '150%', '150 %', '1.5.', '15e-1', '0015e-01', '$1.50', '1.5 $'],
    ['-5', '\u22125', '–5', '-5.0', '-$5', '$-5', '$ -5', '-5 $', '-10/2'],
    ['5 €', '€5', '€ 5.00', '5€.', '+5 €'],
    ['0', '-0', '0.00', '+0', '0%', '0/7', '0e999'], ['.5', '0.5', '50%', '1/2'], ['1,234,567', '1234567'],
    ['12 apples', ' 12 apples\n'], ['1e1000'], ['1' * 1001], ['nan'], ['9' * 1000],
], ids=lambda ways: ways[0][:20])
def test_ways_to_write_one_answer_are_one(ways):
    """ exactly equal, and of one hash, so that they are counted together """
    for a in ways:
        for b in ways:
            assert answers.answer(f'1 + 1 = 2\n#### {a}') == answers.answer(f'#### {b} \n')
            assert answers.same_answer('', a.strip(), b.strip())
    assert len({answers.answer(a) for a in ways}) == 1

@pytest.mark.parametrize('ways', [
    ['9007199254740993', '9007199254740992', '9007199254740994'], ['0.1', '0.1000000000000000055511151231257827'],
    ['1e400', '1e401', 'inf', '-inf', 'Infinity', '1e1000'], ['1e-400', '0', '1e-401'],
    ['1e999999999', '1e999999998', '10e999999998'],
    ['123', '1,23', '1,2,3', '12,3', '1 23', '1_23', '1.2.3', '12.3', '1..23', "1'23"],
    ['1234', '1 234', '1234,', '1,2345', '12,34', '1234,567', '1,234,56', '0,234', ',234', '1.234'],
    ['0,123', '123', '0.123'],
    ['50', '50%', '50 percent', '50%%', '%50', '50% %'],
    ['12', '12 apples', '12\nfor all', '12 12', '(12)', '12!', '12 .', '#12'],
    ['12', '١٢', '１２', '²', '12\u200b', '0x0c', '１2'], ['5', '-5', '--5', '- 5', '5-', '+-5'],
    ['1/3', '0.3333333333333333', '1/0', '0/0', '1/3/1', '1/-3'],
    ['1.5', '1 1/2', '1½'], ['5', '$$5', '$5$', '$5%', '5 $ €'], ['1', 'True', 'one', 'I'], ['nan', 'NaN'],
    ['5', '5..', '5 . '], ['$', '%', '.', '-', '+', 'e5', '/'],
], ids=lambda ways: ways[0][:20])
def test_other_answers_are_other_answers(ways):
    """ nothing inside an answer is deleted, and nothing is rounded """
    for i, a in enumerate(ways):
        for b in ways[i + 1:]:
            assert answers.answer(f'#### {a}') != answers.answer(f'#### {b}') and not answers.same_answer('', a, b)

def test_no_answer_takes_long():
    began = time.process_time()
    for text in ('1e999999999', '-1e-999999999', '1' * 100_000, '1,' * 50_000, '1' + ',111' * 300 + 'x',
                 '1e' + '9' * 900, '1/' + '0' * 900):
        assert answers.answer(text) == text
    assert answers.answer('1e' + '0' * 900 + '3') == 1000 and time.process_time() - began < 5

def test_where_the_answer_stands():
    """ behind the last ####, all of it; and nothing is never right """
    for execution, found in [('#### 1\n#### 2', 2), ('no\n##### 7', 7), ('2 + 2 = 4', '2 + 2 = 4'), (' 4 ', 4),
                             ('#### 12\nfor all', '12\nfor all'), ('#### 1 ####', ''), ('####', ''), ('', ''),
                             ('#### \n', '')]:
        assert answers.answer(execution) == found
    assert not answers.same_answer('', '', '') and answers.chance(['', ''], ['', ''], answers.same_answer) == 0

def test_currencies():
    """ without its sign an amount is every currency's, but one currency is not another """
    same = lambda a, b: answers.same_answer('', a, b)
    assert same('$5', '5') and same('5', '5 €') and same('€5.00', '5 €')
    assert not same('$5', '€5') and not same('$5', '5 €') and not same('$5', '6')
    assert answers.chance([''] * 5, ['$5', '€5.00', '5 €', '6', '6'], answers.same_answer) == 0.4 # 5 € or 6
    assert answers.chance([''] * 5, ['$5', '€5.00', '5 €', '5', '6'], answers.same_answer) == 0.8 # 5

def test_chance_is_how_often_the_commonest_true_answer_is_right():
    """ the commonest, however it is written, by whatever makes answers equal """
    true = ['7', '1,000', '1000.0', '1e3', '8', '8']
    assert answers.chance([''] * 6, true, answers.same_answer) == 0.5
    either = lambda question, a, b: answers.same_answer(question, a, b) or question == 'any'
    assert answers.chance(['', '', 'any', 'any', 'any', ''], true, either) == 4 / 6
    assert answers.chance([''] * 3, ['1', '2', '3'], lambda question, a, b: int(a) >= int(b)) == 1 # 3
    assert answers.chance([''] * 3, ['1', '3', '3'], lambda question, a, b: a == '1' and b == '3') == 2 / 3 # 1

@pytest.mark.parametrize('plan, same', [
    ('Bob = Ann + 5\nCid = Bob * 2', True), ('Dan = Ann - 1\nBob = Ann + 5\nCid = Bob * 2', True),
    ('Bob = Ann + 5\nCid = Bob * 2\nDan = Ann - 1', True),
    ('Dan = Bob - 1\nBob = Ann + 5\nCid = Bob * 2', True), ('Bob=Ann+5 \n\n Cid  =  Bob*2\n', True),
    ('Bob = 5 + Ann\nCid = 2 * Bob', True), ('Bob = Ann + 05\nCid = Bob * 2', True),
    ('Bob = Ann + 5\nBob = Ann + 5\nCid = Bob * 2', True), ('Bob = Ann + 5\r\nCid = Bob * 2', True),
    ('Bob = Ann + 5\nEve = Bob * 2', False), ('Eve = Ann + 5\nCid = Eve * 2', False),
    ('Cid = Bob * 2\nBob = Ann + 5', False), ('Cid = Bob * 2', False),
    ('Bob = Ann + 5', False), ('Bob = Ann + 5\nCid = Ann * 2', False), ('Bob = Eve + 5\nCid = Bob * 2', False),
    ('Bob = Ann - 5\nCid = Bob * 2', False),
    ('Bob = Ann + 6\nCid = Bob * 2', False), ('Bob = Ann + 50\nCid = Bob * 2', False),
    ('Bob = 5 - Ann\nCid = Bob * 2', False), ('Bob = Ann + ٥\nCid = Bob * 2', False),
    ('Bob = Ann + 5\nBob = Ann + 6\nCid = Bob * 2', False), ('Bob = Ann + 6\nBob = Ann + 5\nCid = Bob * 2', False),
    ('Bob = Ann + 5\nCid = Bob * 2\nCid = Bob * 3', False),
    ('Bob = Ann + 5\nAnn = Cid * 1\nCid = Bob * 2', False),
    ('Bob = Ann + 5\nnonsense\nCid = Bob * 2', False), ('Bob = Ann + 5, Cid = Bob * 2', False),
    ('Bob = 7 + 5\nCid = Bob * 2', False), ('Bob = Ann + Ann\nCid = Bob * 2', False),
    ('Bob = Bob + 5\nCid = Bob * 2', False), ('Bob = Cid + 5\nCid = Bob * 2', False),
    ('7 = Ann + 5\nCid = 7 * 2', False), ('', False), ('\n', False),
])
def test_plans_of_arithmetic(plan, same):
    """ the steps that lead to what is asked for decide, and no others """
    assert check_of('arithmetic').same_plan(plan, 'Bob = Ann + 5\nCid = Bob * 2') == same

def test_no_plan_is_itself_unless_it_makes_sense():
    same = check_of('arithmetic').same_plan
    for plan in '', 'nonsense', 'Ann = Ann + 1', 'Ann = Bob + 1\nBob = Ann + 1':
        assert not same(plan, plan)
    assert not same('Ann = 5 - Bob', 'Ann = Bob - 5') and same('Ann = 5 + Bob', 'Ann = Bob + 5')
    assert same('A = B + ' + '9' * 5000, 'A = B + ' + '9' * 5000)

# ---- answers: what is measured

def use(monkeypatch, tool, **settings):
    for name, value in settings.items():
        monkeypatch.setattr(tool, name, value)

@pytest.mark.parametrize('kind', ['asked', 'asked-ar', 'asked-bd3lm'])
@torch.no_grad()
def test_a_bound_sees_nothing_of_later_segments(runs, monkeypatch, kind):
    """ the plan's nats are the same whatever the execution says; the execution's are not, whatever the plan says """
    use(monkeypatch, answers, bound_samples=3)
    run = answers.Run(runs[kind])
    names, other = run.names, run.raw[[1, 2, 0, 4, 3]].copy()
    raw = run.raw[:5].copy()
    last = slice(run.layout.edges[2], run.layout.edges[3])
    assert (raw[:, last] != other[:, last]).any(1).all() and names == ['question', 'plan', 'execution']
    mixed = raw.copy()
    mixed[:, last] = other[:, last]
    def nats(rows, only):
        torch.manual_seed(3)
        return answers.bound(run.model, run.layout, rows, only, run.where)
    assert torch.allclose(nats(raw, [1]), nats(mixed, [1]), atol=1e-6)
    assert ((nats(raw, [2]) - nats(mixed, [2])).abs() > 1e-3).all()
    mixed = raw.copy()
    mixed[:, run.layout.edges[1]:last.start] = other[:, run.layout.edges[1]:last.start]
    assert ((nats(raw, [2]) - nats(mixed, [2])).abs() > 1e-4).all()

def writes(records):
    """ a generate that writes these records, one after another, as raw rows without pads would be """
    def generate(self, idx, max_new_tokens, stop=None, on_step=None, block_ids=None, **options):
        on_step(1, idx, None, {'nfe': 3})
        on_step(2, idx, None, {'nfe': 7})
        rows, records[:] = records[:len(idx)], records[len(idx):]
        return torch.from_numpy(np.stack(rows))
    return generate

@torch.no_grad()
def test_columns_of_answers(runs, problems, monkeypatch):
    """ plans of the next record, true executions but for two: shares, nats, errors and cost, each by hand """
    use(monkeypatch, answers, num_samples=7, batch_size=3, bound_samples=1)
    run = answers.Run(runs['asked-ar'])
    true = [[run.slots.parts(row)[k] for k in run.names] for row in run.raw]
    said = [[q, true[(i + 1) % 7][1], true[(i + 1) % 7][2] if i in (2, 5) else e] for i, (q, _, e) in enumerate(true)]
    packed = lambda records: run.layout.rows(run.layout.raw(records))['idx']
    monkeypatch.setattr(models.GPT, 'generate', writes(list(packed(said))))
    row, texts = answers.answered('a', runs['asked-ar'], {})
    wrong = sum(answers.answer(t['execution']) != answers.answer(t['true_execution']) for t in texts)
    assert wrong in (1, 2) and row['accuracy'] == (7 - wrong) / 7 and row['questions'] == 7 and row['nfe'] == 7
    assert row['accuracy_low'] < row['accuracy'] < row['accuracy_high'] <= 1
    assert (row['accuracy_low'], row['accuracy_high']) == answers.wilson(7 - wrong, 7)
    assert row['plan_same'] == sum(t['plan'] == t['true_plan'] for t in texts) / 7 < 1
    assert row['split'] == 'test' and (prepare.Records(problems).raw('test', slice(7)) == run.raw).all()
    def by_hand(records, segment):
        """ nats of one segment, token by token """
        total = []
        for record in records:
            ids = [run.model.config.begin_id, *(i for part in record for i in [*part, run.layout.end_id])]
            logp = run.model(torch.tensor([ids[:-1]]))[0][0].log_softmax(-1)
            start = sum(len(part) + 1 for part in record[:segment])
            total.append(-sum(logp[i, ids[i + 1]].item() for i in range(start, start + len(record[segment]) + 1)))
        return np.mean(total), np.std(total, ddof=1) / math.sqrt(len(total))
    replaced = [[q, p, e] for (q, _, e), (_, p, _) in zip(true, said)]
    for column, records, segment in [('nats_plan', true, 1), ('nats_execution', true, 2),
                                     ('nats_execution_given_generated', replaced, 2)]:
        assert (row[column], row[column + '_stderr']) == pytest.approx(by_hand(records, segment), rel=1e-4), column
    assert row['exact'] and abs(row['nats_execution'] - row['nats_execution_given_generated']) > 1e-3
    written = sum(len(p) + len(e) + 2 for _, p, e in said)
    monkeypatch.setattr(answers.time, 'perf_counter', iter(range(100)).__next__) # a second per batch
    monkeypatch.setattr(models.GPT, 'generate', writes(list(packed(said))))
    assert answers.answered('a', runs['asked-ar'], {})[0]['tokens_per_second'] == written / 3

def test_a_dataset_may_say_what_is_equal(runs, monkeypatch):
    """ same_answer and same_plan of its check.py, for accuracy and for chance """
    use(monkeypatch, answers, num_samples=6, bound_samples=0)
    run, asked = answers.Run(runs['asked-ar']), []
    def same_answer(question, a, b):
        asked.append((question, a, b))
        return a == b or 'How many' in question and a.isdigit()
    encode, parts = run.tokenizer.encode, [run.slots.parts(row) for row in run.raw]
    said = [[p['question'], np.append(p['plan'], encode(' ')), encode('1\n#### 002')] for p in parts]
    found, plans = [], []
    for own in {}, {'same_answer': same_answer, 'same_plan': lambda a, b: plans.append((a, b))}:
        monkeypatch.setattr(models.GPT, 'generate', writes(list(run.layout.rows(run.layout.raw(said))['idx'])))
        monkeypatch.setattr(answers, 'provider', lambda dataset, file: own)
        found.append(answers.answered('a', runs['asked-ar'], {})[0])
    true = [answers.answer_text(run.tokenizer.decode(p['execution'])) for p in parts]
    assert [row['accuracy'] for row in found] == [true.count('2') / 6, 1]
    assert [row['plan_same'] for row in found] == [1, 0] and all(a == b + ' ' for a, b in plans) and len(plans) == 6
    assert found[0]['chance'] == max(map(true.count, true)) / 6 < found[1]['chance'] == 1
    assert all(q.endswith('?') for q, _, _ in asked) and [(a, b) for _, a, b in asked[:6]] == [('002', b) for b in true]
    assert {a for _, a, _ in asked[6:]} == set(true) == {b for _, _, b in asked[6:]}

def test_temperature_and_options_reach_generate(runs, monkeypatch):
    seen = []
    run = answers.Run(runs['asked-ar'])
    use(monkeypatch, answers, num_samples=2, bound_samples=0, temperature=0.25)
    rows = run.layout.rows(run.raw[:2])['idx']
    def generate(self, idx, max_new_tokens, temperature=1.0, top_k=None, stop=None, **more):
        seen.append((temperature, top_k, stop, max_new_tokens, torch.initial_seed()))
        return writes(list(rows))(self, idx, max_new_tokens, **more)
    monkeypatch.setattr(models.GPT, 'generate', generate)
    for options in {}, {'temperature': 0.5, 'top_k': 3}:
        answers.answered('a', runs['asked-ar'], options)
    assert seen == [(0.25, None, run.layout.end_id, 64, 1337), (0.5, 3, run.layout.end_id, 64, 1337)]

def test_how_many_corruptions_a_bound_takes(runs, monkeypatch):
    """ one where it is exact, else as many as are asked for """
    use(monkeypatch, answers, num_samples=2, bound_samples=3)
    taken = []
    for name, kind, n in ('asked-ar', models.GPT, 1), ('asked', models.MDLM, 3):
        run, nll_bound = answers.Run(runs[name]), kind.nll_bound
        def spy(self, n_samples, **batch):
            taken.append(n_samples)
            return nll_bound(self, n_samples=n_samples, **batch)
        monkeypatch.setattr(kind, 'nll_bound', spy)
        answers.mean_bound(run, run.raw, [1])
        assert taken.pop() == n and not taken

def test_which_weights_are_asked(runs, monkeypatch):
    """ of the run as it was trained, segments left out too; ckpt and weights say which """
    found = {}
    for ckpt in 'best', 'latest':
        state = models.read_checkpoint(os.path.join(runs['short'], f'ckpt_{ckpt}.pt'))
        for weights, name in ('raw', 'model'), ('ema', 'ema'):
            use(monkeypatch, answers, ckpt=ckpt, weights=weights)
            run = answers.Run(runs['short'])
            head = found[ckpt, weights] = run.model.lm_head.weight
            assert torch.equal(head, state[name]['lm_head.weight']) and run.names == ['question', 'execution']
    assert len({head.sum().item() for head in found.values()}) == 4

def test_answers_as_a_command(runs, here, capsys):
    """ one question has no error to say; JSON without nan beside each run, also of one that is named twice """
    ar = runs['asked-ar']
    text = here(f'tools/answers.py {ar},temperature=0|1 {ar}/ --num_samples=1 --bound_samples=1 --examples=1')
    rows = json.loads(open(os.path.join(ar, 'answers.json')).read(), parse_constant=lambda name: pytest.fail(name))
    assert [row['contender'] for row in rows] == [f'{ar},temperature=0', f'{ar},temperature=1', f'{ar}/']
    assert rows[0]['nats_plan_stderr'] is None and 'nan' not in text and '+-' not in text
    assert text.count('[true_execution]') == 3 and text.count(f'\n| {ar}') == 3 and text.count('| = ') == 9
    assert sorted(os.listdir(ar)) == ['answers.json', 'ckpt_best.pt', 'ckpt_latest.pt']
    rows = f'{runs["asked"]},steps=2,sampler=fixed', f'{runs["short"]},sampler=fixed,steps=1'
    text = here('tools/answers.py --num_samples=2', *rows)
    asked, short = ([cell.strip() for cell in line.split('|')[1:-1]] for line in text.splitlines()[2:])
    assert text.count('| <= ') == 4 and asked[5:6] == ['2'] and short[4:6] == ['', '1'] and short[7] == short[9] == ''

def test_what_is_wrong_with_the_last_contender_is_said_first(runs, here, monkeypatch):
    """ nobody writes before; and what is written is kept if a later contender fails on its way """
    wrote, generate = [], models.GPT.generate
    @functools.wraps(generate)
    def spy(self, *args, **options):
        wrote.append(options['temperature'])
        if options['temperature'] == 7:
            raise ZeroDivisionError('a mistake of theirs')
        return generate(self, *args, **options)
    monkeypatch.setattr(models.GPT, 'generate', spy)
    ar = runs['asked-ar']
    text = runs['ar']
    for command in f'answers.py {ar} {ar},magic=1', f'quality.py {text} {text},magic=1 --judge={text}':
        assert 'no use for magic' in said(here, f'tools/{command}') and not wrote
    with pytest.raises(ZeroDivisionError):
        here(f'tools/answers.py {ar},temperature=1|7 --num_samples=1 --bound_samples=0')
    with open(os.path.join(ar, 'answers.json')) as f:
        assert [row['contender'] for row in json.load(f)] == [f'{ar},temperature=1'] and wrote == [1, 7]

# ---- sentences

SMALL = '--block_size=8 --n_layer=1 --n_embd=8 --n_head=1 --threads=1 --device=cpu' # of bench

def said(here, command, *more):
    """ the one sentence that a wrong command ends in """
    text = here(command, *map(str, more), code=2)
    assert text.strip().splitlines()[-1].startswith('error: ') and 'Traceback' not in text
    return text.strip().splitlines()[-1]

WRONG = [ # (command, a part of its sentence)
    ('answers', 'name the folders'), ('answers {nowhere}', 'there is no checkpoint'),
    ('answers {ar}', 'was trained on plain text'), ('answers {asked},magic=1', 'no use for magic'),
    ('answers {asked},stop=3', 'no use for stop'),
    ('answers {asked} {asked},steps=x', "steps is 'x', expected a whole number"),
    ('answers {asked},temperature=None', 'temperature is None'),
    ('quality {mdlm},top_k=2.5 --judge={ar}', 'top_k is 2.5'),
    ('quality {mdlm},sampler=5 --judge={ar}', 'expected a name'), ('answers {asked},steps', 'is no option'),
    ('answers {asked},=3', 'is no option'), ('answers {asked},steps=2,steps=3', 'steps is given twice'),
    ('answers ,steps=3', 'names no run'), ('answers {asked},temprature=0', 'did you mean temperature'),
    ('answers {asked}:ar', 'cannot be read as ar'), ('answers {asked-ar} {nowhere}', 'no checkpoint'),
    ('answers {asked} --batch_size=0', 'batch_size is 0'), ('answers {asked} --num_samples=-1', 'num_samples is -1'),
    ('answers {asked} --bound_samples=-1', 'bound_samples is -1'),
    ('answers {asked} --threads=-1', 'threads is -1'), ('answers {asked} --threads=1000000', 'threads is 1000000'),
    ('answers {asked} --seed=-1', 'seed is -1'),
    ('answers {asked} --seed=18446744073709551616', 'seed is 18446744073709551616'),
    ('answers {asked} --batch_size=9999999999999999999999', 'batch_size is 99'),
    ('answers {asked} --split=dev', "no split 'dev'"),
    ('answers {asked} --examples=-1', 'examples is -1'), ('answers {asked} --ckpt=worst', 'there is no checkpoint'),
    ('answers {asked} --weights=old', 'expected ema or raw'),
    ('answers {asked} --device=abacus', 'cannot be used here'),
    ('answers {asked} --temperature=x', 'temperature must be float'),
    ('answers {asked} --temperature=-1', 'temperature is -1'),
    ('answers {asked} --temperature=nan', 'temperature is nan'),
    ('answers {asked} --num_sample=1', 'did you mean num_samples'),
    ('answers {no-settings}', "has no 'settings'"), ('answers {no-meta}', "has no 'meta'"),
    ('quality {no-config} --judge={ar}', "has no 'config'"),
    ('answers {file}', 'there is no checkpoint'), ('answers {broken}', 'is no checkpoint that can be read'),
    ('answers {moved}', 'run python prepare.py'), ('answers {other}', 'was trained on other data'),
    ('quality {mdlm}', 'name runs and a judge'), ('quality --judge={ar}', 'name runs and a judge'),
    ('quality {mdlm} --judge={mdlm}', 'expected ar, whose likelihood is exact'),
    ('quality {mdlm} --judge={two}:df', 'cannot be read as df'),
    ('quality {mdlm} --judge={nowhere}', 'there is no checkpoint'),
    ('quality {nowhere} --judge={ar}', 'there is no checkpoint'),
    ('quality {mdlm} --judge={asked-ar}', 'expected plain text'),
    ('quality {asked} --judge={ar}', 'do not write in the same tokens'),
    ('quality {mdlm} --judge={ar} --ngram=0', 'ngram is 0'),
    ('quality {mdlm} --judge={ar} --new_tokens=3 --num_samples=2', 'ngram is 4, expected at most the 3 new tokens'),
    ('quality {mdlm} --judge={ar} --num_samples=1', 'num_samples is 1'),
    ('quality {mdlm} --judge={ar} --num_samples=1000000000', 'fewer than num_samples'),
    ('quality {mdlm} --judge={ar} --prompt=16', 'set new_tokens'),
    ('quality {mdlm} --judge={ar} --prompt=-1', 'prompt is -1'),
    ('quality {mdlm} --judge={ar} --new_tokens=1000000000', 'fewer than num_samples'),
    ('quality {mdlm} --judge={ar} --batch_size=0', 'batch_size is 0'),
    ('quality {mdlm} --judge={ar} --seed=-1', 'seed is -1'),
    ('quality {mdlm} --judge={ar} --bleu=letters', 'expected words or char'),
    ('quality {mdlm},sampler=fixed,block_ids=1 --judge={ar}', 'no use for block_ids'),
    ('quality {ar},sampler=fixed --judge={ar}', 'no use for sampler'),
    ('quality {ar} --judge={ar} --suffix=2', 'cannot see what stands behind'),
    ('quality {mdlm} --judge={ar} --output={folder}', 'it is a folder'),
    ('quality {mdlm} --judge={ar} --output={file}/t.json', 'is no folder'),
    ('quality {moved} --judge={moved}', 'run python prepare.py'),
    ('compare', 'name the folders'), ('compare {nowhere}', 'has no readable results.json'),
    ('compare {scored} --orders=1', 'at least 2 windows'), ('compare {scored} --orders=-2', 'at least 2 windows'),
    ('compare {scored} --batch_size=0', 'batch_size is 0'),
    ('compare {scored} --orders=2 --output={folder}', 'it is a folder'),
    ('compare {scored} --orders=2.5', 'orders must be int'), ('compare {unread} --orders=2', 'expected plain text'),
    ('compare {other-text} --orders=2', 'was trained on other data'),
    ('quality {ar} --judge={other-text}', 'was trained on other data'),
    ('plot mask --output={folder}/a.xyz', 'expected a name that ends in'),
    ('plot mask --output={folder}', 'it is a folder'), ('plot mask --output={file}/a.png', 'is no folder'),
    ('plot mask --block_size=0', 'block_size is 0'),
    ('plot mask --block_size=1000000000', 'too much for a picture'),
    ('plot scheduling_matrix --horizon=1000000000', 'too much for a picture'),
    ('plot scheduling_matrix --horizon=-3', 'is empty'), ('plot mask --dataset=arithmetc', 'did you mean arithmetic'),
    ('plot mask --objective=bd3lm --attention=full', 'works with attention block'),
    ('plot mask --objective=mdlm --segments=2,2 --block_size=16', 'add up to 4'),
    ('plot mask {config}', 'n_head must be int'), ('plot mask {unknown}', 'unknown setting n_heads'),
    ('plot mask --attention=diagonal', 'expected one of causal'),
    ('plot mask --batch_size=4', 'unknown setting batch_size'),
    ('plot mask --dataset=arithmetic --block_size=0 --skip=plan,execution --objective=mdlm', 'expected lengths'),
    ('plot mask --block_size=-1', 'block_size is -1'),
    ('bench', 'name contenders'), ('bench objective=gpt', "objective is 'gpt'"), ('bench objective', 'no config file'),
    ('bench objective=ar --batch_size=0', 'batch_size is 0'), ('bench objective=ar,n_layer=0', 'n_layer is 0'),
    ('bench objective=ar,n_head=0', 'n_head is 0'),
    ('bench objective=ar --text_size=0', 'text_size is 0'), ('bench objective=ar --block_size=1', 'set new_tokens'),
    ('bench objective=ar --block_size=0', 'block_size is 0'), ('bench config/train_arithmetic.py', 'block_size is 0'),
    ('bench objective=ar --threads=-1', 'threads is -1'),
    ('bench objective=ar --repetitions=-1', 'repetitions is -1'),
    ('bench objective=ar --learning_rate=-1', 'learning_rate is -1'), ('bench objective=ar --beta1=1', 'beta1 is 1'),
    ('bench objective=ar --weight_decay=nan', 'weight_decay is nan'),
    ('bench objective=ar --compile=maybe', 'compile must be bool or None'),
    ('bench objective=ar,compile=maybe', 'compile must be bool or None'),
    ('bench objective=ar --steps=few', 'steps must be int or None'),
    ('bench objective=ar --sampler=3 --optimizer=sgd', 'expected adamw or muon'),
    ('bench objective=ar --output={folder}', 'it is a folder'),
    ('bench objective=ar --device=abacus', 'cannot be used here'), ('bench objective=ar --dtype=int8', 'dtype is'),
    ('bench objective=ar --seed=-1', 'seed is -1'),
    ('bench objective=ar,batch_size=1000000000,block_size=100000', 'out of memory'),
    ('bench objective=ar --samples=1 --new_tokens=1000000000000', 'new_tokens is 1000000000000'),
]

@pytest.mark.parametrize('command, sentence', WRONG, ids=lambda v: v[:60] if ' ' in v or v.islower() else None)
def test_what_is_typed_wrong_is_one_sentence(wrong, here, command, sentence):
    tool, *args = command.split()
    small = SMALL + ' --repetitions=1 --samples=1' if tool == 'bench' else ''
    found = said(here, f'tools/{tool}.py {small}', *(arg.format_map(wrong) for arg in args))
    if 'needs matplotlib' in found:
        pytest.importorskip('matplotlib')
    assert sentence in found

@pytest.fixture(scope='module')
def wrong(runs, problems, tmp_path_factory):
    """ {name: path} of runs, and of what is none """
    place = tmp_path_factory.mktemp('wrong')
    (place / 'folder').mkdir()
    (place / 'file').write_text('a file')
    (place / 'config.py').write_text("n_head = 'four'\n")
    (place / 'unknown.py').write_text('n_heads = 4\n')
    (place / 'broken').mkdir()
    (place / 'broken' / 'ckpt_best.pt').write_text('no checkpoint')
    for name, of in ('moved', 'asked-ar'), ('other', 'asked-ar'), ('other-text', 'ar'):
        state = models.read_checkpoint(os.path.join(runs[of], 'ckpt_best.pt'))
        if name == 'moved':
            state['settings'] = {'dataset': str(place / 'nowhere')}
        else:
            state['meta']['chars'] = state['meta']['chars'][::-1]
        (place / name).mkdir()
        (place / name / 'results.json').write_text(json.dumps(RESULTS))
        for which in 'best', 'latest':
            torch.save(state, place / name / f'ckpt_{which}.pt')
    for lost in 'settings', 'meta', 'config':
        (place / f'no-{lost}').mkdir()
        torch.save(without(state, lost), place / f'no-{lost}' / 'ckpt_best.pt')
    for name, of in ('scored', 'ar'), ('unread', 'asked'):
        (place / name).mkdir()
        (place / name / 'results.json').write_text(json.dumps(RESULTS))
        os.link(os.path.join(runs[of], 'ckpt_latest.pt'), place / name / 'ckpt_latest.pt')
    names = ('folder', 'file', 'broken', 'moved', 'other', 'other-text', 'nowhere', 'scored', 'unread', 'no-settings',
             'no-meta', 'no-config', 'config.py', 'unknown.py')
    return runs | {name.removesuffix('.py'): str(place / name) for name in names}

# ---- compare

BOARD = {'name': 'nll', 'exact': True, 'sign': '=', 'nats_per_token': 1.5, 'unit': 'nats/token', 'perplexity': 4.4817,
         'stderr_monte_carlo': 0.0, 'stderr_windows': 0.0125, 'windows': 21, 'tokens': 336, 'samples_per_window': 1,
         'protocol': 'windows of 16 tokens'}
RESULTS = {'objective': 'ar', 'dataset': 'book', 'iteration': 3, 'parameters': 1_234_000, 'device': 'cpu',
           'train_tokens_seen': 5_600_000, 'weights': {'raw': {'scoreboard': BOARD, 'random_windows': 1.6}}}

def without(content, key):
    return {k: v for k, v in content.items() if k != key}

def scored(board):
    return RESULTS | {'weights': {'raw': {'scoreboard': board, 'random_windows': 1}}}

@pytest.mark.parametrize('content, sentence', [
    ('', 'JSONDecodeError'), ('[]', "no 'dataset'"), ('3', "no 'dataset'"), ('null', "no 'dataset'"),
    ('[' * 100_000, 'no readable'), (RESULTS | {'weights': {}}, 'has no scoreboard'),
    (RESULTS | {'weights': []}, "another kind of 'weights'"),
    (RESULTS | {'weights': {'raw': 3}}, "no 'scoreboard'"),
    (RESULTS | {'weights': {'raw': {'scoreboard': BOARD}}}, "no 'random_windows'"),
    (RESULTS | {'parameters': 'many'}, "another kind of 'parameters'"),
    (RESULTS | {'parameters': True}, "another kind of 'parameters'"),
    (scored(BOARD | {'nats_per_token': None}), "another kind of 'nats_per_token'"),
    *((scored(without(BOARD, key)), f"no '{key}'") for key in ('name', 'sign', 'nats_per_token', 'tokens', 'windows')),
    *((without(RESULTS, key), f"no '{key}'") for key in ('objective', 'train_tokens_seen', 'weights')),
], ids=lambda v: v if isinstance(v, str) and len(v) < 40 else '')
def test_results_of_another_version(tmp_path, here, content, sentence):
    (tmp_path / 'results.json').write_text(content if isinstance(content, str) else json.dumps(content))
    found = said(here, 'tools/compare.py', tmp_path)
    assert sentence in found and 'eval_only=True' in found and str(tmp_path) in found

def test_the_table_of_compare(tmp_path, here):
    """ numbers as they are, best first, nan last; what was scored on other tokens is said; JSON holds null for nan """
    def board(folder, nats, **more):
        (tmp_path / folder).mkdir()
        weights = {reading: {'scoreboard': BOARD | {'nats_per_token': nats + i, **more}, 'random_windows': 1.6}
                   for i, reading in enumerate(['raw', 'ema_as_ar'])}
        results = RESULTS | {'weights': weights, 'dataset': more.get('dataset', 'book')}
        (tmp_path / folder / 'results.json').write_text(json.dumps(results))
        return str(tmp_path / folder)
    folders = [board('nan', math.nan, perplexity=None), board('b', 2.5), board('a', 1.25)]
    text = here('tools/compare.py', *folders, f'--output={tmp_path}/t.json')
    cells = [[cell.strip() for cell in line.split('|')[1:-1]] for line in text.splitlines() if line.startswith('| /')]
    expected = [(folder, f'ar, {reading}') for folder in ('a', 'b', 'nan') for reading in ('raw', 'ema as ar')]
    assert [(os.path.basename(row[0]), row[1]) for row in cells] == expected
    assert cells[0][2:] == ['1.23M', '5.6M', 'nll = 1.2500', '0.0000', '0.0125', '4.482', '1.6000']
    assert cells[4][4] == 'nll = nan' and cells[4][7] == 'nan'
    rows = json.loads((tmp_path / 't.json').read_text(), parse_constant=lambda name: pytest.fail(name))
    assert [row['nats_per_token'] for row in rows] == [None, None, 2.5, 3.5, 1.25, 2.25] and 'not scored' not in text
    for name, difference in ('c', {'tokens': 335}), ('d', {'windows': 20}), ('e', {'dataset': 'another'}):
        assert 'not scored on the same tokens' in here('tools/compare.py', folders[1], board(name, 1.0, **difference))

@torch.no_grad()
def test_orders_of_evenly_spaced_windows(runs, book, monkeypatch):
    """ nats per token, by hand, of the first of every so many windows; the error is that of a mean """
    corpus = prepare.Corpus(book)
    idx = torch.from_numpy(np.concatenate([b['idx'] for b in corpus.windows('val', 1, 16)]))
    monkeypatch.setattr(compare, 'batch_size', 2)
    for run, view, order in ('ar', '', 'left_to_right'), ('mdlm', '', 'entropy'), ('two', 'ar', 'left_to_right'):
        model = compare.load(runs[run], ckpt='latest', weights='raw', view=view or None)[0]
        for n in 3, len(idx):
            chosen = idx[::len(idx) // n][:n]
            ordered = hasattr(model, 'nll_order')
            nats, _ = model.nll_order(chosen, chosen, order) if ordered else model.nll_bound(chosen, chosen)
            means = nats.flatten() / 16
            found = compare.order_nats(runs[run], n if n == 3 else 10 ** 9, view)
            assert found[order] == pytest.approx((means.mean().item(), means.std().item() / n ** 0.5))
            assert list(found) == (list(models.ORDERS) if ordered else ['left_to_right'])

def test_orders_as_a_command(runs, here, tmp_path, monkeypatch):
    """ beside the readings of raw weights, whatever else they can be read as, and not beside averages """
    os.link(os.path.join(runs['two'], 'ckpt_latest.pt'), tmp_path / 'ckpt_latest.pt')
    weights = dict.fromkeys(('raw', 'raw_as_ar', 'ema'), RESULTS['weights']['raw'])
    (tmp_path / 'results.json').write_text(json.dumps(RESULTS | {'weights': weights}))
    text = here(f'tools/compare.py {tmp_path} --orders=2 --output={tmp_path}/t.json')
    orders = {row['reading']: row.get('orders') for row in json.loads((tmp_path / 't.json').read_text())}
    assert orders['ema'] is None and list(orders['raw_as_ar']) == ['left_to_right']
    assert list(orders['raw']) == list(models.ORDERS)
    assert [line.count('+-') for line in text.splitlines() if line.startswith('| /')] == [4, 1, 0]

# ---- quality

@torch.no_grad()
def test_columns_of_quality(runs, book, tmp_path, here):
    """ the held-out row by hand: nats of what stands in the gap and behind it, with the errors of means; cost; JSON """
    sizes = '--num_samples=5 --batch_size=2 --prompt=3 --new_tokens=5 --suffix=4 --ngram=1 --examples=1 --weights=raw'
    args = f'--judge={runs["ar"]} {sizes} --output={tmp_path}/new/t.json'
    text = here(f'tools/quality.py {runs["mdlm"]},sampler=fixed,steps=2 {args}')
    held, written = json.loads((tmp_path / 'new' / 't.json').read_text())
    corpus, critic = prepare.Corpus(book), quality.load(runs['ar'], weights='raw')[0]
    windows = np.concatenate([b['idx'] for b in corpus.windows('val', 1, 12)])
    idx = torch.from_numpy(windows[::len(windows) // 5][:5])
    logp = critic(torch.nn.functional.pad(idx[:, :-1], (1, 0), value=critic.config.begin_id))[0].log_softmax(-1)
    nats = -logp.gather(2, idx[..., None])[..., 0]
    for name, part in ('nll', nats[:, 3:8]), ('nll_behind', nats[:, 8:]):
        expected = part.mean().item(), part.mean(1).std().item() / 5 ** 0.5
        assert (held[name], held[name + '_stderr']) == pytest.approx(expected, rel=1e-4)
    assert {k: held[k] for k in ('entropy', 'distinct', 'repetition')} == quality.variety(idx[:, 3:8].tolist(), 1)
    assert 'nfe' not in held and written['nfe'] == 2 and written['samples'] == written['new_tokens'] == 5
    assert written['nll'] != held['nll']
    decode = prepare.Tokenizer(corpus.meta).decode
    before, own, after = decode(idx[0, :3]), decode(idx[0, 3:8]), decode(idx[0, 8:])
    assert f'--- the held-out text\n[{before}]{own}[{after}]\n' in text and f'steps=2\n[{before}]' in text
    lines = [line for line in text.splitlines() if line.startswith('|')]
    assert len({line.count('|') for line in lines}) == 1
    assert f"{held['nll']:.3f} +- {held['nll_stderr']:.3f} | {held['nll_behind']:.3f}" in lines[2]

def test_what_quality_asks_for(runs, here, monkeypatch, tmp_path):
    """ gaps of what the judge's context leaves, after a token where something must come first; seed, options, cost """
    asked, now = [], [0]
    def generate(self, idx, max_new_tokens, temperature=1.0, sampler='fixed', on_step=None):
        asked.append((idx, max_new_tokens, temperature, torch.initial_seed()))
        now[0] += 2
        on_step(1, idx, None, {'nfe': 5})
        return torch.cat((idx, idx.new_zeros(len(idx), max_new_tokens)), 1).clamp(min=0)
    monkeypatch.setattr(models.MDLM, 'generate', generate)
    monkeypatch.setattr(models.GPT, 'generate', generate)
    monkeypatch.setattr(time, 'perf_counter', lambda: now[0])
    for name, sizes, gap in [('mdlm', '', (0, 16, 16)), ('mdlm', '--prompt=3 --suffix=4', (3, 12, 16)),
                             ('mdlm', '--new_tokens=20', (0, 20, 20)), ('plain', '--prompt=2', (2, 16, 16)),
                             ('plain', '', (1, 17, 17)), ('mdlm', '--seed=5', (0, 16, 16))]:
        here(f'tools/quality.py {runs[name]},temperature=2 --judge={runs["ar"]} {sizes} --num_samples=5 --batch_size=3 '
             f'--output={tmp_path}/t.json')
        first, end, length = gap
        for (idx, more, temperature, seed), rows in zip(asked, (3, 2)):
            behind = length > end
            assert idx.shape == (rows, length if behind else first) and more == (0 if behind else end - first)
            assert temperature == 2 and seed == (5 if 'seed' in sizes else 1337)
            assert ((idx == -1).sum(1) == (end - first) * behind).all() and (idx[:, :first] != -1).all()
        row = json.loads((tmp_path / 't.json').read_text())[1]
        assert row['tokens_per_second'] == 5 * (end - first) / 4 and row['nfe'] == 5 and len(asked) == 2
        asked.clear()

def test_likeness_to_what_the_text_has_there(runs, here, monkeypatch):
    """ what was written against the held-out text in the same gap; a sentence without the package """
    calls, bleu = [], types.ModuleType('sacrebleu')
    bleu.__spec__ = importlib.machinery.ModuleSpec('sacrebleu', None)
    bleu.corpus_bleu = lambda *args, **more: calls.append((args, more)) or types.SimpleNamespace(score=12.34)
    monkeypatch.setitem(sys.modules, 'sacrebleu', bleu)
    sizes = '--num_samples=2 --prompt=3 --new_tokens=5 --bleu=words'
    command = f'tools/quality.py {runs["ar"]} --judge={runs["ar"]} {sizes}'
    text = here(command, '--examples=2')
    ((held, [own]), how), ((written, [reference]), _) = calls
    assert held == own == reference != written and how == {'tokenize': '13a'} and text.count('| 12.34 |') == 2
    for part in held + written:
        assert f']{part}\n' in text and len(part) == 5
    monkeypatch.setitem(sys.modules, 'sacrebleu', None)
    assert 'pip install sacrebleu' in said(here, command)

@torch.no_grad()
@pytest.mark.parametrize('begin', [True, False])
def test_a_judge_reads_long_texts_context_by_context(begin):
    """ every token is scored once, given what stands before it in its context; without a begin id but the first """
    torch.manual_seed(0)
    shape = dict(block_size=4, vocab_size=9, text_size=7, n_layer=1, n_head=1, n_embd=8, init='gpt2')
    critic = models.GPT(models.GPTConfig(**shape, begin_id=7 if begin else None)).eval()
    critic.lm_head.weight.mul_(30)
    for n in 3, 4, 5, 8, 9, 13:
        idx = torch.randint(7, (3, n))
        nats, scored = quality.judged(critic, idx, idx)
        expected = torch.zeros(3)
        for i in range(not begin, n):
            start = i // 4 * 4 if begin else (i - 1) // 4 * 4
            context = torch.nn.functional.pad(idx[:, start:i], (1, 0), value=7) if begin else idx[:, start:i]
            expected -= critic(context)[0][:, -1].log_softmax(-1).gather(1, idx[:, i:i + 1])[:, 0]
        assert torch.allclose(nats, expected, rtol=1e-4) and scored.tolist() == [n - (not begin)] * 3, n

def test_variety_by_hand():
    found = quality.variety([[0, 1, 0, 1, 0], [0, 1, 2, 3, 4]], 2) # 01 10 01 10 and 01 12 23 34
    assert found['distinct'] == 5 / 8 and found['repetition'] == 2 / 8
    assert quality.variety([[3, 3, 3, 3]], 1) == {'entropy': 0, 'distinct': 1 / 4, 'repetition': 3 / 4}
    found = quality.variety([[0, 1], [2, 3]], 2)
    assert found == {'entropy': pytest.approx(math.log(4)), 'distinct': 1, 'repetition': 0}

@torch.no_grad()
def test_a_sample_never_changes_what_was_given(runs):
    """ whoever's generate does is told by a traceback, not by a table """
    class Bad(models.MDLM):
        def generate(self, idx, n, **options):
            options['on_step'](1, idx, None, {'nfe': 1})
            return torch.zeros(len(idx), idx.size(1) + n, dtype=torch.long)
    model, _ = quality.load(runs['mdlm'])
    model.__class__ = Bad
    with pytest.raises(AssertionError, match='changed given text'):
        quality.write(model, torch.ones(2, 8, dtype=torch.long), slice(2, 5), {})

# ---- options, paths, files

def test_what_generate_takes():
    """ what it names, or hands on without knowing it; never what the tool itself gives """
    from tools import runs
    class Knows:
        def generate(self, idx, steps=None, stop=None): pass
    class HandsOn:
        def generate(self, *args, **options): pass
    runs.check_options('a', Knows(), 'ar', {'steps': 2}, ('idx', 'stop'))
    runs.check_options('a', HandsOn(), 'ar', {'steps': 2, 'whatever': 3}, ('idx', 'stop'))
    for kind, option in (Knows, 'whatever'), (Knows, 'stop'), (HandsOn, 'stop'), (Knows, 'idx'):
        with pytest.raises(UserError, match=f'a: ar has no use for {option}, only for'):
            runs.check_options('a', kind(), 'ar', {option: 2}, ('idx', 'stop'))

def test_contenders():
    assert quality.contenders(['~/a:ar,x=1|2.5,y=b|None', 'c']) == [
        ('~/a:ar,x=1,y=b', '~/a:ar', {'x': 1, 'y': 'b'}), ('~/a:ar,x=1,y=None', '~/a:ar', {'x': 1, 'y': None}),
        ('~/a:ar,x=2.5,y=b', '~/a:ar', {'x': 2.5, 'y': 'b'}), ('~/a:ar,x=2.5,y=None', '~/a:ar', {'x': 2.5, 'y': None}),
        ('c', 'c', {})]
    options = lambda name: quality.contenders([name])[0][2]
    assert options('a,x=1e3,y=True') == {'x': 1000.0, 'y': True} and options('a,x=b=c') == {'x': 'b=c'}
    assert [type(v) for v in options('a,x=8,y=8.0').values()] == [int, float]

def test_home_is_found_wherever_it_is_named(runs, here, tmp_path, monkeypatch):
    """ before a colon, behind =, and in every tool """
    os.symlink(os.path.dirname(runs['ar']), tmp_path / 'runs')
    monkeypatch.setenv('HOME', str(tmp_path))
    args = '--num_samples=2 --new_tokens=4 --ngram=1 --device=cpu'
    here(f'tools/quality.py ~/runs/two:ar --judge=~/runs/two:ar {args} --output=~/q.json')
    here('tools/answers.py ~/runs/asked-ar,temperature=0 --num_samples=1 --bound_samples=0')
    (tmp_path / 'scored').mkdir()
    (tmp_path / 'scored' / 'results.json').write_text(json.dumps(RESULTS))
    here('tools/compare.py ~/scored --output=~/c.json')
    (tmp_path / 'c.py').write_text('n_layer = 1\nn_embd = 8\nn_head = 1\nblock_size = 8\n')
    here('tools/bench.py ~/c.py,objective=ar --repetitions=0 --samples=0 --output=~/b.json')
    assert all((tmp_path / name).exists() for name in ('q.json', 'c.json', 'b.json'))
    assert not os.path.exists('~')
    pytest.importorskip('matplotlib')
    here('tools/plot.py mask ~/c.py --output=~/mask.png')
    assert (tmp_path / 'mask.png').stat().st_size > 1000

def test_a_colon_in_the_name_of_a_folder(runs, tmp_path):
    """ what is there as it stands is a folder; else what follows the last colon is a view """
    os.symlink(runs['two'], tmp_path / 'two:ar')
    bound = lambda name: quality.load(f'{tmp_path}/{name}')[0].bound_name
    assert bound('two:ar') == 'nelbo' and bound('two:ar:ar') == 'nll'

def test_a_table_is_written_whole_or_not_at_all(tmp_path):
    from tools import runs
    path = tmp_path / 'new' / 't.json'
    runs.write_json(str(path), [{'a': math.nan, 'b': (1.5, math.inf)}])
    assert json.loads(path.read_text()) == [{'a': None, 'b': [1.5, None]}]
    with pytest.raises(TypeError): # no number, no text: a mistake of ours
        runs.write_json(str(path), [{'a': 2}, object()])
    assert json.loads(path.read_text())[0]['b'] == [1.5, None] and os.listdir(tmp_path / 'new') == ['t.json']

def test_memory_is_a_sentence_and_a_mistake_is_not(capsys):
    from tools import runs
    for error in (MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), UserError('so'),
                  prepare.PrepareError('so')):
        with pytest.raises(SystemExit) as e, runs.sentences():
            raise error
        assert e.value.code == 2 and capsys.readouterr().err.count('\n') == 1
    for kind in RuntimeError, AssertionError, ValueError, TypeError, OSError, KeyError:
        with pytest.raises(kind, match='so'), runs.sentences():
            raise kind('so')

@pytest.mark.parametrize('command', [
    'answers --help', 'answers {asked-ar} --num_samples=1 --bound_samples=0', 'compare {scored}',
    'plot mask --output={home}/é.png', 'quality {ar} --judge={ar} --num_samples=2 --examples=1',
    'bench {home}/é.py --samples=0 --repetitions=0',
])
def test_what_stdout_has_no_character_for(wrong, monkeypatch, tmp_path, command):
    """ names as they are, in whatever encoding; what it lacks is an escape """
    if 'plot' in command:
        pytest.importorskip('matplotlib')
    os.symlink(os.path.dirname(wrong['ar']), tmp_path / 'é')
    os.symlink(os.path.dirname(wrong['scored']), tmp_path / 'ö')
    (tmp_path / 'é.py').write_text('n_layer = 1\nn_embd = 8\nn_head = 1\n')
    places = {'scored': tmp_path / 'ö' / 'scored', 'home': tmp_path}
    places |= {name: tmp_path / 'é' / name for name in ('ar', 'asked-ar')}
    tool, *args = command.format_map(places).split()
    out = io.TextIOWrapper(io.BytesIO(), encoding='ascii', write_through=True)
    monkeypatch.setattr(sys, 'stdout', out)
    monkeypatch.setattr(sys, 'argv', ['', *args])
    with contextlib.suppress(SystemExit): # of --help
        runpy.run_path(os.path.join(ROOT, f'tools/{tool}.py'), run_name='__main__')
    expected = '\\u20ac' if 'help' in command else '\\xf6' if tool == 'compare' else '\\xe9'
    assert expected in out.buffer.getvalue().decode('ascii')

def test_whoever_reads_may_leave_and_whoever_started_may_stop(monkeypatch):
    from tools import runs
    def leave(code):
        raise SystemExit(code)
    monkeypatch.setattr(os, '_exit', leave) # it would end the tests
    for error, code in (BrokenPipeError(), 141), (KeyboardInterrupt(), 130):
        def main():
            raise error
        with pytest.raises(SystemExit) as e:
            runs.as_command(main)
        assert e.value.code == code

def test_a_mistake_in_somebodys_class_keeps_its_traceback(runs, here, monkeypatch):
    def generate(self, idx, max_new_tokens, *, stop=None, on_step=None, temperature=1.0):
        raise ValueError('a mistake of theirs')
    monkeypatch.setattr(models.GPT, 'generate', generate)
    for command in (f'answers.py {runs["asked-ar"]} --num_samples=1', f'bench.py objective=ar --repetitions=0 {SMALL}',
                    f'quality.py {runs["ar"]} --judge={runs["ar"]} --num_samples=2'):
        with pytest.raises(ValueError, match='a mistake of theirs'):
            here(f'tools/{command}')

# ---- settings of train.py

def test_settings_of_training_with_what_they_may_be():
    """ all of them and nothing computed; a setting whose default is None is judged as train.py judges it """
    found = bench.train_settings()
    assert found['compile'] is None and found['learning_rate'] == 4e-3 and found['scoreboard_windows'] == -1
    assert found['__annotations__'].items() >= {'attention': 'str | None', 'compile': 'bool | None'}.items()
    assert found['__annotations__'].keys() == {k for k, v in found.items() if v is None}
    assert {type(v) for k, v in found.items() if k[0] != '_'} == {str, int, float, bool, type(None)}
    assert list(found)[-2:] == ['compile', '__annotations__'] and not {'config', 'given', 'rank'} & found.keys()
    flags = ['--compile=false', '--steps=3', '--sampler=8']
    settings = configure(bench.all_settings(), flags)
    assert settings['compile'] is False and settings['steps'] == 3 and settings['sampler'] == '8'
    for text, value in [('compile=true', True), ('compile=None', None), ('compile=0', 'refused'), ('attention=3', '3'),
                        ('df_chunk_size=2.5,objective=df', 'refused'), ('df_chunk_size=2,objective=df', 2),
                        ('df_chunk_size=2', 'refused'), ('df_loss_weight=uniform,objective=df_published', 'uniform'),
                        ('df_loss_weight=uniform,objective=df', 'refused')]:
        name = text.partition('=')[0]
        if value == 'refused':
            with pytest.raises(SystemExit):
                bench.contender(text, flags)
        else:
            assert bench.contender(text, flags)[name] == value
    nanogpt = bench.contender('nanogpt,bias=True', flags)
    assert nanogpt.items() >= dict(pos='learned', norm='layernorm', mlp='gelu', qk_norm=False, tie_weights=True,
                                   init='gpt2', optimizer='adamw', objective='ar', bias=True, compile=False).items()
    mdlm = bench.contender('config/quick_test.py,objective=mdlm,steps=5', flags)
    assert mdlm['block_size'] == 64 and mdlm['steps'] == 5
    assert bench.contender('objective=ar', flags)['steps'] == 3 # what one contender says is of nobody else
    with pytest.raises(SystemExit):
        plot.read_settings(['--df_chunk_size=x'])
    assert plot.read_settings(['--attention=None', '--df_chunk_size=4'])[0].df_chunk_size == 4
    assert plot.read_settings(['--attention=none'])[0].attention == 'causal'

@pytest.mark.parametrize('args, compiled', [('objective=ar --compile=false', 0), ('objective=ar objective=mdlm', 0),
                                            ('objective=ar,compile=true objective=ar', 1)])
def test_what_is_compiled(here, monkeypatch, args, compiled):
    calls = []
    monkeypatch.setattr(torch.nn.Module, 'compile', lambda self: calls.append(self))
    here(f'tools/bench.py {args} --repetitions=0 --samples=0 {SMALL}')
    assert len(calls) == compiled

def test_what_bench_measures(here, monkeypatch, tmp_path):
    """ a clock that we hold: medians without the first two steps and the first text, rates, ratios to the first """
    turns, ids = [], set()
    spent = {'ar': iter([9, 9, 1, 4, 2, 9, 0.5, 1.5]), 'mdlm': iter([9, 9, 4, 9, 6, 9, 2, 4])} # steps, then texts
    now = [0.0]
    monkeypatch.setattr(time, 'perf_counter', lambda: now[0])
    def forward(kind, method):
        original = getattr(models.OBJECTIVES[kind], method)
        def counted(self, *args, **options):
            turns.append(kind)
            ids.update(args[0].flatten().tolist())
            now[0] += next(spent[kind])
            return original(self, *args, **options)
        return counted
    for kind in 'ar', 'mdlm':
        cls = models.OBJECTIVES[kind]
        forward_, generate_ = forward(kind, 'forward'), forward(kind, 'generate')
        monkeypatch.setattr(cls, 'forward', forward_)
        monkeypatch.setattr(cls, 'generate', generate_)
    class Spawn: # a process that takes three megabytes
        exitcode = 0
        Queue = lambda self: self
        Process = lambda self, target, args: self
        start = join = lambda self: None
        get = lambda self: 3_000_000
    monkeypatch.setattr(multiprocessing, 'get_context', lambda kind: Spawn())
    sizes = f'--repetitions=3 --samples=2 --batch_size=3 --sample_rows=2 {SMALL}'
    text = here(f'tools/bench.py objective=ar objective=mdlm {sizes} --output={tmp_path}/t.json')
    ar, mdlm = json.loads((tmp_path / 't.json').read_text())
    assert turns == ['ar', 'mdlm'] * 5 + ['ar', 'mdlm'] * 3 and max(ids) > 40 # of 65 ids, in turns
    assert (ar['train_ms'], mdlm['train_ms']) == (2000, 6000) and ar['train_peak_bytes'] == 3_000_000
    assert (ar['train_tokens_per_second'], mdlm['train_tokens_per_second']) == (12, 4)
    assert ar['sample_tokens_per_second'] == pytest.approx(2 * 7 / 1) and mdlm['calls'] == 7
    assert mdlm['sample_tokens_per_second'] == pytest.approx(2 * 7 / 3)
    row = [cell.strip() for cell in text.splitlines()[3].split('|')[1:-1]]
    assert row[2:] == ['6000.0', '4', '0.33', '3', '5', '0.33', '7'] and text.splitlines()[2].count('| 1.00 |') == 2

def test_a_training_step_of_bench(monkeypatch):
    """ on random ids of text: forward, backward, clipping, the optimizers; no gradient is left """
    settings, norms, clip = configure(bench.all_settings(), SMALL.split()), [], torch.nn.utils.clip_grad_norm_
    monkeypatch.setattr(torch.nn.utils, 'clip_grad_norm_', lambda p, norm: norms.append(norm) or clip(p, norm))
    for begin, limit in (True, 0.25), (False, 0.0):
        s = {**settings, 'begin': begin, 'batch_size': 40, 'grad_clip': limit}
        model, amp, optimizers = bench.build(s, 50)
        assert model.config.text_size == 50 and model.config.begin_id == (50 if begin else None)
        seen, before = [], model.lm_head.weight.clone()
        model.register_forward_pre_hook(lambda model, args: seen.append(args))
        bench.train_step(s, model, amp, optimizers, 50)
        (idx, targets), = seen
        assert idx.shape == (40, 8 + (not begin)) and torch.equal(idx, targets)
        assert set(idx.unique().tolist()) == set(range(50))
        assert not torch.equal(before, model.lm_head.weight) and all(p.grad is None for p in model.parameters())
    assert norms == [0.25, math.inf]

def test_how_bench_writes(monkeypatch):
    """ options that the model knows, and no others; the calls of a text are those that its last step says """
    asked = []
    def generate(self, idx, max_new_tokens, *, sampler=None, on_step=None):
        asked.append((idx.tolist(), max_new_tokens, sampler))
        on_step(1, idx, None, {'nfe': 2})
        on_step(2, idx, None, {'nfe': 5})
    settings = configure(bench.all_settings(), [*SMALL.split(), '--sampler=fixed', '--steps=3', '--objective=mdlm'])
    model, amp, _ = bench.build(settings, 50)
    takes = inspect.signature(model.generate).parameters
    assert bench.write(model, amp, 2, 6, settings) == 3 and 'steps' in takes
    monkeypatch.setattr(models.MDLM, 'generate', generate)
    assert bench.write(model, amp, 2, 6, settings) == 5 and asked == [([[0], [0]], 6, 'fixed')]
    assert bench.write(model, amp, 1, 4, {**settings, 'sampler': None}) == 5 and asked[1] == ([[0]], 4, None)

# ---- pictures

@pytest.mark.parametrize('args, edges, labels', [
    ('--objective=ar --block_size=5', [], ['text']),
    ('--objective=mdlm --block_size=4', [], ['text']),
    ('--objective=mdlm --attention=block --diffusion_block_size=3 --block_size=8', [], ['text']),
    ('--objective=bd3lm --diffusion_block_size=2 --block_size=6', [6], ['text xt', 'text x0']),
    ('--objective=bd3lm --diffusion_block_size=2 --block_size=4 --clean_causal=True', [4], ['text xt', 'text x0']),
    ('--objective=mdlm --segments=2,3,2 --block_size=7', [2, 5], ['segment 0', 'segment 1', 'segment 2']),
    ('--objective=mdlm --segments=2,4 --block_size=6 --diffusion_block_size=2', [2], ['segment 0', 'segment 1']),
    ('--objective=mdlm --segments=q:2,p:3 --block_size=5 --causal_within_block=True', [2], ['q', 'p']),
    ('--objective=bd3lm --segments=q:2,p:4 --diffusion_block_size=2 --block_size=6', [2, 6, 8],
     ['q xt', 'p xt', 'q x0', 'p x0']),
])
def test_the_picture_of_a_mask(monkeypatch, args, edges, labels):
    """ the rule, written out; lines where segments and streams begin, a name in the middle of each """
    config, own = plot.read_settings(args.split())
    monkeypatch.setattr(plot, 'objective', own['objective'])
    axes = MagicMock()
    plot.plot_mask(config, axes)
    assert axes.imshow.call_args.kwargs['vmin'] == 0 # where all cells are dark they are not the lightest
    shown, T = axes.imshow.call_args.args[0], config.block_size
    two = own['objective'] == 'bd3lm'
    cut = config.diffusion_block_size if two or config.attention == 'block' else None
    block = block_ids(config.attention, T, cut, config.lengths).tolist()
    assert shown.shape == (T * (1 + two),) * 2
    for i in range(len(shown)):
        for j in range(len(shown)):
            q, k, noisy = block[i % T], block[j % T], (two and i < T, two and j < T)
            same = q == k and (i >= j or not q or not config.causal_within_block)
            clean = q > k or same and not noisy[0] and (i >= j or not config.clean_causal)
            assert shown[i, j] == (same and noisy[0] if noisy[1] else clean), (i, j)
    for lines in axes.axhline, axes.axvline:
        assert [call.args[0] + 0.5 for call in lines.call_args_list] == edges
    middles = [(a + b - 1) / 2 for a, b in zip([0, *edges], [*edges, len(shown)])]
    assert axes.secondary_xaxis.return_value.set_xticks.call_args.args == (middles, labels)
    assert axes.secondary_yaxis.return_value.set_yticks.call_args.args == (middles, labels)
    assert f'{shown.sum()} pairs' in axes.set_title.call_args.args[0]

def test_the_picture_of_a_schedule(monkeypatch):
    monkeypatch.setattr(plot, 'horizon', 5)
    config, axes = plot.read_settings(['--df_scheduling_matrix=pyramid', '--df_sampling_timesteps=3'])[0], MagicMock()
    plot.plot_scheduling_matrix(config, axes)
    assert (axes.imshow.call_args.args[0] == models.scheduling_matrix('pyramid', 5, 3, 1.0).numpy()).all()
    assert '7 network calls for 5 tokens' in axes.set.call_args.kwargs['title']

def test_formats_of_pictures(here, tmp_path):
    pytest.importorskip('matplotlib')
    for name, begins in ('a.svg', b'<?xml'), ('a.PDF', b'%PDF'), ('b', None), ('new/a.png', b'\x89PNG'):
        path = here(f'tools/plot.py scheduling_matrix --horizon=4 --output={tmp_path}/{name}').strip()
        assert begins is None and path.endswith('b.png') or open(path, 'rb').read(5).startswith(begins or b'\x89PNG')
    assert sorted(os.listdir(tmp_path)) == ['a.PDF', 'a.svg', 'b.png', 'new'] # no temporary ones

def test_settings_of_pictures(tmp_path):
    """ a config counts as in training; then the command line; segments of a dataset, some skipped, decide the block """
   
    (tmp_path / 'c.py').write_text("objective = 'bd3lm'\nblock_size = 0\ndataset = 'arithmetic'\nmax_iters = 3\n")
    config, own = plot.read_settings([f'{tmp_path}/c.py', '--skip=plan', '--horizon=3'])
    assert config.segments == 'question:136,execution:32' and config.block_size == 168
    assert config.attention == 'hierarchical' and own['horizon'] == 3 and own['objective'] == 'bd3lm'
    assert plot.read_settings(['--objective=mdlm', '--segments=2,2,4', '--block_size=0'])[0].block_size == 8
    assert plot.read_settings(['--dataset=shakespeare_char'])[0].segments is None
