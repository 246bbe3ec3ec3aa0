"""
Word problems in several steps. They are generated: no network is needed, and there are as many as you like.
$ python prepare.py arithmetic
$ python prepare.py arithmetic --difficulty=3 --max_records=200000 --dataset=arithmetic3 \
      --question_len=144 --plan_len=48 --exec_len=48

question    Ann has 7 figs. Cid has 2 times as many as Bob. Bob has 5 more than Ann. How many has Cid?
plan        Bob = Ann + 5
            Cid = Bob * 2
execution   7 + 5 = 12
            12 * 2 = 24
            #### 24
Facts come in any order, and one more fact is of no use. The plan has only the steps that are needed, in an order that
works. A fourth segment can be asked for by name: `facts` repeats the facts that are needed, in the order of the plan.
$ python prepare.py arithmetic --dataset=arithmetic4 --segments=question:136,facts:96,plan:32,execution:32

A problem takes 1 to `difficulty` steps, each number of steps equally often. There are `max_records` problems in all;
another `seed` gives other problems. The question of a problem decides which split it belongs to, so no problem is in
two splits, whatever the seed and the number of problems. Numbers are 1 to 9 in the question, and 1 to 99 on the way.
"""
import random
import zlib

from prepare import PrepareError

tokenizer = 'char'
segments = 'question:136,plan:32,execution:32'
NAMES = 'Ann Bob Cid Dan Eve Fay Gus Hal Ida Jon'.split()
THINGS = 'cups figs hats pens toys'.split()
OPS = { # sign: (how the question says it, what it does)
    '+': ('{a} has {n} more than {b}.', lambda x, n: x + n),
    '-': ('{a} has {n} fewer than {b}.', lambda x, n: x - n),
    '*': ('{a} has {n} times as many as {b}.', lambda x, n: x * n),
}

def problem(rng, steps):
    """ a record, {segment: text}, whose plan has that many steps. rng: a random.Random """
    while True:
        names, thing = rng.sample(NAMES, steps + 2), rng.choice(THINGS)
        values = {names[0]: rng.randint(1, 9)}
        facts, plan, execution = [f"{names[0]} has {values[names[0]]} {thing}."], [], []
        for i, name in enumerate(names[1:]):
            other = names[i] if i < steps else rng.choice(names[:steps]) # the last fact is of no use
            op, n = rng.choice('+-*'), rng.randint(2, 9)
            n = rng.randint(2, 3) if op == '*' else n
            text, f = OPS[op]
            values[name] = f(values[other], n)
            facts.append(text.format(a=name, b=other, n=n))
            plan.append(f"{name} = {other} {op} {n}")
            execution.append(f"{values[other]} {op} {n} = {values[name]}")
        if all(1 <= value <= 99 for value in values.values()):
            break
    asked = names[steps]
    needed = facts[:steps + 1]
    rng.shuffle(facts)
    return {'facts': '\n'.join(needed),
            'question': ' '.join(facts + [f"How many has {asked}?"]),
            'plan': '\n'.join(plan[:steps]),
            'execution': '\n'.join(execution[:steps] + [f"#### {values[asked]}"])}

def split_of(question):
    """ 'train', 'val' or 'test': a tenth of all problems is val and a tenth is test """
    return {0: 'val', 1: 'test'}.get(zlib.crc32(question.encode()) % 10, 'train')

def corpus(difficulty=2, max_records=50_000, seed=0):
    if not 1 <= difficulty <= len(NAMES) - 2:
        raise PrepareError(f"difficulty is {difficulty}, expected 1 to {len(NAMES) - 2} steps")
    if seed < 0: # python's generator treats -1 as 1
        raise PrepareError(f"seed is {seed}, expected 0 or more")
    if not 100 <= max_records <= 10_000_000: # val and test are a tenth each
        raise PrepareError(f"max_records is {max_records}, expected 100 to 10,000,000 problems")
    rng, seen, splits = random.Random(seed), set(), {'train': [], 'val': [], 'test': []}
    tried = 0
    while len(seen) < max_records:
        tried += 1
        record = problem(rng, 1 + tried % difficulty)
        if record['question'] not in seen:
            seen.add(record['question'])
            splits[split_of(record['question'])].append(record)
        elif tried > 100 * max(100, len(seen)): # hardly any problem is new any more
            raise PrepareError(f"there are not so many as {max_records} problems of difficulty {difficulty}: "
                               "ask for fewer, or raise it")
    return {'splits': splits, 'closed': True, 'source': f'generated, difficulty {difficulty}, seed {seed}'}
