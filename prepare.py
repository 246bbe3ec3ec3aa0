"""
Every data format, both ends: writes data/NAME/ once, and reads it back for train.py and sample.py.
$ python prepare.py shakespeare_char         # one megabyte, downloaded and checked
$ python prepare.py python_docs              # three megabytes that come with python: no network needed
$ python prepare.py text --input='books/**/*.txt' --tokenizer=byte --dataset=books
$ python prepare.py records --input=my.json --dataset=mine   # question, plan, execution

NAME is a folder under data/ whose prepare.py says `tokenizer = 'char'` and defines corpus(). Its parameters are
settings: corpus(n=500) takes --n=300, and python prepare.py NAME --help shows them below the script's docstring.
A parameter has the type of its default or annotation (a number, text, True or False), and must be given if it has no
default. `folder`, where downloads may stay, and `fields`, the names of the segments, are no settings. A parameter that
is called like a setting below is that setting. corpus() returns
    {'splits': {'train': [document, ...], 'val': [...]}, 'closed': bool, ...}
Documents are str; closed: the end id follows every document. The rest of what it returns is kept in meta.json, and what
corpus() was called with is its 'settings', defaults included; a checkpoint has a copy of meta.json.
A script that also says `segments = 'question:128,plan:128,execution:256'` has records for documents, dicts with these
names; then .bin is rows of that many tokens, every segment at its own place, an end id behind it and pad ids up to the next.

A prepared folder has one SPLIT.bin per split, raw token ids as uint16 (uint32 if they need it), and meta.json, written
last: without it a folder is not prepared. Ids of text come first, then end, begin, [MASK], pad. No .bin holds an id of
text_size or more, except pads between segments.
"""
import codecs
import contextlib
import functools
import glob
import hashlib
import importlib.util
import inspect
import json
import os
import sys
import tempfile
import time

import numpy as np

from configurator import configure, fail, nearest, print_anything

# settings
input = '' # a local file, folder or glob to use instead of the download
url = '' # another place to download from
sha256 = '' # expected checksums, comma-separated, when url or input is not the usual file
tokenizer = '' # char, byte or gpt2; '' is the dataset's own
val_fraction = 0.1 # share of the characters, or of the records, that becomes val
dataset = '' # name or path of the folder to write; '' is data/NAME
# of records
question_len = 0 # tokens of the question, its end id included; 0: the dataset's own, and so on
plan_len = 0
exec_len = 0
segments = '' # any levels instead of these three, the question first: question:128,plan:128,check:32,execution:256
too_long = 'drop' # drop | truncate: what happens to records that do not fit
var_length = False # segments as long as the longest in the data, in steps of 16 tokens, but no longer than the lengths above
# and whatever the dataset's corpus() takes: python prepare.py NAME --help

_OWN = {key: value for key, value in dict(globals()).items() if key[0] != '_' and isinstance(value, (int, float, str))}

_FORMAT = 1 # of meta.json (public scalars are settings, hence the underscore)
_DATA = os.path.join(os.path.dirname(os.path.abspath(__file__)), 'data')
_GPT2 = 'https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/'
_GPT2_FILES = {_GPT2 + 'vocab.bpe': '1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5',
               _GPT2 + 'encoder.json': '196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783'}

class PrepareError(Exception):
    """ anything that goes wrong for a reason the reader can act on; its text is one sentence """

# -----------------------------------------------------------------------------
# files

# how a text begins that names its encoding. UTF-32 comes first, because its mark begins with that of UTF-16
_MARKS = {codecs.BOM_UTF32_LE: 'UTF-32', codecs.BOM_UTF32_BE: 'UTF-32', codecs.BOM_UTF8: 'UTF-8',
          codecs.BOM_UTF16_LE: 'UTF-16', codecs.BOM_UTF16_BE: 'UTF-16'}

def read_text(path, expected='', may_be_empty=False):
    """
    The text of a file as str: UTF-8, or what its byte order mark names, without the mark. Every line ends in \\n: this
    is the place that turns \\r\\n and a lone \\r into it, whoever reads. expected: the checksum of the bytes, if any.
    """
    path = os.path.expanduser(path)
    try:
        with open(path, 'rb') as f:
            data = f.read()
        check_sum(path, expected)
        encoding = next((name for mark, name in _MARKS.items() if data.startswith(mark)), 'UTF-8')
        text = data.decode(encoding).removeprefix('\ufeff')
    except OSError as e:
        raise PrepareError(f"cannot read {path}: {e.strerror or e}") from None
    except UnicodeDecodeError as e:
        raise PrepareError(f"{path} is not {encoding} text: byte {data[e.start]:#04x} at offset {e.start}") from None
    if not text and not may_be_empty:
        raise PrepareError(f"{path} is empty")
    if '\0' in text:
        raise PrepareError(f"{path} has a NUL character at position {text.index(chr(0))}, which no text has: it is "
                           "another kind of file, or UTF-16 without a byte order mark; save it as UTF-8")
    return unix_lines(text)

def unix_lines(text):
    """ the same text (str) with \\n at the end of every line, whichever system it was written on """
    return text.replace('\r\n', '\n').replace('\r', '\n')

def is_text_file(path):
    """ does its name say that it is plain text? """
    return path.lower().endswith(('.txt', '.text'))

def file_sum(path, like=''):
    """ sha256 of a file in hex, or its git blob id where `like` has the 40 digits of one """
    digest = hashlib.sha1(b'blob %d\0' % os.path.getsize(path)) if len(like) == 40 else hashlib.sha256()
    with open(path, 'rb') as f:
        while chunk := f.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()

def check_sum(path, expected, came_from=''):
    found = file_sum(path, expected) if expected else ''
    if found != expected.lower():
        raise PrepareError(f"{came_from or path} has the checksum {found}, not {expected.lower()}: it is damaged or "
                           "not the usual file; if it is the one you want, pass its sum with --sha256=")

@contextlib.contextmanager
def replacing(*paths):
    """
    Yields a temporary name for each path. If the block succeeds they move into place, in this order; if not, they are
    removed and what was there stays. The last path vouches for the others, so its old version goes before they change.
    An OSError (no permission, disk full) becomes a PrepareError.
    """
    temporary = [f"{path}.{os.getpid()}.tmp" for path in paths] # same folder: a rename cannot cross disks
    try:
        for path in paths:
            os.makedirs(os.path.dirname(path) or '.', exist_ok=True)
        yield temporary
        for name in temporary:
            with open(name, 'r+b') as f:
                os.fsync(f.fileno()) # or a power cut could leave the name without the content
        if len(paths) > 1 and os.path.exists(paths[-1]):
            os.remove(paths[-1])
        for name, path in zip(temporary, paths):
            os.replace(name, path)
    except BrokenPipeError: # of a message about it, which nobody reads any more
        raise
    except OSError as e:
        raise PrepareError(f"cannot write {paths[-1]}: {e.strerror or e}") from None
    finally:
        for name in filter(os.path.exists, temporary):
            os.remove(name)

def download(url, path, expected='', instead="use a copy you have with --input= or another address with --url="):
    """ fetch url to path, unless the file with the expected checksum is there already; returns path """
    if expected and os.path.isfile(path) and file_sum(path, expected) == expected.lower():
        return path
    try:
        import requests
    except ImportError:
        raise PrepareError(f"downloading {url} needs requests: pip install requests") from None
    with replacing(path) as (temporary,):
        try:
            with requests.get(url, stream=True, timeout=(10, 30)) as reply, open(temporary, 'wb') as f:
                reply.raise_for_status()
                total, done, tty = int(reply.headers.get('content-length', 0)), 0, sys.stderr.isatty()
                shown = started = time.time()
                for chunk in reply.iter_content(1 << 16):
                    done += f.write(chunk)
                    if time.time() - shown > (0.1 if tty else 10): # a log file wants a line now and then, not a film
                        shown = time.time()
                        rate = done / (shown - started) # bytes per second
                        left = f", {max(0, total - done) / rate:.0f} s left" if total else ''
                        print(f"{done / 1e6:8.1f} MB, {rate / 1e6:.1f} MB/s{left}   ", end='\r' if tty else '\n',
                              file=sys.stderr, flush=True)
        except requests.RequestException as e:
            kinds = [(requests.Timeout, "no answer in time"), (requests.ConnectionError, "no connection"),
                     (requests.exceptions.ChunkedEncodingError, "the connection broke off")]
            reason = next((words for kind, words in kinds if isinstance(e, kind)), str(e))
            raise PrepareError(f"could not download {url} ({reason}): {instead}") from None
        check_sum(temporary, expected, url)
    print(f"downloaded {url} to {path}, {done / 1e6:.1f} MB", file=sys.stderr)
    return path

def split_documents(documents, val_fraction):
    """ {'train', 'val'}: the last val_fraction of all characters is val, cutting the one document that straddles """
    n = sum(map(len, documents))
    cut = int(n * (1 - val_fraction)) if 0 < val_fraction < 1 else 0
    if cut == 0:
        raise PrepareError(f"val_fraction={val_fraction} of {n} characters would leave train or val empty")
    splits = {'train': [], 'val': []}
    for text in documents:
        for split, part in (('train', text[:cut]), ('val', text[cut:])):
            if part:
                splits[split].append(part)
        cut = max(0, cut - len(text))
    return splits

# -----------------------------------------------------------------------------
# tokenizers: each codec takes meta.json and returns encode(str) -> int64 ids and decode(ids of text) -> str

def char_codec(meta):
    """ one id per character of the corpus, in code point order """
    points = np.array([ord(c) for c in meta['chars']], dtype='<u4')
    table = np.full(int(points.max()) + 2, -1) # the last entry is for everything above
    table[points] = np.arange(len(points))

    def encode(text):
        ids = table[np.minimum(np.frombuffer(text.encode('utf-32-le', 'surrogatepass'), dtype='<u4'), len(table) - 1)]
        if ids.min(initial=0) < 0:
            n = int(np.argmin(ids)) # the first one
            has = meta['chars'][:100] + ('...' if len(points) > 100 else '')
            raise PrepareError(f"unknown character {text[n]!r} (U+{ord(text[n]):04X}) at position {n}: "
                               f"this model's vocabulary has only {has!r}")
        return ids
    return encode, lambda ids: points[ids].tobytes().decode('utf-32-le', 'replace')

def byte_codec(meta):
    """ the bytes of UTF-8: any text, 256 ids, longer sequences """
    return (lambda text: np.frombuffer(text.encode('utf-8', 'surrogatepass'), dtype=np.uint8).astype(np.int64),
            lambda ids: bytes(ids.tolist()).decode('utf-8', 'replace'))

def gpt2_codec(meta):
    """ GPT-2's byte pair encoding. '<|endoftext|>' in a text is just a text, never the end id """
    bpe = gpt2_encoding()
    return lambda text: np.array(bpe.encode_ordinary(text), dtype=np.int64), lambda ids: bpe.decode(ids.tolist())

TOKENIZERS = {'char': char_codec, 'byte': byte_codec, 'gpt2': gpt2_codec}

def gpt2_encoding():
    try:
        import tiktoken
    except ImportError:
        raise PrepareError("the gpt2 tokenizer needs tiktoken: pip install tiktoken") from None
    # tiktoken would download its two files without a timeout and fail with a page of traceback: put them into its cache
    usual = os.environ.get('DATA_GYM_CACHE_DIR') or os.path.join(tempfile.gettempdir(), 'data-gym-cache')
    folder = os.environ['TIKTOKEN_CACHE_DIR'] = os.environ.get('TIKTOKEN_CACHE_DIR') or usual
    places = {file: os.path.join(folder, hashlib.sha1(file.encode()).hexdigest()) for file in _GPT2_FILES}
    by_hand = ' and '.join(f"{file} as {path}" for file, path in places.items())
    for file, path in places.items():
        download(file, path, _GPT2_FILES[file], f"gpt2 needs two files, save {by_hand}; or use --tokenizer=byte")
    return tiktoken.get_encoding('gpt2')

def vocabulary(kind, documents=(), closed=False):
    """ the part of meta.json that makes a Tokenizer. closed: texts contain the end id too """
    if kind not in TOKENIZERS:
        raise PrepareError(f"tokenizer is one of {', '.join(TOKENIZERS)}, not {kind!r}{nearest(kind, TOKENIZERS)}")
    meta, n = {'tokenizer': kind}, {'byte': 256, 'gpt2': 50256}.get(kind)
    if kind == 'char':
        meta['chars'] = ''.join(sorted(set().union(*documents)))
        n = len(meta['chars'])
    meta |= dict(end_id=n, begin_id=n + 1, mask_id=n + 2, pad_id=n + 3, text_size=n + closed, vocab_size=n + 4)
    if kind == 'gpt2': # <|endoftext|> was always its end id; a multiple of 64 is faster to multiply with
        meta |= dict(text_size=50257, vocab_size=50304)
    return meta

class Tokenizer:
    """ text <-> ids, from meta.json alone (or the copy of it in a checkpoint) """
    def __init__(self, meta):
        self.meta, self.end_id = meta, meta['end_id'] # all ids below end_id are text

    @functools.cached_property
    def codec(self): # on first use: who trains on a cluster without network never needs gpt2's files there
        return TOKENIZERS[self.meta['tokenizer']](self.meta)

    def encode(self, text):
        """ -> int64 array (n,); a PrepareError for a character that the vocabulary lacks """
        return self.codec[0](text)

    def decode(self, ids):
        """ any ids -> str. Reserved ids vanish; broken UTF-8 becomes U+FFFD """
        ids = np.asarray(ids, dtype=np.int64).reshape(-1)
        return ''.join(self.codec[1](part[part < self.end_id]) for part in np.split(ids, np.flatnonzero(ids >= self.end_id)))

# -----------------------------------------------------------------------------
# records: rows of segments

def read_segments(text):
    """ 'question:128,plan:128,execution:256' -> {'question': 128, ...} """
    pairs = [(name.strip(), n.strip()) for name, _, n in (part.partition(':') for part in text.split(','))]
    fits = [name.isidentifier() and n.isdecimal() and len(n) < 7 and int(n) > 1 for name, n in pairs]
    if len(pairs) < 2 or len(dict(pairs)) < len(pairs) or not all(fits):
        raise PrepareError(f"segments is {text!r}, expected names and lengths of 2 or more tokens, below a million, "
                           "the question first: question:128,plan:128,execution:256")
    return {name: int(n) for name, n in pairs}

def without(lengths, skip):
    """ {segment: tokens} less the names in skip, 'plan,check' """
    gone, expected = [name.strip() for name in skip.split(',') if name.strip()], [*lengths][1:]
    for name in gone:
        if name not in expected:
            raise PrepareError(f"skip names {name!r}, expected some of {', '.join(expected)}{nearest(name, expected)}")
    return {name: n for name, n in lengths.items() if name not in gone}

def segments_text(lengths):
    return ','.join(f'{name}:{n}' for name, n in lengths.items())

_LENGTHS = {'question_len': 'question', 'plan_len': 'plan', 'exec_len': 'execution'}

def choose_lengths(own, settings):
    """ {segment: tokens}: the dataset's own text, or what the settings say instead """
    given = {key: settings[key] for key in _LENGTHS if key in settings}
    if given and 'segments' in settings:
        raise PrepareError(f"--segments= gives all lengths and --{next(iter(given))}= one of them: give only one of both")
    lengths = read_segments(settings.get('segments', own))
    for key in given:
        if _LENGTHS[key] not in lengths:
            raise PrepareError(f"--{key}= is the length of a {_LENGTHS[key]}, but the segments are {', '.join(lengths)}: give --segments=")
    return read_segments(segments_text(lengths | {_LENGTHS[key]: n for key, n in given.items()}))

def fit(splits, lengths, encode, layout, too_long='drop', var_length=False):
    """ {split: records} -> ({split: rows of ids}, {split: report}, lengths); layout(lengths): their Layout """
    if too_long not in ('drop', 'truncate'):
        raise PrepareError(f"too_long is {too_long!r}, expected drop or truncate")
    splits = {split: [[encode(record[name]) for name in lengths] for record in records] for split, records in splits.items()}
    if var_length:
        longest = [max(len(parts[i]) for records in splits.values() for parts in records) + 1 for i in range(len(lengths))]
        lengths = {name: min(n, -(-most // 16) * 16) for (name, n), most in zip(lengths.items(), longest)}
    rows, reports, layout = {}, {}, layout(lengths)
    for split, records in splits.items():
        over = [[len(ids) >= n for ids, n in zip(parts, lengths.values())] for parts in records] # an end id is to follow
        kept = [parts for parts, beyond in zip(records, over) if too_long == 'truncate' or not any(beyond)]
        if not kept:
            raise PrepareError(f"no record of {split} fits {segments_text(lengths)}: raise the lengths, or cut records with --too_long=truncate")
        rows[split] = list(layout.raw(kept))
        sizes = np.array([[len(ids) + 1 for ids in parts] for parts in records]) # (records, segments)
        reports[split] = {'records': len(kept), 'too_long': sum(map(any, over)), 'did': too_long,
                          'segments': {name: {'too_long': int(n), 'longest': int(most), 'mean': round(float(mean), 1)}
                                       for name, n, most, mean in zip(lengths, np.sum(over, 0), sizes.max(0), sizes.mean(0))}}
    return rows, reports, lengths

class Layout:
    """
    How records of segments become rows that a model reads, and back. Raw rows are those on the disk, (B, T). For a model that knows the block
    of every position (ids), what is left of the block where a segment ends is end ids too, and blocks wholly past it are pads, in a block of
    their own, the last, which nobody looks at; nor at pads behind the question. Without ids (ar) a row is packed: pads at its end only.
    """
    def __init__(self, meta, ids=None):
        self.lengths = read_segments(meta['segments'])
        self.edges = np.cumsum([0, *self.lengths.values()])
        self.segment = np.repeat(np.arange(len(self.lengths)), list(self.lengths.values())) # (T,), the question is 0
        self.end_id, self.pad_id, self.ids = meta['end_id'], meta['pad_id'], None if ids is None else np.array(ids)
        for name, a, b in zip([*self.lengths][1:], self.edges[1:], self.edges[2:]):
            if ids is None or self.ids[-1] == 0: # one block: nothing to divide
                break
            size = int((self.ids[a:b] == self.ids[a]).sum())
            if self.ids[a] == self.ids[a - 1] or (b - a) % size:
                size = np.bincount(self.ids).max() if self.ids[a] == self.ids[a - 1] else size
                raise PrepareError(f"{name} begins at token {a} and has {b - a} tokens, no whole blocks of diffusion_block_size={size}: change it or prepare other lengths")

    def raw(self, records):
        """ records of segments, ids without the end -> raw rows; what is too long is cut """
        rows = np.full((len(records), len(self.segment)), self.pad_id)
        for row, parts in zip(rows, records):
            for a, b, ids in zip(self.edges, self.edges[1:], parts):
                ids = np.append(ids[:b - a - 1], self.end_id)
                row[a:a + len(ids)] = ids
        return rows

    def rows(self, raw, only=None, length=None):
        """ raw rows -> a batch for a model; only: the segments that are scored, all but the question; length: of packed rows """
        raw, pad = raw.astype(np.int64), raw == self.pad_id
        scored = np.isin(self.segment, range(1, len(self.lengths)) if only is None else only) # (T,)
        if self.ids is None:
            order = pad.argsort(1, kind='stable') # pads last, all others as they were
            raw, scored = np.take_along_axis(raw, order, 1), scored[order]
            if length: # nanoGPT's rows have one more token
                wider = (0, 0), (0, max(0, length - raw.shape[1]))
                raw, scored = np.pad(raw, wider, constant_values=self.pad_id), np.pad(scored, wider)
            return {'idx': raw, 'targets': np.where(scored & (raw != self.pad_id), raw, -1)}
        first = np.flatnonzero(np.diff(self.ids, prepend=-1)) # of each block
        used = np.logical_or.reduceat(~pad, first, axis=1)[:, self.ids] # (B, T): is there text or an end in the block?
        raw = np.where(pad & used & (self.segment > 0), self.end_id, raw)
        pad = raw == self.pad_id
        return {'idx': raw, 'targets': np.where(scored & ~pad, raw, -1), 'block_ids': self.blocks(pad)}

    def blocks(self, pad):
        """ the block of every position, (B, T), where pad (B, T) tells pads, which have one to themselves """
        return np.where(pad, self.ids[-1] + 1, self.ids)

    def prompt(self, questions):
        """ ids of questions -> what generate takes: idx with -1 where the model writes, max_new_tokens, and block_ids where it knows blocks """
        n, room = self.edges[1], len(self.segment) - self.edges[1]
        for ids in questions:
            if len(ids) >= n:
                raise PrepareError(f"the question has {len(ids)} tokens, this model reads at most {n - 1}")
        raw = self.raw([[ids] for ids in questions])
        if self.ids is None:
            longest = max(map(len, questions)) + 1
            return {'idx': np.where(raw == self.pad_id, -1, raw)[:, :longest], 'max_new_tokens': int(room)}
        pad = (raw == self.pad_id) & (self.segment == 0)
        return {'idx': np.where(self.segment > 0, -1, raw), 'max_new_tokens': 0, 'block_ids': self.blocks(pad)}

    def parts(self, row):
        """ a row, as far as it is written (-1 elsewhere), in a model's form -> {segment: ids before its end}, of those begun """
        row = np.asarray(row)
        cuts = self.edges[1:-1] if self.ids is not None else (np.flatnonzero(row == self.end_id) + 1)[:len(self.lengths) - 1]
        begun = [(name, part) for name, part in zip(self.lengths, np.split(row, cuts)) if len(part) and part[0] != -1]
        return {name: part[:([*np.isin(part, (self.end_id, self.pad_id, -1)), True]).index(True)] for name, part in begun}

# -----------------------------------------------------------------------------
# writing

def names():
    """ what can be prepared """
    return sorted(os.path.basename(os.path.dirname(path)) for path in glob.glob(f'{glob.escape(_DATA)}/*/prepare.py'))

def data_folder(dataset):
    """ a bare name lives under data/ beside this file; whatever looks like a path is one, and ~ is the home folder """
    place = os.path.expanduser(dataset)
    path = place != dataset or '/' in dataset or os.sep in dataset or dataset.startswith('.')
    return place if path else os.path.join(_DATA, dataset)

def load(folder, file):
    """ folder/file as a module. Its name has the folder's in it: in data/ they are all called prepare or provider """
    unique = f"data_{os.path.basename(os.path.abspath(folder))}_{file.removesuffix('.py')}"
    spec = importlib.util.spec_from_file_location(unique, os.path.join(folder, file))
    module = sys.modules[unique] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module

def provider(dataset, file='provider.py'):
    """ the names that a script of the dataset defines, {} if it has none """
    folder = data_folder(dataset)
    return vars(load(folder, file)) if os.path.exists(os.path.join(folder, file)) else {}

def read_script(name):
    """ data/<name>/prepare.py as a module """
    if name not in names():
        what = f"data/ has no {name}/prepare.py" if name else "say what to prepare"
        raise PrepareError(f"{what}: python prepare.py NAME knows {', '.join(names())}{nearest(name, names())}")
    return load(os.path.join(_DATA, name), 'prepare.py')

def parameters(script):
    """ {name: inspect.Parameter}: what corpus() can be told by name """
    found = inspect.signature(script.corpus, eval_str=True).parameters # of `from __future__ import annotations` too
    return {key: p for key, p in found.items() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}

_ALWAYS = 'dataset', 'tokenizer' # prepare.py has a use for them whatever it prepares,
_OF_RECORDS = (*_LENGTHS, 'segments', 'too_long', 'var_length') # and for these where there are segments
_NO_SETTINGS = 'folder', 'fields' # what corpus() may ask for and nobody sets
_ANYTHING = bool | int | float | str | None # the type of a parameter with neither a default nor an annotation

def settings_of(script):
    """
    ({setting: default}, {setting: type}) of `python prepare.py NAME`: the parameters of corpus(), then what prepare.py
    has a use for. None is the default of a parameter that must be given. The types are those that no default tells.
    """
    settings, types = {}, {}
    for key, parameter in parameters(script).items():
        default = None if parameter.default is parameter.empty else parameter.default
        if key in _OWN:
            default = _OWN[key] if default is None or key in _ALWAYS + _OF_RECORDS else type(_OWN[key])(default)
        elif parameter.annotation is not parameter.empty:
            types[key] = parameter.annotation
        elif default is None:
            types[key] = _ANYTHING
        if key not in _NO_SETTINGS:
            settings[key] = default
    for key in _ALWAYS + _OF_RECORDS * hasattr(script, 'segments'):
        settings.setdefault(key, _OWN[key])
    return settings, types

def as_typed(value):
    """ what was typed for a parameter of any type: a number, True or False is meant as such, all else as text """
    for read in int, float, {'True': True, 'False': False}.__getitem__:
        with contextlib.suppress(ValueError, KeyError):
            return read(value) if isinstance(value, str) else value
    return value

def no_use(name, key, takes):
    """ the sentence for a setting that is not among those that `name` takes """
    return f"{name} has no use for --{key}, only for {', '.join(takes) or 'its text as it is'}{nearest(key, takes)}"

def arguments(name, accepted, settings, known):
    """ {parameter: value} for corpus(): `known` by prepare.py, or given as settings. accepted: see parameters """
    takes = [key for key in accepted if key not in _NO_SETTINGS]
    for key in settings:
        if key not in takes:
            raise PrepareError(no_use(name, key, takes))
    told = settings | {key: value for key, value in known.items() if key in accepted}
    for key, parameter in accepted.items():
        if parameter.default is parameter.empty and key not in told:
            raise PrepareError(f"{name} needs to know its {key}: python prepare.py {name} --{key}=...")
    if {'input', 'url'} <= told.keys():
        raise PrepareError("--input= reads a local copy and --url= downloads one: give only one of them")
    if told.get('input'): # no shell replaces the ~ of --input=~/book.txt
        told['input'] = os.path.expanduser(told['input'])
    return told

def prepare(name, /, dataset='', tokenizer='', **settings):
    """ write the folder `dataset` ('' is data/<name>) as data/<name>/prepare.py says, all or nothing; returns it """
    started = time.time()
    script = read_script(name)
    folder, own, lengths = data_folder(dataset or name), {}, {}
    kind, accepted = tokenizer or script.tokenizer, parameters(script)
    known = {'folder': folder, 'dataset': dataset or name, 'tokenizer': kind}
    if hasattr(script, 'segments'):
        own = {key: settings.pop(key) for key in _OF_RECORDS if key in settings}
        lengths = choose_lengths(script.segments, own)
        known |= {key: _OWN[key] for key in _OF_RECORDS} | own
    known['fields'] = list(lengths)
    told = arguments(name, accepted, settings, known)

    print(f"preparing {folder}", flush=True)
    corpus = script.corpus(**told)
    if not isinstance(corpus, dict) or not {'splits', 'closed'} <= corpus.keys():
        raise PrepareError(f"corpus() of data/{name}/prepare.py returns no dict of splits and closed, such as {{'splits': {{'train': [...], 'val': [...]}}, 'closed': False}}")
    splits = corpus.pop('splits')
    documents = sum(splits.values(), [])
    documents = [record[key] for record in documents for key in lengths] if lengths else documents
    meta = {'format': _FORMAT, 'dataset': name, **vocabulary(kind, documents, corpus['closed'])}
    meta['dtype'] = 'uint16' if meta['vocab_size'] <= 65535 else 'uint32'
    used = {key: told.get(key, parameter.default) for key, parameter in accepted.items() if key not in _NO_SETTINGS}
    meta |= {'splits': {}, **corpus, 'settings': json.loads(json.dumps(used, default=str))} # str: of what JSON has not
    codec, reports, characters = Tokenizer(meta), {}, {}
    for split, texts in splits.items():
        characters[split] = sum(len(text[key]) for text in texts for key in lengths) if lengths else sum(map(len, texts))
    if lengths:
        how = {key: own[key] for key in ('too_long', 'var_length') if key in own}
        splits, reports, lengths = fit(splits, lengths, codec.encode, lambda n: Layout(meta | {'segments': segments_text(n)}), **how)
        meta['segments'] = segments_text(lengths)
    paths = [os.path.join(folder, f'{split}.bin') for split in splits] + [os.path.join(folder, 'meta.json')]
    with replacing(*paths) as temporary:
        for path, (split, documents) in zip(temporary, splits.items()):
            tokens = 0
            with open(path, 'wb') as f:
                for document in documents:
                    ids = document if lengths else codec.encode(document)
                    ids = np.append(ids, codec.end_id) if corpus['closed'] and not lengths else ids
                    f.write(ids.astype(meta['dtype']).tobytes())
                    tokens += len(ids)
            meta['splits'][split] = {'tokens': tokens, 'characters': characters[split],
                                     'documents': len(documents), 'sha256': file_sum(path), **reports.get(split, {})}
        with open(temporary[-1], 'w') as f:
            json.dump(meta, f, indent=1)

    for split, n in meta['splits'].items():
        if lengths:
            print(f"{split:5} {n['records']:6,} records of {segments_text(lengths)}; {n['too_long']:,} were too long: {n['did']}. Tokens with the end, "
                  + '; '.join(f"{key} at most {v['longest']}, mean {v['mean']}, {v['too_long']} too long" for key, v in n['segments'].items()))
        else:
            print(f"{split:5} {n['documents']:6,} documents {n['characters']:12,} characters {n['tokens']:12,} tokens")
    for row in [*splits.values()][0][:3] if lengths else []:
        print('---', *(f"[{key}] {codec.decode(ids)}" for key, ids in zip(lengths, np.split(row, np.cumsum([*lengths.values()])[:-1]))), sep='\n')
    begins = '' if lengths else '; begins ' + ascii(codec.decode(np.fromfile(paths[0], dtype=meta['dtype'], count=60))[:60])
    print(f"{meta['vocab_size']} ids ({kind}), {time.time() - started:.1f} s{begins}", flush=True)
    return folder

def ensure(dataset):
    """ the folder of a dataset, prepared first if that needs no setting; else a PrepareError names the command """
    folder = data_folder(dataset)
    if not os.path.exists(os.path.join(folder, 'meta.json')):
        if dataset not in names():
            read_meta(dataset) # which says what to run
        prepare(dataset)
    return folder

# -----------------------------------------------------------------------------
# reading

def read_meta(dataset):
    """ the meta.json of a dataset as a dict, checked """
    path = os.path.join(data_folder(dataset), 'meta.json')
    again = f"python prepare.py {dataset if dataset in names() else f'NAME --dataset={dataset}'}"
    try:
        with open(path, encoding='utf-8-sig') as f: # an editor may have put a byte order mark there
            meta = json.load(f)
        if meta['format'] > _FORMAT:
            raise PrepareError(f"{path} has format {meta['format']}, newer than {_FORMAT}: update this or run {again}")
        reserved, tokens = [meta[k] for k in ('begin_id', 'mask_id', 'pad_id')], [split['tokens'] for split in meta['splits'].values()]
        for fits, what in [
            (meta['tokenizer'] in TOKENIZERS, f"tokenizer {meta['tokenizer']!r}"), (meta['dtype'] in ('uint16', 'uint32'), f"dtype {meta['dtype']!r}"),
            (all(type(n) is int and n >= 0 for n in [meta['end_id'], meta['text_size'], meta['vocab_size'], *reserved, *tokens]), "a count or an id that is no number"),
            (meta['end_id'] <= meta['text_size'] <= min(reserved) <= max(reserved) < meta['vocab_size'], "ids that are not in order"),
            (meta['tokenizer'] != 'char' or len(meta['chars']) == meta['end_id'], "another number of chars than ids")]:
            if not fits:
                raise ValueError(what)
    except FileNotFoundError:
        raise PrepareError(f"there is no {path}: run {again}{'' if dataset in names() else nearest(dataset, names())}") from None
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as e:
        raise PrepareError(f"cannot make sense of {path} ({type(e).__name__}: {e}): run {again}") from None
    return meta

class Corpus:
    """
    A prepared dataset. Batches are {'idx', 'targets'}, both int64 (B, length) with the same ids: an objective shifts or
    corrupts them itself. (-1 in targets means not scored; plain text has none.)
    """
    def __init__(self, dataset):
        self.folder, self.meta = data_folder(dataset), read_meta(dataset)
        if 'segments' in self.meta and not isinstance(self, Records):
            raise PrepareError(f"{self.folder} holds rows of segments ({self.meta['segments']}), expected plain text")
        self.tokenizer = Tokenizer(self.meta)
        self._bins = {}

    def tokens(self, split):
        splits = self.meta['splits']
        if split not in splits:
            raise PrepareError(f"{self.folder} has no split {split!r}, only {', '.join(splits)}")
        return splits[split]['tokens']

    def n_windows(self, split, length):
        return self.tokens(split) // length

    def batch(self, split, batch_size, length, rng, done=1.0):
        """ batch_size random windows; every window of the split is equally likely. rng is a numpy Generator; done: see Records """
        ids = self._data(split, length)
        starts = rng.integers(0, len(ids) - length + 1, size=(batch_size, 1)) # (B, 1)
        return self._batch(split, ids[starts + np.arange(length)]) # only these rows are read from the disk

    def windows(self, split, batch_size, length, limit=None):
        """ windows without overlap, in order, at most `limit`; the last batch is smaller, a ragged tail left out """
        ids, n = self._data(split, length), self.n_windows(split, length)
        n = n if limit is None else min(n, limit)
        for i in range(0, n, batch_size):
            rows = min(batch_size, n - i)
            yield self._batch(split, ids[i * length:(i + rows) * length].reshape(rows, length))

    def _data(self, split, length):
        """ the ids of a split as a memmap, opened once and never copied; at least `length` of them """
        n, path = Corpus.tokens(self, split), os.path.join(self.folder, f'{split}.bin')
        if n < length:
            raise PrepareError(f"{split}.bin has {n} tokens, fewer than the context of {length}: "
                               "lower block_size or prepare a longer text")
        if split not in self._bins:
            expected = n * np.dtype(self.meta['dtype']).itemsize
            size = os.path.getsize(path) if os.path.exists(path) else 0
            if size != expected:
                raise PrepareError(f"{path} has {size} bytes and meta.json says {expected}: prepare it again")
            self._bins[split] = np.memmap(path, dtype=self.meta['dtype'], mode='r')
        return self._bins[split]

    def _batch(self, split, ids):
        idx = ids.astype(np.int64) # (B, length)
        if idx.size and idx.max() >= self.meta['text_size']:
            raise PrepareError(f"{self.folder}/{split}.bin holds the id {idx.max()}, but ids of text are below "
                               f"{self.meta['text_size']}: prepare it again")
        return {'idx': idx, 'targets': idx.copy()}

class Records(Corpus):
    """ rows of segments. skip: names of segments to do without; layout: a Layout that knows the model, set by whoever built it """
    def __init__(self, dataset, skip=''):
        super().__init__(dataset)
        lengths = read_segments(self.meta['segments'])
        kept = without(lengths, skip)
        self.columns = np.repeat([name in kept for name in lengths], list(lengths.values())) # (stored length,)
        self.meta = self.meta | {'segments': segments_text(kept)}
        self.layout = Layout(self.meta)

    def n_windows(self, split, length=None):
        return super().tokens(split) // len(self.columns)

    def tokens(self, split):
        return self.n_windows(split) * int(self.columns.sum())

    def raw(self, split, which):
        """ raw rows of a split; which: an index of any kind """
        return self._data(split, len(self.columns)).reshape(-1, len(self.columns))[which][:, self.columns]

    def batch(self, split, batch_size, length, rng, done=1.0):
        """ random records. done: share of the curriculum behind us; the first segment after the question is scored from 0 on, the last from 1 on """
        raw, levels = self.raw(split, rng.integers(0, self.n_windows(split), size=batch_size)), len(self.layout.lengths) - 1
        return self.layout.rows(raw, range(1, 2 + int(min(1.0, done) * (levels - 1))), length)

    def windows(self, split, batch_size, length, limit=None):
        n = min(self.n_windows(split), limit or sys.maxsize)
        for i in range(0, n, batch_size):
            yield self.layout.rows(self.raw(split, slice(i, min(n, i + batch_size))), length=length)

def open_corpus(dataset, block_size, skip=''):
    """ (Corpus or Records, block_size): lengths of segments must add up to block_size; 0 is whatever they add up to """
    if 'segments' not in read_meta(dataset):
        for wrong, what in (skip, f"skip={skip} leaves out segments, and"), (not block_size, "block_size=0 is what segments add up to, and"):
            if wrong:
                raise PrepareError(f"{what} {dataset} is plain text, which has none")
        return Corpus(dataset), block_size
    corpus = Records(dataset, skip)
    total = int(corpus.layout.edges[-1])
    if block_size not in (0, total):
        raise PrepareError(f"the segments {corpus.meta['segments']} of {dataset} add up to {total} tokens, block_size is {block_size}: set --block_size={total}, or 0")
    return corpus, total

def main(argv):
    print_anything()
    name = next((arg for arg in argv[:1] if not arg.startswith('-')), '') # it comes first
    argv = argv[1:] if name else argv
    try:
        script = read_script(name) if name else sys.modules[__name__]
        settings, types = settings_of(script) if name else (_OWN, {})
        for key in [arg.removeprefix('--').partition('=')[0] for arg in argv]:
            if key in _OWN and key not in settings:
                raise PrepareError(no_use(name, key, settings))
        told = configure({'__file__': __file__, '__doc__': script.__doc__, '__annotations__': types} | settings, argv)
        told |= {key: as_typed(value) for key, value in told.items() if types.get(key) is _ANYTHING}
        given = {key: value for key, value in told.items() if value != settings[key]}
        prepare(name, **{key: value for key, value in given.items() if key not in _OWN or value != ''})
    except PrepareError as e:
        fail(str(e))
    except MemoryError:
        fail("out of memory: prepare a part of it, such as fewer files or records")

if __name__ == '__main__':
    sys.modules['prepare'] = sys.modules['__main__'] # data scripts import prepare: this one, not a second copy
    try:
        try:
            main(sys.argv[1:])
        finally:
            print(end='', flush=True) # here, where it can be caught
    except BrokenPipeError: # whoever reads what we print, such as head, has enough
        os._exit(141) # as if by SIGPIPE, and at once: python would flush again, and complain
