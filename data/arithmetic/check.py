"""
Which plans and answers of this dataset count as right: tools/answers.py asks.
same_plan(plan, true_plan): does a plan lead to the same result as the true one? A check.py may also define
same_answer(question, a, b): is a as good an answer as the true answer b? All three are text. It is not needed here,
because tools/answers.py compares numbers itself.
"""
import re

def steps_of(plan):
    """ lines like 'Bob = Ann + 5' -> {'Bob': ('Ann', '+', '5'), ...}; None if a line makes no sense or two disagree """
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
    """ the list of steps that lead to a name, the last one first; None if a step uses the result of a later step """
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
    bool: do both plans reach the last name of the true plan, which is what the question asks for, by the same steps?
    Another order that works is as good, and superfluous steps do not matter.
    """
    steps, true_steps = steps_of(plan), steps_of(true_plan)
    if not steps or not true_steps:
        return False
    asked = [*true_steps][-1]
    return way_to(asked, steps) == way_to(asked, true_steps) is not None
