"""
Your own records: a JSON array or JSON Lines of {id?, question, plan, execution}, or plain text.
$ python prepare.py records --input=my.json --dataset=mine
$ python prepare.py records --input=my.json --dataset=mine --max_records=1000 \
      --segments='question:64,plan:64,check:32,execution:96'
$ python prepare.py records --input=book.txt --dataset=book

The fields of a record are the names of the segments; other fields are ignored. A file that ends in .txt or .text is
plain text: every paragraph of at least 8 words is a record, which split_text cuts into fields. A blank line ends a
paragraph, also one that has spaces or tabs.
The last val_fraction of the records, at least one, is val. --max_records=1000 takes the first 1,000 records; 0: all.
"""
import json
import re

from prepare import PrepareError, is_text_file, nearest, read_text, unix_lines

tokenizer = 'byte'
segments = 'question:128,plan:128,execution:256'

def split_text(text, fields):
    """ a paragraph -> {field: part of it}: the last field gets half of the words, the rest equal shares. Replace me """
    words = text.split()
    n = 2 * len(fields) - 2 # three fields: 25 %, 25 %, 50 %
    edges = [i * len(words) // n for i in range(len(fields))] + [len(words)]
    return {field: ' '.join(words[a:b]) for field, a, b in zip(fields, edges, edges[1:])}

def first(records, max_records):
    """ the first max_records of a list, all if max_records is 0 """
    if max_records < 0 or max_records == 1:
        raise PrepareError(f"max_records is {max_records}, expected 0 for all, or at least 2: "
                           "one for train and one for val")
    return records[:max_records or None]

def parse(text, path):
    """ the list that the text of a file (path) holds, as a JSON array or as JSON Lines """
    is_array, line = text.lstrip().startswith('['), 0
    try:
        if is_array:
            return json.loads(text)
        records = []
        for line, part in enumerate(text.split('\n'), 1): # not splitlines: JSON may hold U+2028
            part = part.strip(' \t\ufeff') # if files were put together, each may begin with a byte order mark
            if part:
                records.append(json.loads(part))
        return records
    except (ValueError, RecursionError) as e:
        where = f"line {e.lineno if is_array else line}" if isinstance(e, json.JSONDecodeError) else "it"
        raise PrepareError(f"{path} is neither a JSON array nor JSON Lines: {where} makes no sense "
                           f"({getattr(e, 'msg', e)}); plain text is a file that ends in .txt") from None

def check_field(record, field, fields, named):
    """ a PrepareError unless the record has text in that field. fields: all that it must have; named: the record """
    if field not in record:
        others = [key for key in record if key not in fields]
        found = ', '.join(map(repr, record)) or 'none at all'
        raise PrepareError(f"{named} has no field {field!r}, only {found}{nearest(field, others)}")
    text = record[field]
    if not isinstance(text, str) or not text.strip():
        raise PrepareError(f"{named}: the field {field!r} is {json.dumps(text)[:40]}, expected text")
    if re.search('[\ud800-\udfff]', text):
        half = json.dumps(text)[:40]
        raise PrepareError(f"{named}: the field {field!r} has half of a character, {half}, expected text")

def read_records(path, fields, max_records=0):
    """ a file of JSON objects whose `fields` are text -> list of dicts. Errors count records from 1 """
    records = parse(read_text(path), path)
    if len(records) < 2:
        raise PrepareError(f"{path} has {len(records)} records, expected at least 2: one for train and one for val")
    records = first(records, max_records)
    for i, record in enumerate(records, 1):
        if not isinstance(record, dict):
            raise PrepareError(f"{path}, record {i} is {json.dumps(record)[:40]}, expected an object with the fields "
                               f"{', '.join(fields)}")
        named = f"{path}, record {i}" + (f" (id {record['id']!r})" if 'id' in record else '')
        for field in fields:
            check_field(record, field, fields, named)
            record[field] = unix_lines(record[field]) # JSON escapes line ends, so read_text does not see them
    return records

def corpus(fields, input, max_records=0, val_fraction=0.1):
    if is_text_file(input):
        paragraphs = [p for p in re.split(r'\n\s*\n', read_text(input)) if len(p.split()) >= 8]
        if len(paragraphs) < 2:
            raise PrepareError(f"{input} has {len(paragraphs)} paragraphs of at least 8 words, expected 2: "
                               "put blank lines between them")
        records = [split_text(p, fields) for p in first(paragraphs, max_records)]
    else:
        records = read_records(input, fields, max_records)
    if not 0 < val_fraction < 1:
        raise PrepareError(f"val_fraction is {val_fraction}, expected a share between 0 and 1")
    cut = min(len(records) - 1, max(1, round(len(records) * (1 - val_fraction))))
    return {'splits': {'train': records[:cut], 'val': records[cut:]}, 'closed': True, 'source': input}
