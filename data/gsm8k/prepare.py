"""
GSM8K (https://arxiv.org/abs/2110.14168): 8,792 grade school word problems as records of question, plan and execution.
$ python prepare.py gsm8k --tokenizer=byte --question_len=256 --plan_len=256 --exec_len=512
$ python prepare.py gsm8k --input=FOLDER   # train.jsonl and test.jsonl that you have, better with train_socratic.jsonl and test_socratic.jsonl

Plan: the sub-question before every step of the solution, where both splits come with them. Else, for both, the steps themselves with
a ? in place of everything from the first number or calculation of a line to the last. Execution: the steps, the calculator's
<<48/2=24>> taken out unless --marks=True, then #### and the answer. The last 500 records of train are val.
--max_records=1000 takes only the first so many of each file; 0: all.
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
    """ the rule for plans where there are no sub-questions: 'She sold 48/2 = <<48/2=24>>24 clips in May.' -> 'She sold ? clips in May.' """
    return re.sub(r'\$?[\d(<].*[\d)>]%?', '?', step)

def record(found, marks, where):
    """ {question, answer} -> {question, plan, execution} """
    *steps, answer = found['answer'].strip().split('\n')
    if not answer.startswith('#### ') or not steps:
        raise PrepareError(f"{where}: the field 'answer' ends in {answer[:40]!r}, expected steps and then a line like '#### 42'")
    parts = [step.split(' ** ', 1) for step in steps]
    strip = (lambda text: text) if marks else (lambda text: re.sub(r'<<[^<>]*>>', '', text))
    return {'question': found['question'].strip(), 'plan': '\n'.join(p[0] if len(p) == 2 else without_numbers(p[0]) for p in parts),
            'execution': '\n'.join([strip(p[-1]) for p in parts] + [answer])}

def corpus(folder, input='', url=URL, max_records=0, marks=False):
    read_records = load(os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), 'records'), 'prepare.py').read_records
    have = lambda name: os.path.exists(os.path.join(input, name))
    socratic = not input or have('train_socratic.jsonl') and have('test_socratic.jsonl')
    found = {}
    for split in 'train', 'test':
        name = f"{split}{'_socratic' * socratic}.jsonl"
        path = os.path.join(input, name) if input else download(f'{url}/{name}', os.path.join(folder, name), SUMS.get(name, '') if url == URL else '')
        found[split] = [record(r, marks, f"{path}, record {i}") for i, r in enumerate(read_records(path, ['question', 'answer'], max_records), 1)]
    print(f"plans: {'the sub-questions of the data' if socratic else 'steps with ? for their numbers, as not both splits have sub-questions here'}")
    n = min(VAL, len(found['train']) // 2)
    return {'splits': {'train': found['train'][:-n], 'val': found['train'][-n:], 'test': found['test']}, 'closed': True,
            'source': input or url, 'plans': 'socratic' if socratic else 'steps without numbers', 'licence': 'MIT'}
