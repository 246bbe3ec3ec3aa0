"""
Every data format, both ends: writes data/NAME/ once, and reads it back for train.py and sample.py.
$ python prepare.py shakespeare_char         # one megabyte, downloaded and checked
$ python prepare.py python_docs              # three megabytes that come with python: no network needed
$ python prepare.py text --input='books/**/*.txt' --tokenizer=byte --dataset=books
$ python prepare.py records --input=my.json --dataset=mine   # question, plan, execution

NAME is a folder under data/. Its prepare.py says `tokenizer = 'char'` and defines corpus(), which returns
    {'splits': {'train': [document, ...], 'val': [...]}, 'closed': bool, ...}
A document is a str. closed: an end id is written after every document. meta.json keeps the rest of this dict, and
under 'settings' the arguments of corpus(), defaults included. A checkpoint has a copy of meta.json.

The parameters of corpus() are settings: corpus(n=500) accepts --n=300, and python prepare.py NAME --help lists them
below the script's docstring. A parameter has the type of its default or annotation (a number, text, True or False).
It must be given if it has no default. A parameter with the name of a setting below is that setting. Two parameters
are filled in by prepare.py: `folder`, where downloads may stay, and `fields`, the names of the segments.

A script with `segments = 'question:128,plan:128,execution:256'` returns records in place of documents: dicts of str
with these keys. Each row of a .bin is then one record. Every segment has its own columns in the row, as many as its
length says: first its tokens, then an end id, then pad ids.

A prepared folder has one SPLIT.bin per split, raw token ids as uint16 (uint32 if they need it), and meta.json.
meta.json is written last: a folder without it is not prepared. Ids of text come first, then end, begin, [MASK], pad.
All ids in a .bin are below text_size, except the pads of records.
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
url = '' # another address to download from
sha256 = '' # expected checksums, comma-separated, if url or input is not the usual file
tokenizer = '' # char, byte or gpt2; '': the dataset's own
val_fraction = 0.1 # share of the characters, or of the records, that becomes val
dataset = '' # name or path of the folder to write; '': data/NAME
# of records
question_len = 0 # tokens of the question, its end id included; 0: the dataset's own
plan_len = 0 # of the plan; 0: the dataset's own
exec_len = 0 # of the execution; 0: the dataset's own
segments = '' # other segments than these three, the question first: question:128,plan:128,check:32,execution:256
too_long = 'drop' # drop | truncate: what happens to records that do not fit
var_length = False # shorten each segment to the longest in the data, rounded up to a multiple of 16 tokens
# The parameters of the dataset's corpus() are settings too: python prepare.py NAME --help

_OWN = {key: value for key, value in dict(globals()).items() # the settings above
        if key[0] != '_' and isinstance(value, (int, float, str))}

# From here on names of constants begin with an underscore: public ones would be settings.
_FORMAT = 1 # of meta.json
_DATA = os.path.join(os.path.dirname(os.path.abspath(__file__)), 'data')
_GPT2 = 'https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/'
_GPT2_FILES = {_GPT2 + 'vocab.bpe': '1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5',
               _GPT2 + 'encoder.json': '196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783'}

class PrepareError(Exception):
    """ a mistake that the person at the keyboard can mend; its text is one sentence """

# -----------------------------------------------------------------------------
# files

# Byte order marks, which name the encoding of a text. UTF-32 comes first: its mark begins with the mark of UTF-16.
_MARKS = {codecs.BOM_UTF32_LE: 'UTF-32', codecs.BOM_UTF32_BE: 'UTF-32', codecs.BOM_UTF8: 'UTF-8',
          codecs.BOM_UTF16_LE: 'UTF-16', codecs.BOM_UTF16_BE: 'UTF-16'}

def read_text(path, expected='', may_be_empty=False):
    """
    The text of a file, as str. The encoding is UTF-8, unless a byte order mark names another one; the mark is removed.
    Line ends \\r\\n and \\r become \\n. expected: checksum of the file's bytes, '' to accept any.
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
    """ the same text (str), in which every line end is \\n: not \\r\\n as on Windows, nor \\r as on old Macs """
    return text.replace('\r\n', '\n').replace('\r', '\n')

def is_text_file(path):
    """ bool: does the file's name say that it is plain text? """
    return path.lower().endswith(('.txt', '.text'))

def file_sum(path, like=''):
    """ sha256 of a file in hex, or its git blob id if `like`, a checksum to compare with, has 40 digits as those do """
    digest = hashlib.sha256()
    if len(like) == 40:
        digest = hashlib.sha1(b'blob %d\0' % os.path.getsize(path))
    with open(path, 'rb') as f:
        while chunk := f.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()

def check_sum(path, expected, came_from=''):
    """ a PrepareError unless the file has the expected checksum ('': any). came_from: its address, if downloaded """
    found = file_sum(path, expected) if expected else ''
    if found != expected.lower():
        raise PrepareError(f"{came_from or path} has the checksum {found}, not {expected.lower()}: it is damaged or "
                           "not the usual file; if it is the one you want, pass its sum with --sha256=")

@contextlib.contextmanager
def replacing(*paths):
    """
    Yields a list with a temporary name for each path, for files that the block writes. If the block succeeds, these
    files are renamed to the paths, in this order. If it fails, they are removed, and the files at the paths stay as
    they were. If the last path exists, the others are complete: so its old version is removed before the others are
    replaced. An OSError (no permission, disk full) becomes a PrepareError.
    """
    temporary = [f"{path}.{os.getpid()}.tmp" for path in paths] # same folder: a rename cannot cross disks
    try:
        for path in paths:
            os.makedirs(os.path.dirname(path) or '.', exist_ok=True)
        yield temporary
        for name in temporary:
            with open(name, 'r+b') as f:
                os.fsync(f.fileno()) # otherwise a power cut could leave an empty file under the new name
        if len(paths) > 1 and os.path.exists(paths[-1]):
            os.remove(paths[-1])
        for name, path in zip(temporary, paths):
            os.replace(name, path)
    except BrokenPipeError: # from a print in the block, not from its files: an OSError that is none of ours
        raise
    except OSError as e:
        raise PrepareError(f"cannot write {paths[-1]}: {e.strerror or e}") from None
    finally:
        for name in filter(os.path.exists, temporary):
            os.remove(name)

def copy_chunks(chunks, f, total):
    """ write chunks of bytes to the file f, progress to stderr; returns how many bytes. total: expected, or 0 """
    done, tty = 0, sys.stderr.isatty()
    interval, end = (0.1, '\r') if tty else (10, '\n') # seconds; in a log file every message stays, so fewer of them
    started = shown = time.time()
    for chunk in chunks:
        done += f.write(chunk)
        if time.time() - shown > interval:
            shown = time.time()
            rate = done / (shown - started) # bytes per second
            left = f", {max(0, total - done) / rate:.0f} s left" if total else ''
            print(f"{done / 1e6:8.1f} MB, {rate / 1e6:.1f} MB/s{left}   ", end=end, file=sys.stderr, flush=True)
    return done

def download(url, path, expected='', instead="use a copy you have with --input= or another address with --url="):
    """ save url as path, unless a file with the expected checksum is there already; returns path """
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
                total = int(reply.headers.get('content-length', 0))
                done = copy_chunks(reply.iter_content(1 << 16), f, total)
        except requests.RequestException as e:
            kinds = [(requests.Timeout, "no answer in time"), (requests.ConnectionError, "no connection"),
                     (requests.exceptions.ChunkedEncodingError, "the connection broke off")]
            reason = next((words for kind, words in kinds if isinstance(e, kind)), str(e))
            raise PrepareError(f"could not download {url} ({reason}): {instead}") from None
        check_sum(temporary, expected, url)
    print(f"downloaded {url} to {path}, {done / 1e6:.1f} MB", file=sys.stderr)
    return path

def split_documents(documents, val_fraction):
    """ {'train': [str], 'val': [str]}: the last val_fraction of all characters is val; one text may be cut in two """
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
# tokenizers: each codec takes meta.json as a dict and returns two functions: encode(str) -> int64 ids (n,), and
# decode(ids) -> str, where all ids are those of text

def char_codec(meta):
    """ one id per character of the corpus, in the order of their code points """
    points = np.array([ord(c) for c in meta['chars']], dtype='<u4')
    table = np.full(int(points.max()) + 2, -1) # code point -> id; the last entry stands for all higher code points
    table[points] = np.arange(len(points))

    def encode(text):
        found = np.frombuffer(text.encode('utf-32-le', 'surrogatepass'), dtype='<u4') # code points
        ids = table[np.minimum(found, len(table) - 1)]
        if ids.min(initial=0) < 0:
            n = int(np.argmin(ids)) # the first unknown character
            has = meta['chars'][:100] + ('...' if len(points) > 100 else '')
            raise PrepareError(f"unknown character {text[n]!r} (U+{ord(text[n]):04X}) at position {n}: "
                               f"this model's vocabulary has only {has!r}")
        return ids

    return encode, lambda ids: points[ids].tobytes().decode('utf-32-le', 'replace')

def byte_codec(meta):
    """ the bytes of UTF-8: 256 ids for any text, but longer sequences """
    def encode(text):
        return np.frombuffer(text.encode('utf-8', 'surrogatepass'), dtype=np.uint8).astype(np.int64)

    return encode, lambda ids: bytes(ids.tolist()).decode('utf-8', 'replace')

def gpt2_codec(meta):
    """ GPT-2's byte pair encoding. '<|endoftext|>' in a text is encoded as ordinary text, never as the end id """
    bpe = gpt2_encoding()
    return lambda text: np.array(bpe.encode_ordinary(text), dtype=np.int64), lambda ids: bpe.decode(ids.tolist())

TOKENIZERS = {'char': char_codec, 'byte': byte_codec, 'gpt2': gpt2_codec}

def gpt2_encoding():
    """ tiktoken's encoding of GPT-2 """
    try:
        import tiktoken
    except ImportError:
        raise PrepareError("the gpt2 tokenizer needs tiktoken: pip install tiktoken") from None
    # tiktoken would download its two files without a timeout, and an error would be a page of traceback. So we put the
    # files into its cache first, under the names that tiktoken looks for: the sha1 of each address.
    usual = os.environ.get('DATA_GYM_CACHE_DIR') or os.path.join(tempfile.gettempdir(), 'data-gym-cache')
    folder = os.environ['TIKTOKEN_CACHE_DIR'] = os.environ.get('TIKTOKEN_CACHE_DIR') or usual
    places = {file: os.path.join(folder, hashlib.sha1(file.encode()).hexdigest()) for file in _GPT2_FILES}
    by_hand = ' and '.join(f"{file} as {path}" for file, path in places.items())
    for file, path in places.items():
        download(file, path, _GPT2_FILES[file], f"gpt2 needs two files, save {by_hand}; or use --tokenizer=byte")
    return tiktoken.get_encoding('gpt2')

def vocabulary(kind, documents=(), closed=False):
    """ the part of meta.json that a Tokenizer needs, as a dict. closed: the end id counts as text (see text_size) """
    if kind not in TOKENIZERS:
        raise PrepareError(f"tokenizer is one of {', '.join(TOKENIZERS)}, not {kind!r}{nearest(kind, TOKENIZERS)}")
    meta = {'tokenizer': kind}
    if kind == 'char':
        meta['chars'] = ''.join(sorted(set().union(*documents)))
        n = len(meta['chars'])
    else:
        n = {'byte': 256, 'gpt2': 50256}[kind]
    meta |= dict(end_id=n, begin_id=n + 1, mask_id=n + 2, pad_id=n + 3, text_size=n + closed, vocab_size=n + 4)
    if kind == 'gpt2': # GPT-2 always had this end id, <|endoftext|>; matrices are faster with a multiple of 64 rows
        meta |= dict(text_size=50257, vocab_size=50304)
    return meta

class Tokenizer:
    """ text <-> ids. meta: meta.json as a dict, or the copy of it in a checkpoint; nothing else is needed """
    def __init__(self, meta):
        self.meta, self.end_id = meta, meta['end_id'] # all ids below end_id are text

    @functools.cached_property
    def codec(self): # made on first use: training on a cluster without network never needs the files of gpt2
        return TOKENIZERS[self.meta['tokenizer']](self.meta)

    def encode(self, text):
        """ str -> int64 array (n,); a PrepareError for a character that is not in the vocabulary """
        return self.codec[0](text)

    def decode(self, ids):
        """ ids in an array or list of any shape -> str. Reserved ids are left out; broken UTF-8 becomes U+FFFD """
        ids = np.asarray(ids, dtype=np.int64).reshape(-1)
        parts = np.split(ids, np.flatnonzero(ids >= self.end_id)) # a reserved id also ends a character of several bytes
        return ''.join(self.codec[1](part[part < self.end_id]) for part in parts)

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
    """ {segment: tokens} without the segments that skip names: 'plan' or 'plan,check' """
    gone, expected = [name.strip() for name in skip.split(',') if name.strip()], [*lengths][1:]
    for name in gone:
        if name not in expected:
            raise PrepareError(f"skip names {name!r}, expected some of {', '.join(expected)}{nearest(name, expected)}")
    return {name: n for name, n in lengths.items() if name not in gone}

def segments_text(lengths):
    """ {'question': 128, ...} -> 'question:128,...': what read_segments reads """
    return ','.join(f'{name}:{n}' for name, n in lengths.items())

_LENGTHS = {'question_len': 'question', 'plan_len': 'plan', 'exec_len': 'execution'}

def choose_lengths(own, settings):
    """ {segment: tokens}: as the dataset's own text says, unless the settings (a dict) say otherwise """
    given = {key: settings[key] for key in _LENGTHS if key in settings}
    if given and 'segments' in settings:
        raise PrepareError(f"--segments= gives all lengths and --{next(iter(given))}= one of them: "
                           "give only one of both")
    lengths = read_segments(settings.get('segments', own))
    for key in given:
        if _LENGTHS[key] not in lengths:
            raise PrepareError(f"--{key}= is the length of a {_LENGTHS[key]}, but the segments are "
                               f"{', '.join(lengths)}: give --segments=")
    lengths |= {_LENGTHS[key]: n for key, n in given.items()}
    return read_segments(segments_text(lengths)) # checks the numbers

def fit(splits, lengths, encode, layout, too_long='drop', var_length=False):
    """
    Encodes records and drops or cuts those that do not fit. splits: {split: records}; lengths: {segment: tokens};
    layout: a function, lengths -> Layout. Returns ({split: list of rows (T,)}, {split: report}, lengths).
    """
    if too_long not in ('drop', 'truncate'):
        raise PrepareError(f"too_long is {too_long!r}, expected drop or truncate")
    splits = {split: [[encode(record[name]) for name in lengths] for record in records]
              for split, records in splits.items()}
    if var_length:
        lengths = shortened(lengths, [parts for records in splits.values() for parts in records])
    rows, reports = {}, {}
    for split, records in splits.items():
        sizes = [[len(ids) + 1 for ids in parts] for parts in records] # an end id follows
        sizes = np.array(sizes, dtype=int).reshape(len(records), len(lengths))
        over = sizes > [*lengths.values()] # (records, segments)
        kept = [parts for parts, beyond in zip(records, over) if too_long == 'truncate' or not beyond.any()]
        if not kept:
            raise PrepareError(f"no record of {split} fits {segments_text(lengths)}: raise the lengths, or cut "
                               "records with --too_long=truncate")
        rows[split] = list(layout(lengths).raw(kept))
        segments = {name: {'too_long': int(n), 'longest': int(longest), 'mean': round(float(mean), 1)}
                    for name, n, longest, mean in zip(lengths, over.sum(0), sizes.max(0), sizes.mean(0))}
        reports[split] = {'records': len(kept), 'too_long': int(over.any(1).sum()), 'did': too_long,
                          'segments': segments}
    return rows, reports, lengths

def shortened(lengths, records):
    """ {segment: tokens}: shortened to the longest in the records, rounded up to a multiple of 16 """
    longest = [max(len(ids) + 1 for ids in segment) for segment in zip(*records)]
    return {name: min(n, -(-most // 16) * 16) for (name, n), most in zip(lengths.items(), longest)}

class Layout:
    """
    Turns records of segments into rows that a model reads, and back. Raw rows (B, T) are the rows on the disk: every
    segment in its own columns, an end id after its tokens, then pads.

    ids: the block id of every column, (T,), of a model that has blocks. In its rows, the rest of the block in which a
    segment ends is filled with end ids. Blocks entirely after that stay pads, as does the rest of the question. All
    pads form one more block, with the largest id, which attention hides from every token.
    Without ids (ar) rows are packed: pads are moved to the end of the row.
    """
    def __init__(self, meta, ids=None):
        self.lengths = read_segments(meta['segments'])
        self.edges = np.cumsum([0, *self.lengths.values()])
        self.segment = np.repeat(np.arange(len(self.lengths)), list(self.lengths.values())) # (T,), the question is 0
        self.end_id, self.pad_id = meta['end_id'], meta['pad_id']
        self.ids = None if ids is None else np.array(ids)
        if ids is not None and self.ids[-1] > 0: # 0: one block holds everything, so there is nothing to divide
            self._check_blocks()

    def _check_blocks(self):
        """ a PrepareError unless every segment after the question is a whole number of blocks """
        for name, a, b in zip([*self.lengths][1:], self.edges[1:], self.edges[2:]):
            size = int((self.ids[a:b] == self.ids[a]).sum())
            inside = self.ids[a] == self.ids[a - 1] # the segment begins in the middle of a block
            if inside or (b - a) % size:
                size = np.bincount(self.ids).max() if inside else size
                raise PrepareError(f"{name} begins at token {a} and has {b - a} tokens, no whole blocks of "
                                   f"diffusion_block_size={size}: change it or prepare other lengths")

    def raw(self, records):
        """ records, lists of the ids of every segment without end ids -> raw rows (B, T); what is too long is cut """
        rows = np.full((len(records), len(self.segment)), self.pad_id)
        for row, parts in zip(rows, records):
            for a, b, ids in zip(self.edges, self.edges[1:], parts):
                ids = np.append(ids[:b - a - 1], self.end_id)
                row[a:a + len(ids)] = ids
        return rows

    def rows(self, raw, only=None, length=None):
        """
        Raw rows (B, T) -> a batch for a model, {'idx', 'targets'} and for a model with blocks 'block_ids', all (B, T).
        only: numbers of the segments to score; None: all but the question. length: of packed rows, if longer than T.
        """
        raw = raw.astype(np.int64)
        scored = np.isin(self.segment, range(1, len(self.lengths)) if only is None else only) # (T,)
        if self.ids is None:
            return self._packed(raw, scored, length)
        first = np.flatnonzero(np.diff(self.ids, prepend=-1)) # the first column of each block
        pad = raw == self.pad_id
        used = np.logical_or.reduceat(~pad, first, axis=1)[:, self.ids] # (B, T): has the block any text or end?
        raw = np.where(pad & used & (self.segment > 0), self.end_id, raw)
        pad = raw == self.pad_id
        return {'idx': raw, 'targets': np.where(scored & ~pad, raw, -1), 'block_ids': self.blocks(pad)}

    def _packed(self, raw, scored, length):
        """ the batch of a model without blocks: {'idx', 'targets'}, both (B, T), or (B, length) if that is longer """
        order = (raw == self.pad_id).argsort(1, kind='stable') # pads last, everything else in its order
        raw, scored = np.take_along_axis(raw, order, 1), scored[order]
        if length: # nanoGPT's rows have one more token
            wider = (0, 0), (0, max(0, length - raw.shape[1]))
            raw, scored = np.pad(raw, wider, constant_values=self.pad_id), np.pad(scored, wider)
        return {'idx': raw, 'targets': np.where(scored & (raw != self.pad_id), raw, -1)}

    def blocks(self, pad):
        """ the block id of every position, (B, T). pad: bool (B, T); all pads get one more block, the last """
        return np.where(pad, self.ids[-1] + 1, self.ids)

    def prompt(self, questions):
        """
        The ids of questions, a list of B arrays -> the arguments of generate, a dict: idx (B, N), with -1 at positions
        that the model writes, max_new_tokens, and for a model with blocks block_ids (B, N).
        """
        n = self.edges[1]
        for ids in questions:
            if len(ids) >= n:
                raise PrepareError(f"the question has {len(ids)} tokens, this model reads at most {n - 1}")
        raw = self.raw([[ids] for ids in questions])
        if self.ids is None:
            longest = max(map(len, questions)) + 1 # an end id follows
            idx = np.where(raw == self.pad_id, -1, raw)[:, :longest]
            return {'idx': idx, 'max_new_tokens': int(len(self.segment) - n)}
        pad = (raw == self.pad_id) & (self.segment == 0)
        return {'idx': np.where(self.segment > 0, -1, raw), 'max_new_tokens': 0, 'block_ids': self.blocks(pad)}

    def parts(self, row):
        """
        A row of a model, (T,), -1 where nothing is written yet -> {segment: its ids before its end id}. A segment
        whose first token is not written yet is left out.
        """
        row, found = np.asarray(row), {}
        if self.ids is None:
            cuts = np.flatnonzero(row == self.end_id)[:len(self.lengths) - 1] + 1
        else:
            cuts = self.edges[1:-1]
        for name, part in zip(self.lengths, np.split(row, cuts)):
            if len(part) and part[0] != -1:
                over = np.isin(part, (self.end_id, self.pad_id, -1))
                found[name] = part[:over.argmax()] if over.any() else part
        return found

# -----------------------------------------------------------------------------
# writing

def names():
    """ the names of all datasets that can be prepared, sorted """
    return sorted(os.path.basename(os.path.dirname(path)) for path in glob.glob(f'{glob.escape(_DATA)}/*/prepare.py'))

def data_folder(dataset):
    """ the path of a dataset's folder: a bare name lives in data/, anything else is a path; ~ is the home folder """
    place = os.path.expanduser(dataset)
    path = place != dataset or '/' in dataset or os.sep in dataset or dataset.startswith('.')
    return place if path else os.path.join(_DATA, dataset)

def load(folder, file):
    """ folder/file as a module. Its name contains the folder's name: every dataset has a prepare.py """
    unique = f"data_{os.path.basename(os.path.abspath(folder))}_{file.removesuffix('.py')}"
    spec = importlib.util.spec_from_file_location(unique, os.path.join(folder, file))
    module = sys.modules[unique] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module

def provider(dataset, file='provider.py'):
    """ {name: value} of everything that a script in the dataset's folder defines; {} if there is no script """
    folder = data_folder(dataset)
    return vars(load(folder, file)) if os.path.exists(os.path.join(folder, file)) else {}

def read_script(name):
    """ data/<name>/prepare.py as a module """
    if name not in names():
        what = f"data/ has no {name}/prepare.py" if name else "say what to prepare"
        raise PrepareError(f"{what}: python prepare.py NAME knows {', '.join(names())}{nearest(name, names())}")
    return load(os.path.join(_DATA, name), 'prepare.py')

def parameters(script):
    """ {name: inspect.Parameter} of corpus(), those that can be passed by name """
    found = inspect.signature(script.corpus, eval_str=True).parameters # eval_str: annotations may be text
    return {key: p for key, p in found.items() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}

_ALWAYS = 'dataset', 'tokenizer' # settings that prepare.py itself uses for every dataset
_OF_RECORDS = (*_LENGTHS, 'segments', 'too_long', 'var_length') # settings that it uses for records
_NO_SETTINGS = 'folder', 'fields' # parameters of corpus() that prepare.py fills in
_ANYTHING = bool | int | float | str | None # the type of a parameter with neither a default nor an annotation

def settings_of(script):
    """
    ({setting: default}, {setting: type}) of `python prepare.py NAME`: the parameters of corpus(), then the settings
    that prepare.py itself uses. The default is None if a parameter must be given. Types are only those that differ
    from the type of the default.
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
    """ a value of a parameter of any type: text becomes a number, True or False if it reads as one """
    if isinstance(value, str):
        for read in int, float, {'True': True, 'False': False}.__getitem__:
            with contextlib.suppress(ValueError, KeyError):
                return read(value)
    return value

def no_use(name, key, takes):
    """ the sentence for a setting (key) that is not among those that `name` takes """
    return f"{name} has no use for --{key}, only for {', '.join(takes) or 'its text as it is'}{nearest(key, takes)}"

def arguments(name, accepted, settings, known):
    """
    {parameter: value}, the arguments of corpus(). accepted: the result of parameters(); settings: what was set for it;
    known: what prepare.py knows, of which corpus() gets what it accepts.
    """
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
    if told.get('input'): # a shell leaves the ~ of --input=~/book.txt as it is
        told['input'] = os.path.expanduser(told['input'])
    return told

def prepare(name, /, dataset='', tokenizer='', **settings):
    """ write a dataset's folder ('': data/<name>) as data/<name>/prepare.py says, all or nothing; returns the path """
    started = time.time()
    script = read_script(name)
    folder, kind, accepted = data_folder(dataset or name), tokenizer or script.tokenizer, parameters(script)
    own, lengths = {}, {} # of records
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
        raise PrepareError(f"corpus() of data/{name}/prepare.py returns no dict of splits and closed, such as "
                           "{'splits': {'train': [...], 'val': [...]}, 'closed': False}")
    splits = corpus.pop('splits')
    texts = {split: [record[key] for record in documents for key in lengths] if lengths else documents
             for split, documents in splits.items()} # of a record, every segment is a text
    meta = {'format': _FORMAT, 'dataset': name, **vocabulary(kind, sum(texts.values(), []), corpus['closed'])}
    meta['dtype'] = 'uint16' if meta['vocab_size'] <= 65535 else 'uint32'
    used = {key: told.get(key, parameter.default) for key, parameter in accepted.items() if key not in _NO_SETTINGS}
    used = json.loads(json.dumps(used, default=str)) # what JSON does not have becomes text
    meta |= {'splits': {}, **corpus, 'settings': used}

    codec, reports = Tokenizer(meta), {}
    if lengths:
        how = {key: own[key] for key in ('too_long', 'var_length') if key in own}
        layout = lambda lengths: Layout(meta | {'segments': segments_text(lengths)})
        splits, reports, lengths = fit(splits, lengths, codec.encode, layout, **how)
        meta['segments'] = segments_text(lengths)
    for split, documents in splits.items():
        meta['splits'][split] = {'tokens': 0, 'characters': sum(map(len, texts[split])), 'documents': len(documents),
                                 'sha256': '', **reports.get(split, {})}
    write_folder(folder, meta, splits, codec)
    show(folder, meta, codec, time.time() - started)
    return folder

def write_folder(folder, meta, splits, codec):
    """
    Writes every SPLIT.bin and then meta.json, all or nothing. splits: {split: texts, or rows of ids for records}. The
    counts of tokens and the checksums of the files are entered into meta.
    """
    def to_ids(document):
        if 'segments' in meta:
            return document
        ids = codec.encode(document)
        return np.append(ids, codec.end_id) if meta['closed'] else ids

    paths = [os.path.join(folder, f'{split}.bin') for split in splits] + [os.path.join(folder, 'meta.json')]
    with replacing(*paths) as temporary:
        for path, (split, documents) in zip(temporary, splits.items()):
            with open(path, 'wb') as f:
                for ids in map(to_ids, documents):
                    f.write(ids.astype(meta['dtype']).tobytes())
                    meta['splits'][split]['tokens'] += len(ids)
            meta['splits'][split]['sha256'] = file_sum(path)
        with open(temporary[-1], 'w') as f:
            json.dump(meta, f, indent=1)

def show(folder, meta, codec, seconds):
    """ print what was prepared: a line per split, the first three records or the first characters, and the time """
    first, begins = os.path.join(folder, f"{next(iter(meta['splits']))}.bin"), ''
    if 'segments' not in meta:
        for split, n in meta['splits'].items():
            print(f"{split:5} {n['documents']:6,} documents {n['characters']:12,} characters {n['tokens']:12,} tokens")
        begins = '; begins ' + ascii(codec.decode(np.fromfile(first, dtype=meta['dtype'], count=60))[:60])
    else:
        for split, n in meta['splits'].items():
            sizes = [f"{key} at most {size['longest']}, mean {size['mean']}, {size['too_long']} too long"
                     for key, size in n['segments'].items()]
            print(f"{split:5} {n['records']:6,} records of {meta['segments']}; {n['too_long']:,} were too long: "
                  f"{n['did']}. Tokens with the end, {'; '.join(sizes)}")
        lengths = read_segments(meta['segments'])
        *edges, T = np.cumsum([*lengths.values()])
        for row in np.fromfile(first, dtype=meta['dtype'], count=3 * T).reshape(-1, T):
            parts = zip(lengths, np.split(row, edges))
            print('---', *(f"[{key}] {codec.decode(ids)}" for key, ids in parts), sep='\n')
    print(f"{meta['vocab_size']} ids ({meta['tokenizer']}), {seconds:.1f} s{begins}", flush=True)

def ensure(dataset):
    """ the path of a dataset's folder, prepared first if that needs no setting; else a PrepareError says how """
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
    known = dataset in names()
    again = f"python prepare.py {dataset if known else f'NAME --dataset={dataset}'}"
    try:
        with open(path, encoding='utf-8-sig') as f: # an editor may have put a byte order mark there
            meta = json.load(f)
        if meta['format'] > _FORMAT:
            raise PrepareError(f"{path} has format {meta['format']}, newer than {_FORMAT}: update this or run {again}")
        if wrong := damage(meta):
            raise ValueError(wrong)
    except FileNotFoundError:
        raise PrepareError(f"there is no {path}: run {again}{'' if known else nearest(dataset, names())}") from None
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as e:
        raise PrepareError(f"cannot make sense of {path} ({type(e).__name__}: {e}): run {again}") from None
    return meta

def damage(meta):
    """ what is wrong with a dict that should be a meta.json, in words; '' if nothing is """
    reserved = [meta[key] for key in ('begin_id', 'mask_id', 'pad_id')]
    counts = [meta['end_id'], meta['text_size'], meta['vocab_size'], *reserved]
    counts += [split['tokens'] for split in meta['splits'].values()]
    if meta['tokenizer'] not in TOKENIZERS:
        return f"tokenizer {meta['tokenizer']!r}"
    if meta['dtype'] not in ('uint16', 'uint32'):
        return f"dtype {meta['dtype']!r}"
    if not all(type(n) is int and n >= 0 for n in counts):
        return "a count or an id that is no number"
    if not meta['end_id'] <= meta['text_size'] <= min(reserved) <= max(reserved) < meta['vocab_size']:
        return "ids that are not in order"
    if meta['tokenizer'] == 'char' and len(meta['chars']) != meta['end_id']:
        return "another number of chars than ids"
    return ''

class Corpus:
    """
    A prepared dataset of plain text. A batch is {'idx', 'targets'}, two int64 arrays (B, length) with the same ids:
    an objective shifts or corrupts them itself. (-1 in targets means not scored; batches of plain text have none.)
    """
    def __init__(self, dataset):
        self.folder, self.meta = data_folder(dataset), read_meta(dataset)
        if 'segments' in self.meta and not isinstance(self, Records):
            raise PrepareError(f"{self.folder} holds rows of segments ({self.meta['segments']}), expected plain text")
        self.tokenizer = Tokenizer(self.meta)
        self._bins = {}

    def tokens(self, split):
        """ how many tokens a split has """
        splits = self.meta['splits']
        if split not in splits:
            raise PrepareError(f"{self.folder} has no split {split!r}, only {', '.join(splits)}")
        return splits[split]['tokens']

    def n_windows(self, split, length):
        """ how many windows `windows` yields without a limit """
        return self.tokens(split) // length

    def batch(self, split, batch_size, length, rng, done=1.0):
        """ random windows, B = batch_size; all starts are equally likely. rng: a numpy Generator; done: see Records """
        ids = self._data(split, length)
        starts = rng.integers(0, len(ids) - length + 1, size=(batch_size, 1)) # (B, 1)
        return self._batch(split, ids[starts + np.arange(length)]) # only these rows are read from the disk

    def windows(self, split, batch_size, length, limit=None):
        """
        Yields batches of windows that do not overlap, in order, `limit` windows at most. The last batch may be smaller.
        Tokens after the last whole window are left out.
        """
        ids, n = self._data(split, length), self.n_windows(split, length)
        n = n if limit is None else min(n, limit)
        for i in range(0, n, batch_size):
            rows = min(batch_size, n - i)
            yield self._batch(split, ids[i * length:(i + rows) * length].reshape(rows, length))

    def _data(self, split, length):
        """ the ids of a split, a memmap (n,) that is opened once; a PrepareError if there are fewer than `length` """
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
        """ ids (B, length) -> a batch, checked """
        idx = ids.astype(np.int64) # (B, length)
        if idx.size and idx.max() >= self.meta['text_size']:
            raise PrepareError(f"{self.folder}/{split}.bin holds the id {idx.max()}, but ids of text are below "
                               f"{self.meta['text_size']}: prepare it again")
        return {'idx': idx, 'targets': idx.copy()}

class Records(Corpus):
    """
    A prepared dataset of records, as rows of segments. skip: names of segments to leave out, 'plan,check'. Whoever
    builds a model for the records sets `layout` to a Layout with the block ids of that model.
    """
    def __init__(self, dataset, skip=''):
        super().__init__(dataset)
        lengths = read_segments(self.meta['segments'])
        kept = without(lengths, skip)
        self.columns = np.repeat([name in kept for name in lengths], list(lengths.values())) # (stored length,), bool
        self.meta = self.meta | {'segments': segments_text(kept)}
        self.layout = Layout(self.meta)

    def n_windows(self, split, length=None):
        """ how many records a split has """
        return super().tokens(split) // len(self.columns)

    def tokens(self, split):
        """ how many tokens a split has in the segments in use, pads included """
        return self.n_windows(split) * int(self.columns.sum())

    def raw(self, split, which):
        """ raw rows of a split, (B, T). which: an array of row numbers, or a slice """
        return self._data(split, len(self.columns)).reshape(-1, len(self.columns))[which][:, self.columns]

    def batch(self, split, batch_size, length, rng, done=1.0):
        """
        Random records as a batch, see Layout.rows. done: the part of the curriculum that is over, 0 to 1. At 0 only the
        first segment after the question is scored; the others join one by one, and at 1 all are scored.
        """
        raw = self.raw(split, rng.integers(0, self.n_windows(split), size=batch_size))
        more = len(self.layout.lengths) - 2 # segments that join
        return self.layout.rows(raw, range(1, 2 + int(min(1.0, done) * more)), length)

    def windows(self, split, batch_size, length, limit=None):
        """ yields batches of all records in order, `limit` records at most """
        n = min(self.n_windows(split), limit or sys.maxsize)
        for i in range(0, n, batch_size):
            yield self.layout.rows(self.raw(split, slice(i, min(n, i + batch_size))), length=length)

def open_corpus(dataset, block_size, skip=''):
    """
    (Corpus or Records, block_size). For records block_size must be the sum of their segments' lengths; 0 stands for
    that sum.
    """
    if 'segments' in read_meta(dataset):
        corpus = Records(dataset, skip)
        total = int(corpus.layout.edges[-1])
        if block_size not in (0, total):
            raise PrepareError(f"the segments {corpus.meta['segments']} of {dataset} add up to {total} tokens, "
                               f"block_size is {block_size}: set --block_size={total}, or 0")
        return corpus, total
    if skip:
        raise PrepareError(f"skip={skip} leaves out segments, and {dataset} is plain text, which has none")
    if not block_size:
        raise PrepareError(f"block_size=0 is what segments add up to, and {dataset} is plain text, which has none")
    return Corpus(dataset), block_size

def main(argv):
    """ the command: argv is NAME and --key=value """
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
        # --input= and the like say the same as nothing
        prepare(name, **{key: value for key, value in given.items() if key not in _OWN or value != ''})
    except PrepareError as e:
        fail(str(e))
    except MemoryError:
        fail("out of memory: prepare a part of it, such as fewer files or records")

if __name__ == '__main__':
    sys.modules['prepare'] = sys.modules['__main__'] # data scripts import prepare: this module, not a second copy
    try:
        try:
            main(sys.argv[1:])
        finally:
            print(end='', flush=True) # flush here, where a BrokenPipeError can be caught
    except BrokenPipeError: # the program that reads our output, such as head, has ended
        os._exit(141) # the exit code of SIGPIPE; at once, because python would flush again and complain
