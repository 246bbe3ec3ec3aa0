"""
WikiText-2 (https://arxiv.org/abs/1609.07843): the word-level text with <unk> and its own splits, in GPT-2's byte pairs.
$ python prepare.py wikitext2
$ python prepare.py wikitext2 --input=FOLDER   # with your copies of train.txt, valid.txt and test.txt

Every article is a document, which begins with the blank line before its ` = Title = ` heading (60 in val, 60 in test).
All articles of a split, joined, are the text of its file again, character for character, with the line ends of Unix.
"""
import os
import re

from prepare import PrepareError, download, read_text

tokenizer = 'gpt2'
URL = 'https://raw.githubusercontent.com/pytorch/examples/main/word_language_model/data/wikitext-2'
FILES = {'train': 'train.txt', 'val': 'valid.txt', 'test': 'test.txt'}
# checksums: the git blob ids of the three files, as `git ls-tree` shows them in that repository
SUMS = ['2d84b35af79e411d73ea7cae83c73964c6ac83b4', 'eec944eb2d9e46061cd34a6913528797db6842fc',
        '6f3fc88e4cd88456ea892971f9f12243e8428624']

def articles(text):
    """ a list of texts, cut before every top heading: a title between single equals signs, with blank lines around """
    return [part for part in re.split(r'(?m)^(?=[ \t]*\n = [^=\n].* =[ \t]*\n[ \t]*\n)', text) if part]

def corpus(folder, input='', url=URL, sha256=''):
    sums = sha256.split(',') if sha256 else [''] * 3 if input else SUMS
    if len(sums) != 3:
        raise PrepareError(f"wikitext2 has three files, so --sha256= takes three sums and two commas, got {len(sums)}")
    splits = {}
    for (split, name), expected in zip(FILES.items(), sums):
        path = os.path.join(input, name) if input else download(f'{url}/{name}', os.path.join(folder, name), expected)
        splits[split] = articles(read_text(path, expected))
    return {'splits': splits, 'closed': True, 'source': input or url, 'licence': 'CC BY-SA, Wikipedia authors'}
