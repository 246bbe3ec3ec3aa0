"""
What tools/answers.py asks of this data: is a plan as good as another?
A check.py may also define same_answer(question, a, b): is a as good an answer as the true one, b? All three are text.
Numbers, as here, need none: tools/answers.py compares them.
"""
import re

def steps_of(plan):
    """ lines like 'Bob = Ann + 5' -> {'Bob': ('Ann', '+', '5'), ...}; None if one makes no sense or two disagree """
    steps = {}
    for line in filter(None, map(str.strip, plan.split('\n'))):
        parsed = re.fullmatch(r'([^\W\d]\w*) *= *(\w+) *([-+*]) *(\w+)', line)
        if parsed is None:
            return None
        name, other, sign, number = parsed.groups()
        if sign != '-' and re.fullmatch('[0-9]+', other): # 5 + Ann is Ann + 5
            other, number = number, other
        if not re.fullmatch('[0-9]+', number) or not re.fullmatch(r'[^\W\d]\w*', other):
            return None
        step = other, sign, number.lstrip('0') or '0'
        if steps.setdefault(name, step) != step:
            return None
    return steps

def way_to(name, steps):
    """ the steps that lead to a name, the last one first; None where a step needs one that comes after it """
    found, order = [], [*steps]
    while name in steps:
        other = steps[name][0]
        if other in steps and order.index(other) >= order.index(name):
            return None
        found.append((name, *steps[name]))
        name = other
    return found

def same_plan(plan, true_plan):
    """
    Do the same steps lead to what is asked for, the last name of the true plan? Steps in another order that works, or
    of no use, change nothing.
    """
    steps, true_steps = steps_of(plan), steps_of(true_plan)
    if not steps or not true_steps:
        return False
    asked = [*true_steps][-1]
    return way_to(asked, steps) == way_to(asked, true_steps) is not None
