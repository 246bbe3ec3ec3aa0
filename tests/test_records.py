"""
Laws of records: what a file says comes out as rows and back. Everything malformed is one sentence that names the file,
the record and the field.
"""
import json
import os
import random
import re
import subprocess
import sys

import numpy as np
import pytest

import prepare
from prepare import Layout, PrepareError, Records, open_corpus
from tests.test_prepare import refused, run, write

TEN = [{'id': f'r{i}', 'question': f'What is {i} + {i}?', 'plan': f'Add {i} to itself.',
        'execution': f'{i} + {i} = {2 * i}\n#### {2 * i}'} for i in range(10)]
LENGTHS = dict(question_len=24, plan_len=24, exec_len=32)
META = dict(end_id=5, pad_id=8, segments='question:4,plan:4,execution:8')
RAW = Layout(META).raw([[[1, 2], [3], [1, 2, 3, 4, 0]], [[1, 2, 3], [4, 4, 4], []]])

def mine(tmp_path, records=TEN, **settings):
    path = write(tmp_path / 'my.json', records if isinstance(records, str) else json.dumps(records))
    return prepare.prepare('records', str(tmp_path / 'mine'), input=str(path), **settings)

def contents(folder):
    """ the records of a prepared folder, train first """
    corpus = Records(folder)
    layout = Layout(corpus.meta, range(corpus.layout.edges[-1]))
    rows = [row for split in ('train', 'val') for row in corpus.raw(split, slice(None))]
    return [{name: corpus.tokenizer.decode(ids) for name, ids in layout.parts(row).items()} for row in rows]

def test_what_goes_in_comes_out(tmp_path, capsys):
    """ of an array and of JSON Lines alike; three rows are shown; the last tenth is val """
    folder = mine(tmp_path, **LENGTHS)
    shown, corpus = capsys.readouterr().out, Records(folder)
    assert shown.count('[question]') == shown.count('[plan]') == 3
    assert '[execution]\n2 + 2 = 4\n#### 4' in shown.replace('] ', ']\n')
    assert contents(folder) == [{k: v for k, v in r.items() if k != 'id'} for r in TEN]
    assert corpus.n_windows('train') == 9
    characters = sum(len(r[k]) for r in TEN[:9] for k in ('question', 'plan', 'execution'))
    assert corpus.meta['splits']['train']['characters'] == characters
    lines = mine(tmp_path / 'lines', '\n'.join(map(json.dumps, TEN)) + '\n\n', **LENGTHS)
    for file in 'train.bin', 'val.bin':
        assert (tmp_path / 'mine' / file).read_bytes() == open(os.path.join(lines, file), 'rb').read()
    assert open_corpus(folder, 0)[1] == open_corpus(folder, 80)[1] == 80 and open_corpus(folder, 0, 'plan')[1] == 56
    assert Records(mine(tmp_path / 'few', max_records=4, **LENGTHS)).n_windows('train') == 3

@pytest.mark.parametrize('content, says', [
    ('[{"question": "a", "plan": "b"}, {"question": 1, "plan"', ['my.json', 'neither', 'line 1']),
    ('{"question": "a", "plan": "b", "execution": "c"}\n{"question": ', ['my.json', 'line 2']),
    (json.dumps(TEN[:2] + [{**TEN[2], 'plan': None}]),
     ['my.json, record 3', "'r2'", "'plan' is null", 'expected text']),
    (json.dumps(TEN[:1] + [{'question': 'a', 'pan': 'b', 'execution': 'c'}]),
     ['my.json, record 2', "no field 'plan'", 'did you mean pan']),
    (json.dumps([TEN[0], [1, 2]]),
     ['my.json, record 2', '[1, 2]', 'an object with the fields question, plan, execution']),
    (json.dumps(TEN[:1]), ['1 records', 'at least 2']),
    (json.dumps([{**r, 'execution': ' '} for r in TEN]), ['record 1', "'execution'", 'expected text']),
])
def test_malformed_files(tmp_path, content, says):
    with pytest.raises(PrepareError) as e:
        mine(tmp_path, content)
    assert [words for words in says if words not in str(e.value)] == []
    assert not (tmp_path / 'mine').exists()

def test_wrong_commands(tmp_path):
    path = write(tmp_path / 'my.json', json.dumps(TEN))
    for args, says in [('segments=question:8,plan:8 plan_len=8', 'give only one'),
                       ('segments=128,128', 'names and lengths'),
                       ('segments=question:32,answer:8', "no field 'answer'"), ('plan_len=1', '2 or more'),
                       ('max_records=1', 'max_records is 1'), ('too_long=keep', 'drop or truncate'),
                       ('segments=question:32,execution:40 too_long=drop plan_len=9', 'give only one'),
                       ('exec_len=8', 'no record of train fits')]:
        settings = dict(arg.split('=') for arg in args.split())
        settings = {key: int(value) if value.isdigit() else value for key, value in settings.items()}
        with pytest.raises(PrepareError, match=says):
            prepare.prepare('records', str(tmp_path / 'x'), input=str(path), **settings)
    refused('records', f'--input={path}', '--plan_len=8', '--segments=question:8,plan:8', f'--dataset={tmp_path}/x',
            says=['--segments=', 'only one'])
    refused('records', f'--input={tmp_path}/none.json', f'--dataset={tmp_path}/x', says='cannot read')
    refused('text', f'--input={path}', '--plan_len=8', f'--dataset={tmp_path}/x', says='no use for --plan_len')
    folder = mine(tmp_path, **LENGTHS)
    for args, says in [((folder, 100), 'add up to 80 tokens, block_size is 100'),
                       ((folder, 0, 'pln'), 'did you mean plan'),
                       ((folder, 0, 'question'), 'expected some of plan')]:
        with pytest.raises(PrepareError, match=says):
            open_corpus(*args)
    with pytest.raises(PrepareError, match='rows of segments'):
        prepare.Corpus(folder)
    says = 'plan begins at token 24 and has 24 tokens, no whole blocks of diffusion_block_size=16'
    with pytest.raises(PrepareError, match=says):
        Layout({**META, 'segments': 'question:24,plan:24'}, [0] * 24 + [1] * 16 + [2] * 8)

def test_too_long_is_dropped_or_cut_and_counted(tmp_path):
    records = TEN[:4] + [{**TEN[4], 'plan': 'p' * 24}] + TEN[5:]
    for how, n in ('drop', 8), ('truncate', 9):
        corpus = Records(mine(tmp_path / how, records, too_long=how, **LENGTHS))
        train = corpus.meta['splits']['train']
        plan = train['segments']['plan']
        assert corpus.n_windows('train') == train['records'] == n and train['too_long'] == 1
        assert plan == {'too_long': 1, 'longest': 25, 'mean': plan['mean']}
    row = Layout(corpus.meta, range(80)).parts(corpus.raw('train', [4])[0])
    assert corpus.tokenizer.decode(row['plan']) == 'p' * 23
    fitted = Records(mine(tmp_path / 'var', var_length=True))
    assert fitted.meta['segments'] == 'question:16,plan:32,execution:32' # ends included: 15, 19, 17
    report = fitted.meta['splits']['val'] # one record, the tenth
    sizes = {k: len(TEN[9][k]) + 1 for k in ('question', 'plan', 'execution')}
    assert report['segments'] == {k: {'too_long': 0, 'longest': n, 'mean': float(n)} for k, n in sizes.items()}
    sizes = [len(r['plan']) + 1 for r in records[:9]]
    assert train['segments']['plan']['mean'] == round(sum(sizes) / 9, 1)
    longer = TEN[:9] + [{**TEN[9], 'question': 'q' * 50}] # that of val counts too
    longer = Records(mine(tmp_path / 'longer', longer, var_length=True))
    assert longer.meta['segments'] == 'question:64,plan:32,execution:32'

def test_four_levels_and_plain_text(tmp_path):
    folder = mine(tmp_path, [{**r, 'check': 'ok'} for r in TEN], segments='question:24,plan:24,check:8,execution:32')
    assert [*Records(folder).layout.lengths] == ['question', 'plan', 'check', 'execution']
    assert Records(folder, 'plan,check').meta['segments'] == 'question:24,execution:32'
    book = write(tmp_path / 'book.txt', '\n\n'.join(' '.join(f'{p}{w}' for w in range(8)) for p in 'abcd'))
    first = contents(prepare.prepare('records', str(tmp_path / 'book'), input=str(book)))[0]
    assert first == {'question': 'a0 a1', 'plan': 'a2 a3', 'execution': 'a4 a5 a6 a7'}

# ---- as editors write them

PARAGRAPHS = [' '.join(f'{p}{w}' for w in range(8)) for p in 'abcd']
SPLITS = [{'question': f'{p}0 {p}1', 'plan': f'{p}2 {p}3', 'execution': f'{p}4 {p}5 {p}6 {p}7'} for p in 'abcd']

@pytest.mark.parametrize('name', ['a.txt', 'A.TXT', 'a.Txt', 'a.text'])
@pytest.mark.parametrize('blank', ['\n\n', '\r\n\r\n', '\r\r', '\n \n', '\n\t \n', '\r\n \t\r\n', '\n\n\n\n', '\n\r\n',
                                   '\n\xa0\n', '\n \n\t\n\n'])
def test_paragraphs_of_every_system(tmp_path, name, blank):
    for first, last in ('', ''), ('\ufeff', blank), (blank, '\n'):
        text = first + blank.join(PARAGRAPHS[:2] + ['too short'] + PARAGRAPHS[2:]) + last
        path = write(tmp_path / name, text.replace('a3 ', 'a3\r\n')) # a line end within a paragraph
        assert contents(prepare.prepare('records', str(tmp_path / 'out'), input=str(path))) == SPLITS
    for n, says in (1, 'max_records is 1, expected 0'), (-1, 'max_records is -1, expected 0'):
        with pytest.raises(PrepareError, match=says):
            prepare.prepare('records', str(tmp_path / 'out'), input=str(path), max_records=n)

@pytest.mark.parametrize('name', ['a.json', 'A.JSONL'])
@pytest.mark.parametrize('end', ['\n', '\r\n', '\r'])
@pytest.mark.parametrize('mark, encoding', [('', 'utf-8'), ('\ufeff', 'utf-8'), ('\ufeff', 'utf-16-le')])
def test_json_of_every_system(tmp_path, name, end, mark, encoding):
    """ an array, pretty printed, and lines of JSON, some of them blank, two files put together """
    records = [{**r, 'plan': r['plan'] + '\r\nThen\rsay so. 😀\u2028'} for r in TEN] # a JSON string holds any line end
    one = '\n'.join(map(json.dumps, records[:5]))
    two = '\n'.join(f' {json.dumps(r, ensure_ascii=False)}\t' for r in records[5:])
    for text in json.dumps(records, indent=1), f'\n{one}\n \t\n\n{mark}{two}', one + '\n' + two + '\n \n\n':
        path = write(tmp_path / name, (mark + text.replace('\n', end)).encode(encoding))
        found = contents(prepare.prepare('records', str(tmp_path / 'out'), input=str(path)))
        unix = lambda text: text.replace('\r\n', '\n').replace('\r', '\n')
        assert found == [{k: unix(v) for k, v in r.items() if k != 'id'} for r in records]

def test_a_field_that_is_asked_for_is_no_suggestion(tmp_path):
    for record, suggests in [(dict(question='a', plan='b'), '$'),
                             (dict(question='a', plan='b', plam2='c'), '; did you mean plam2')]:
        with pytest.raises(PrepareError, match=f"record 1 has no field 'plan2', only .*'{suggests}"):
            mine(tmp_path, [record] * 3, segments='question:8,plan:8,plan2:8')

@pytest.mark.parametrize('share, val', [(0.1, 1), (0.5, 5), (0.01, 1), (0.99, 9), (0.3, 3)])
def test_the_last_records_are_val(tmp_path, share, val):
    folder = mine(tmp_path, val_fraction=share)
    assert Records(folder).n_windows('val') == val and Records(folder).n_windows('train') == 10 - val
    assert [r['question'] for r in contents(folder)] == [r['question'] for r in TEN]

def test_shares_and_segments_that_make_no_sense(tmp_path):
    for share in 0, 1, -0.5, float('nan'):
        with pytest.raises(PrepareError, match='val_fraction is .*, expected a share between 0 and 1'):
            mine(tmp_path, val_fraction=share)
    for text in ('question:8', 'question:8,plan:8,plan:9', 'question:8,plan:1', 'question:8,plan:-8',
                 'question:8,plan:', 'question:8,:8', 'question:8,a b:8', '', 'question:8,,plan:8',
                 'question:8,plan:2.5', 'question:8,plan:²', 'question:8,plan:1000000',
                 'question:8,plan:' + '9' * 5000):
        with pytest.raises(PrepareError, match='expected names and lengths of 2 or more tokens'):
            prepare.read_segments(text)
    assert prepare.read_segments(' question : 8, plan:2') == {'question': 8, 'plan': 2}

def test_every_record_is_drawn_and_counted(tmp_path):
    """ the first and the last too; tokens are those of the segments in use """
    folder = mine(tmp_path, **LENGTHS)
    corpus, rng = Records(folder), np.random.default_rng(0)
    rows = {bytes(row) for row in corpus.batch('train', 500, 80, rng)['idx']}
    assert rows == {bytes(row) for batch in corpus.windows('train', 4, 80) for row in batch['idx']} and len(rows) == 9
    skipping = Records(folder, 'plan')
    assert corpus.tokens('train') == 9 * 80 and skipping.tokens('train') == 9 * 56 and skipping.n_windows('train') == 9

def test_what_no_record_can_hold(tmp_path):
    says = "my.json, record 2 .*'plan' has half of a character, .*ud83d.*, expected text"
    with pytest.raises(PrepareError, match=says):
        mine(tmp_path, [TEN[0], {**TEN[1], 'plan': 'cut \ud83d'}])
    with pytest.raises(PrepareError, match='plain text is a file that ends in .txt'):
        mine(tmp_path, '\n\n'.join(PARAGRAPHS))

# ---- rows: end 5, pad 8

@pytest.mark.parametrize('ids, idx, blocks', [
    ([0] * 4 + [1, 1, 2, 2] + [3, 3, 4, 4, 5, 5, 6, 6],
     [1, 2, 5, 8, 3, 5, 8, 8, 1, 2, 3, 4, 0, 5, 8, 8],
     [0, 0, 0, 7, 1, 1, 7, 7, 3, 3, 4, 4, 5, 5, 7, 7]),
    ([0] * 4 + [1] * 4 + [2] * 4 + [3] * 4,
     [1, 2, 5, 8, 3, 5, 5, 5, 1, 2, 3, 4, 0, 5, 5, 5],
     [0, 0, 0, 4, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3]),
    ([0] * 4 + [1] * 4 + [2] * 8,
     [1, 2, 5, 8, 3, 5, 5, 5, 1, 2, 3, 4, 0, 5, 5, 5],
     [0, 0, 0, 3, 1, 1, 1, 1, 2, 2, 2, 2, 2, 2, 2, 2]),
    ([0] * 16,
     [1, 2, 5, 8, 3, 5, 5, 5, 1, 2, 3, 4, 0, 5, 5, 5],
     [0, 0, 0, 1] + [0] * 12),
])
def test_a_block_of_an_end_is_ends_and_what_is_wholly_past_it_is_pads(ids, idx, blocks):
    batch = Layout(META, ids).rows(RAW)
    assert batch['idx'][0].tolist() == idx and batch['block_ids'][0].tolist() == blocks
    scored = [-1] * 4 + [x if x != 8 else -1 for x in idx[4:]]
    assert batch['targets'][0].tolist() == scored
    assert Layout(META, ids).rows(RAW, only=[1])['targets'][0].tolist() == scored[:8] + [-1] * 8
    ends = 8 if len(set(ids)) == 1 else ids.count(ids[8]) # of the empty execution of the second record
    assert batch['idx'][1, 8:].tolist() == [5] * ends + [8] * (8 - ends)
    for row, parts in zip(batch['idx'], [[[1, 2], [3], [1, 2, 3, 4, 0]], [[1, 2, 3], [4, 4, 4], []]]):
        assert [p.tolist() for p in Layout(META, ids).parts(row).values()] == parts

def test_packed_rows_and_prompts():
    layout = Layout(META)
    batch = layout.rows(RAW, length=17)
    assert 'block_ids' not in batch
    assert batch['idx'].tolist() == [[1, 2, 5, 3, 5, 1, 2, 3, 4, 0, 5] + [8] * 6,
                                     [1, 2, 3, 5, 4, 4, 4, 5, 5] + [8] * 8]
    assert batch['targets'].tolist() == [[-1] * 3 + [3, 5, 1, 2, 3, 4, 0, 5] + [-1] * 6,
                                         [-1] * 4 + [4, 4, 4, 5, 5] + [-1] * 8]
    assert layout.rows(RAW, only=[2])['targets'][0, :12].tolist() == [-1] * 5 + [1, 2, 3, 4, 0, 5, -1]
    assert [p.tolist() for p in layout.parts(batch['idx'][0]).values()] == [[1, 2], [3], [1, 2, 3, 4, 0]]
    begun = layout.parts([1, 2, 5, 3, -1])
    assert [*begun] == ['question', 'plan'] and begun['plan'].tolist() == [3]
    asked = layout.prompt([np.array([1]), np.array([1, 2, 3])])
    assert asked['idx'].tolist() == [[1, 5, -1, -1], [1, 2, 3, 5]] and asked['max_new_tokens'] == 12
    slots = Layout(META, [0] * 4 + [1] * 4 + [2] * 8).prompt([np.array([1])])
    assert slots['idx'].tolist() == [[1, 5, 8, 8] + [-1] * 12]
    assert slots['block_ids'].tolist() == [[0, 0, 3, 3] + [1] * 4 + [2] * 8]
    with pytest.raises(PrepareError, match='the question has 4 tokens, this model reads at most 3'):
        layout.prompt([np.arange(4)])

def test_the_curriculum_scores_segments_one_by_one(tmp_path):
    corpus = Records(mine(tmp_path, **LENGTHS))
    corpus.layout = Layout(corpus.meta, [0] * 24 + [1] * 24 + [2] * 32)
    for done, scored in (0.0, [24, 48]), (0.99, [24, 48]), (1.0, [24, 80]), (7.0, [24, 80]):
        targets = corpus.batch('train', 5, 80, np.random.default_rng(0), done)['targets']
        assert (targets != -1).all(0).nonzero()[0].tolist() == list(range(*scored))
    sizes = lambda *limit: [len(b['idx']) for b in corpus.windows('train', 4, 80, *limit)]
    assert sum(sizes()) == 9 and sizes(5) == [4, 1]

# ---- the data that comes along

def arithmetic(file='prepare.py'):
    return prepare.load(os.path.join(prepare._DATA, 'arithmetic'), file)

def test_arithmetic_is_right_and_its_splits_are_disjoint():
    make = lambda **more: arithmetic().corpus(difficulty=3, **more)['splits']
    splits, check = make(max_records=2000), arithmetic('check.py')
    questions = [r['question'] for records in splits.values() for r in records]
    assert len(set(questions)) == 2000 and min(map(len, splits.values())) > 100
    assert splits == make(max_records=2000) != make(max_records=2000, seed=1)
    others = make(max_records=5000, seed=1)['test']
    assert not set(r['question'] for r in others) & set(r['question'] for r in splits['train'])
    for r in splits['train']:
        needed = [r['facts'].split()[0], *(step.split()[0] for step in r['plan'].split('\n'))]
        told = re.findall(r'[A-Z][^.?]*\.', r['question'])
        assert sorted(r['facts'].split('\n')) == sorted(fact for fact in told if fact.split()[0] in needed)
        # the plan alone and the question make the answer
        facts = dict(re.findall(r'(\w+) has (\d) (?!more|fewer|times)', r['question']))
        for step in r['plan'].split('\n'):
            name, _, other, op, n = step.split()
            facts[name] = str(eval(f'{facts[other]} {op} {n}'))
            words = 'more than', 'fewer than', 'times as many as'
            assert any(f"{name} has {n} {word} {other}." in r['question'] for word in words)
        assert r['execution'].endswith(f'#### {facts[name]}') and r['question'].endswith(f'How many has {name}?')
        assert all(eval(line.replace('=', '==')) for line in r['execution'].split('\n')[:-1])
    assert check.same_plan('Bob = Ann + 5\nCid = Bob * 2', 'Dan = Ann - 1\nBob = Ann + 5\nCid = Bob * 2')
    for other in 'Cid = Bob * 2\nBob = Ann + 5', 'Bob = Ann + 5', 'Bob = Ann + 4\nCid = Bob * 2', 'nonsense', '':
        assert not check.same_plan(other, 'Bob = Ann + 5\nCid = Bob * 2')

def test_problems_are_as_hard_as_they_should_be():
    """ every number of steps equally often, and no number above 99 on the way """
    script = arithmetic()
    records = sum(script.corpus(difficulty=4, max_records=4000)['splits'].values(), [])
    steps = [len(r['plan'].split('\n')) for r in records]
    even = {n: abs(steps.count(n) - 1000) < 30 for n in set(steps)} # some problems come twice and count once
    assert even == {1: True, 2: True, 3: True, 4: True}
    numbers = [int(n) for r in records for n in re.findall(r'\d+', r['execution'])]
    assert min(numbers) == 1 and max(numbers) == 99
    for n in 99, 10 ** 13:
        with pytest.raises(PrepareError, match=f'max_records is {n}, expected 100 to 10,000,000 problems'):
            script.corpus(max_records=n)
    with pytest.raises(PrepareError, match='seed is -1, expected 0 or more'): # python's generator would take it for 1
        script.corpus(seed=-1)

def test_the_split_of_a_problem_is_the_same_everywhere():
    """ in processes that hash text differently, and next year """
    code = ("import os, prepare; script = prepare.load(os.path.join(prepare._DATA, 'arithmetic'), 'prepare.py'); "
            "splits = script.corpus(max_records=200)['splits']; "
            "print([[r['question'] for r in records] for records in splits.values()])")
    root, found = os.path.dirname(prepare.__file__), []
    for n in '0', '1', '77':
        done = subprocess.run([sys.executable, '-c', code], cwd=root, env={**os.environ, 'PYTHONHASHSEED': n},
                              capture_output=True, text=True, check=True)
        found.append(done.stdout)
    assert found[0] == found[1] == found[2] and len(found[0]) > 1000
    script = arithmetic()
    assert ''.join(script.split_of(f'question {n}')[1] for n in range(40)) == 'errrrrrarrrrrrrrrrrrrrrrerrrrarrrrraraer'

def test_problems_can_run_out(monkeypatch):
    script = arithmetic()
    monkeypatch.setattr(script, 'NAMES', ['Ann', 'Bob', 'Cid'])
    monkeypatch.setattr(script, 'THINGS', ['figs'])
    problem = script.problem
    few = lambda rng, steps: problem(random.Random(rng.randint(0, 50)), steps)
    monkeypatch.setattr(script, 'problem', few)
    for n in 100, 10_000_000: # said as soon as it is clear
        with pytest.raises(PrepareError, match=f'there are not so many as {n} problems .*ask for fewer'):
            script.corpus(difficulty=1, max_records=n)

def test_gsm8k_plans(tmp_path, monkeypatch):
    solution = 'She sold 48/2 = <<48/2=24>>24 clips in May.\nShe paid $<<5*2=10>>10.\nSo she is done.\n#### 24'
    socratic = 'How many in May? ** ' + solution.replace('\nShe', '\nHow much? ** She')
    socratic = socratic.replace('\nSo', '\nIs she? ** So')
    plain = [{'question': f'Q{i}', 'answer': solution} for i in range(4)]
    for split in 'train', 'test':
        write(tmp_path / f'{split}.jsonl', '\n'.join(map(json.dumps, plain)))
    write(tmp_path / 'test_socratic.jsonl', '\n'.join(json.dumps({**r, 'answer': socratic}) for r in plain))
    script = prepare.load(os.path.join(prepare._DATA, 'gsm8k'), 'prepare.py')
    monkeypatch.setattr(script, 'VAL', 1)
    alone = script.corpus('', input=str(tmp_path))['splits']
    assert [r['question'] for r in alone['train']] == ['Q0', 'Q1', 'Q2']
    assert [r['question'] for r in alone['val']] == ['Q3'] # the last
    monkeypatch.setattr(script, 'VAL', 500)
    found = script.corpus('', input=str(tmp_path))['splits'] # one rule for both splits
    assert {k: len(v) for k, v in found.items()} == {'train': 2, 'val': 2, 'test': 4}
    for r in found['train'] + found['test']:
        assert r['plan'] == 'She sold ? clips in May.\nShe paid ?.\nSo she is done.'
        assert r['execution'] == 'She sold 48/2 = 24 clips in May.\nShe paid $10.\nSo she is done.\n#### 24'
    windows = [json.dumps({**r, 'answer': r['answer'].replace('\n', '\r\n')}) for r in plain]
    for split in 'train', 'test':
        write(tmp_path / f'{split}.jsonl', '\ufeff' + '\r\n\r\n'.join(windows))
    assert script.corpus('', input=str(tmp_path))['splits'] == found
    write(tmp_path / 'train_socratic.jsonl', (tmp_path / 'test_socratic.jsonl').read_text())
    sums, copy = [], str(tmp_path / 'train_socratic.jsonl') # sums: of the usual files, not of those from elsewhere
    monkeypatch.setattr(script, 'download', lambda url, path, expected: sums.append(expected) or copy)
    assert script.corpus('nowhere') and script.corpus('nowhere', url='elsewhere')
    assert sums == ['', script.SUMS['test_socratic.jsonl'], '', '']
    found = script.corpus('', input=str(tmp_path), marks=True)['splits']
    assert found['val'][0]['plan'] == 'How many in May?\nHow much?\nIs she?'
    assert found['test'][0]['execution'] == solution
    write(tmp_path / 'test_socratic.jsonl', json.dumps(plain[0]) + '\n' + json.dumps({**plain[0], 'answer': '24'}))
    with pytest.raises(PrepareError, match="test_socratic.jsonl, record 2: the field 'answer' ends in '24'"):
        script.corpus('', input=str(tmp_path))

def test_the_command(tmp_path):
    code, out, err = run('arithmetic', '--max_records=200', '--difficulty=1', f'--dataset={tmp_path}/a')
    assert code == 0, err
    assert out.count('[plan]') == 3 and 'records of question:136,plan:32,execution:32; 0 were too long' in out
