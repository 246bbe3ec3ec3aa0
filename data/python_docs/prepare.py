"""
A corpus that is already on your disk: the language reference (prose) and the source of well-known modules (code) that
come with CPython, about three megabytes. It needs no network. The text depends on the version of python, which
meta.json names.
$ python prepare.py python_docs

A document is a topic of the reference or a module. They are sorted by name, and every tenth is val. A topic that
mostly repeats longer topics is left out: otherwise text of val would also be in train. The text has printable ASCII
and newlines only: tabs become spaces, form feeds are removed, any other character becomes '?'.
"""
import importlib.util
import platform
import re
import sys

from prepare import PrepareError

tokenizer = 'char'
MODULES = """
argparse ast base64 bdb bisect calendar cmd code collections configparser contextlib copy csv dataclasses difflib dis
doctest email.message enum fileinput fnmatch fractions functools getopt gettext glob graphlib gzip heapq html.parser
http.client http.cookies http.server inspect ipaddress json.decoder json.encoder linecache logging logging.handlers
pickle platform pprint queue random reprlib sched secrets selectors shelve shlex shutil socket
socketserver statistics string subprocess tempfile textwrap threading timeit tokenize trace traceback types
unittest.case unittest.suite urllib.parse uuid weakref webbrowser""".split()

def ascii_only(text):
    return re.sub(r'[^ -~\n]', '?', text.replace('\f', '').expandtabs())

def topics():
    """ {name: text} of the language reference, without topics of which most text is in paragraphs of longer topics """
    try:
        from pydoc_data.topics import topics as texts
    except ImportError: # some distributions leave it out
        return {}
    kept, seen = {}, set()
    for name in sorted(texts, key=lambda name: (-len(texts[name]), name)):
        paragraphs = {p.strip() for p in texts[name].split('\n\n')}
        if sum(map(len, paragraphs & seen)) <= sum(map(len, paragraphs)) / 2:
            kept['topic ' + name] = texts[name]
        seen |= paragraphs
    return kept

def source(name):
    """ the source of a module as text, without running it; None if this python has no source of it """
    try:
        spec = importlib.util.find_spec(name)
        return spec.loader.get_source(name) if spec else None
    except (ImportError, ValueError, AttributeError):
        return None

def corpus():
    texts = {'module ' + name: source(name) for name in MODULES} | topics()
    missing = [name for name, text in texts.items() if not text]
    documents = [ascii_only(texts[name]) for name in sorted(texts) if texts[name]]
    if missing:
        print(f"note: this python has no source for {', '.join(missing)}", file=sys.stderr)
    if sum(map(len, documents)) < 1_000_000:
        raise PrepareError(f"this python ({sys.executable}) comes with less than a megabyte of source and prose; "
                           "use another one, or python prepare.py shakespeare_char")
    splits = {'train': [d for i, d in enumerate(documents) if i % 10 != 9], 'val': documents[9::10]}
    return {'splits': splits, 'closed': True, 'source': f'CPython {platform.python_version()}', 'files': len(documents),
            'licence': 'PSF-2.0'}
