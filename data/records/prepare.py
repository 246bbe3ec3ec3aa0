"""
Your own records: a JSON array or JSON Lines of {id?, question, plan, execution}, or plain text, cut by the rule in split_text.
$ python prepare.py records --input=my.json --dataset=mine
$ python prepare.py records --input=my.json --dataset=mine --segments='question:64,plan:64,check:32,execution:96' --max_records=1000
$ python prepare.py records --input=book.txt --dataset=book

The last val_fraction of the records, at least one, is val. --max_records=1000 takes only the first so many; 0: all.
Of a file that ends in .txt or .text every paragraph of at least 8 words is a record. A blank line, also one of spaces
and tabs, ends a paragraph. Fields are the names of the segments; others are left aside.
"""
import json
import re

from prepare import PrepareError, is_text_file, nearest, read_text, unix_lines

tokenizer = 'byte'
segments = 'question:128,plan:128,execution:256'

def split_text(text, fields):
    """ a paragraph -> {field: part of it}: the first quarter of its words, the second, and the rest. Replace me """
    words = text.split()
    n = 2 * len(fields) - 2 # of three: 25 %, 25 %, 50 %; of more, the last is half of it too
    edges = [i * len(words) // n for i in range(len(fields))] + [len(words)]
    return {field: ' '.join(words[a:b]) for field, a, b in zip(fields, edges, edges[1:])}

def first(records, max_records):
    """ the first max_records of a list, all where it is 0 """
    if max_records < 0 or max_records == 1:
        raise PrepareError(f"max_records is {max_records}, expected 0 for all, or at least 2: "
                           "one for train and one for val")
    return records[:max_records or None]

def read_records(path, fields, max_records=0):
    """ a JSON array or JSON Lines of objects whose `fields` are text -> list of dicts; records count from 1 in what is said of them """
    text = read_text(path)
    try:
        if text.lstrip().startswith('['):
            records = json.loads(text)
        else:
            records, at = [], 0
            for at, line in enumerate(text.split('\n'), 1): # not splitlines: JSON may hold U+2028
                line = line.strip(' \t\ufeff') # files that were put together keep the byte order mark of each
                if line:
                    records.append(json.loads(line))
    except (ValueError, RecursionError) as e:
        where = f"line {e.lineno if text.lstrip().startswith('[') else at}" if isinstance(e, json.JSONDecodeError) else "it"
        raise PrepareError(f"{path} is neither a JSON array nor JSON Lines: {where} makes no sense "
                           f"({getattr(e, 'msg', e)}); plain text is a file that ends in .txt") from None
    if len(records) < 2:
        raise PrepareError(f"{path} has {len(records)} records, expected at least 2: one for train and one for val")
    records = first(records, max_records)
    for i, record in enumerate(records, 1):
        if not isinstance(record, dict):
            raise PrepareError(f"{path}, record {i} is {json.dumps(record)[:40]}, expected an object with the fields {', '.join(fields)}")
        named = f"{path}, record {i}" + (f" (id {record['id']!r})" if 'id' in record else '')
        for field in fields:
            if field not in record:
                others = [key for key in record if key not in fields]
                found = ', '.join(map(repr, record)) or 'none at all'
                raise PrepareError(f"{named} has no field {field!r}, only {found}{nearest(field, others)}")
            if not isinstance(record[field], str) or not record[field].strip():
                raise PrepareError(f"{named}: the field {field!r} is {json.dumps(record[field])[:40]}, expected text")
            if re.search('[\ud800-\udfff]', record[field]):
                half = json.dumps(record[field])[:40]
                raise PrepareError(f"{named}: the field {field!r} has half of a character, {half}, expected text")
            record[field] = unix_lines(record[field]) # JSON writes line ends as escapes, which read_text does not see
    return records

def corpus(fields, input, max_records=0, val_fraction=0.1):
    if is_text_file(input):
        paragraphs = [p for p in re.split(r'\n\s*\n', read_text(input)) if len(p.split()) >= 8]
        if len(paragraphs) < 2:
            raise PrepareError(f"{input} has {len(paragraphs)} paragraphs of at least 8 words, expected 2: put blank lines between them")
        records = [split_text(p, fields) for p in first(paragraphs, max_records)]
    else:
        records = read_records(input, fields, max_records)
    if not 0 < val_fraction < 1:
        raise PrepareError(f"val_fraction is {val_fraction}, expected a share between 0 and 1")
    cut = min(len(records) - 1, max(1, round(len(records) * (1 - val_fraction))))
    return {'splits': {'train': records[:cut], 'val': records[cut:]}, 'closed': True, 'source': input}
