"""
Your own UTF-8 text: one file, all *.txt of a folder, or a pattern.
$ python prepare.py text --input=book.txt --dataset=book
$ python prepare.py text --input='books/**/*.txt' --tokenizer=byte --dataset=books

The last val_fraction of all characters, files in sorted order, becomes val, cutting one file in two. Of several files
each is a document and the end id follows it (also where the cut falls). Empty files among others are left out.
"""
import glob
import os

from prepare import PrepareError, read_text, split_documents

tokenizer = 'char'

def corpus(input, val_fraction=0.1):
    place = os.path.expanduser(input)
    pattern = os.path.join(glob.escape(place), '*.txt') if os.path.isdir(place) else place
    files = [place] if os.path.isfile(place) else sorted(filter(os.path.isfile, glob.glob(pattern, recursive=True)))
    if not files:
        raise PrepareError(f"no file matches {pattern}: --input= is a file, a folder with *.txt, or a quoted pattern")
    files = [path for path in files if os.path.getsize(path)] or files[:1]
    splits = split_documents([read_text(path) for path in files], val_fraction)
    return {'splits': splits, 'closed': len(files) > 1, 'source': input, 'files': len(files)}
