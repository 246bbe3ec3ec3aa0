""" what tools/answers.py asks of this data: is a plan as good as another? """
import re

def outcome(plan):
    """ the last name of a plan as an expression of what the question gives: (((Ann) + 5) * 2); None where it makes no sense """
    found = {}
    for step in plan.split('\n'):
        parsed = re.fullmatch(r'(\w+) = (\w+) ([-+*]) (\d+)', step)
        if parsed is None or parsed[1] in found:
            return None
        found[parsed[1]] = f'({found.get(parsed[2], parsed[2])} {parsed[3]} {int(parsed[4])})'
    return found[parsed[1]]

def same_plan(plan, true_plan):
    """ do both come to the same? Steps in another order or of no use change nothing """
    return outcome(plan) is not None and outcome(plan) == outcome(true_plan)
