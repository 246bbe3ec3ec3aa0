"""
GSM8K (https://arxiv.org/abs/2110.14168): 8,792 grade school word problems as records of question, plan and execution.
$ python prepare.py gsm8k --tokenizer=byte --question_len=256 --plan_len=256 --exec_len=512
$ python prepare.py gsm8k --input=FOLDER

FOLDER has your copies of train.jsonl and test.jsonl, better also of train_socratic.jsonl and test_socratic.jsonl.
Plan: the sub-questions that the socratic files have before every step of the solution. If one of these files is
missing, the plans of both splits are the steps of the solution without their numbers: in every line a ? replaces
everything from the first number or calculation to the last.
Execution: the steps of the solution, then #### and the answer. The calculator's <<48/2=24>> are taken out, unless
--marks=True. The last 500 records of train are val. --max_records=1000 takes the first 1,000 of each file; 0: all.
"""
import os
import re

from prepare import PrepareError, download, load

tokenizer = 'gpt2'
segments = 'question:128,plan:128,execution:256'
URL = 'https://raw.githubusercontent.com/openai/grade-school-math/master/grade_school_math/data'
SUMS = {'train.jsonl': '17f347dc51477c50d4efb83959dbb7c56297aba886e5544ee2aaed3024813465',
        'test.jsonl': '3730d312f6e3440559ace48831e51066acaca737f6eabec99bccb9e4b3c39d14',
        'test_socratic.jsonl': 'c96673362fa7a699f4836a9b6474a067448f95fe58064727501ee63ba4c3fdb6'}
VAL = 500

def without_numbers(step):
    """ 'She sold 48/2 = <<48/2=24>>24 clips in May.' -> 'She sold ? clips in May.': a plan without sub-questions """
    return re.sub(r'\$?[\d(<].*[\d)>]%?', '?', step)

def record(found, marks, where):
    """ {question, answer} -> {question, plan, execution}, all of them text. where: words for the record, for errors """
    *steps, answer = found['answer'].strip().split('\n')
    if not answer.startswith('#### ') or not steps:
        raise PrepareError(f"{where}: the field 'answer' ends in {answer[:40]!r}, expected steps and then a line "
                           "like '#### 42'")
    plan, execution = [], []
    for step in steps:
        question, socratic, solution = step.partition(' ** ') # all of the step is in question if there is no **
        plan.append(question if socratic else without_numbers(step))
        solution = solution if socratic else step
        execution.append(solution if marks else re.sub(r'<<[^<>]*>>', '', solution))
    return {'question': found['question'].strip(), 'plan': '\n'.join(plan),
            'execution': '\n'.join([*execution, answer])}

def corpus(folder, input='', url=URL, max_records=0, marks=False):
    data = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    read_records = load(os.path.join(data, 'records'), 'prepare.py').read_records
    have = lambda name: os.path.exists(os.path.join(input, name))
    socratic = not input or have('train_socratic.jsonl') and have('test_socratic.jsonl')
    found = {}
    for split in 'train', 'test':
        name = f"{split}{'_socratic' * socratic}.jsonl"
        if input:
            path = os.path.join(input, name)
        else:
            expected = SUMS.get(name, '') if url == URL else ''
            path = download(f'{url}/{name}', os.path.join(folder, name), expected)
        records = read_records(path, ['question', 'answer'], max_records)
        found[split] = [record(r, marks, f"{path}, record {i}") for i, r in enumerate(records, 1)]
    print('plans:', 'the sub-questions of the data' if socratic else
          'steps with ? for their numbers, as not both splits have sub-questions here')
    n = min(VAL, len(found['train']) // 2)
    return {'splits': {'train': found['train'][:-n], 'val': found['train'][-n:], 'test': found['test']}, 'closed': True,
            'source': input or url, 'plans': 'socratic' if socratic else 'steps without numbers', 'licence': 'MIT'}
