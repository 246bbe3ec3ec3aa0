"""
Your own text: one file, a folder (its files that end in .txt or .text), or a pattern. UTF-8, or with a byte order mark.
$ python prepare.py text --input=book.txt --dataset=book
$ python prepare.py text --input='books/**/*.txt' --tokenizer=byte --dataset=books

Files are sorted by name. The last val_fraction of all characters becomes val, so one file may be cut in two. If there
are several files, each is a document, and an end id follows every document (also at the cut). Empty files among others
are left out.
"""
import glob
import os

from prepare import PrepareError, is_text_file, read_text, split_documents

tokenizer = 'char'

def corpus(input, val_fraction=0.1):
    place = os.path.expanduser(input)
    if os.path.isdir(place):
        found = filter(is_text_file, glob.glob(os.path.join(glob.escape(place), '*')))
    else:
        found = [place] if os.path.isfile(place) else glob.glob(place, recursive=True)
    files = sorted(filter(os.path.isfile, found))
    if not files:
        raise PrepareError(f"no file matches {place}: --input= is a file, a folder with *.txt, or a quoted pattern")
    texts = list(filter(None, [read_text(path, may_be_empty=len(files) > 1) for path in files]))
    if not texts:
        raise PrepareError(f"all of the {len(files)} files of {place} are empty")
    splits = split_documents(texts, val_fraction)
    return {'splits': splits, 'closed': len(texts) > 1, 'source': input, 'files': len(texts)}
