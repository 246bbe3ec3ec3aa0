"""
Pictures from settings or a config alone; no checkpoint, no training.
$ python -m tools.plot scheduling_matrix config/df_published.py
$ python -m tools.plot mask config/train_arithmetic.py
$ python -m tools.plot mask --objective=bd3lm --attention=hierarchical --block_size=32 --diffusion_block_size=4 \
      --segments=question:4,plan:8,check:4,execution:16
$ python -m tools.plot scheduling_matrix --df_scheduling_matrix=trapezoid --df_uncertainty_scale=2 --horizon=12 \
      --output=trapezoid.png
"""
import itertools
import os
import sys
from dataclasses import fields

import torch

import prepare
from configurator import configure, fail, print_anything
from model import OBJECTIVES, GPTConfig, block_ids, check, dense_mask, scheduling_matrix
from tools.bench import train_settings
from tools.runs import as_command, check_output, sentences

# what can be set: whatever of train.py is a field of GPTConfig (`--help` lists them), and
objective = 'ar' # mask: a row of OBJECTIVES
dataset = '' # mask: where segments come from, prepared or not, if not from --segments
skip = '' # mask: segments of the dataset to do without
horizon = 16 # scheduling_matrix: tokens in the chunk
output = '' # file to write, its ending decides the format; '': the picture's name.png

MOST = 8192 ** 2 # cells of a matrix: nobody sees more, and it must fit into memory

def plot_scheduling_matrix(config, axes):
    """ rows: network calls, downwards; columns: tokens of a chunk; dark is noise """
    S = config.df_sampling_timesteps
    # network calls between a token and the next, at most
    waits = S if config.df_scheduling_matrix == 'autoregressive' else config.df_uncertainty_scale
    check(not (S + horizon * waits) * horizon > MOST, f"horizon is {horizon}, which is too much for a picture")
    matrix = scheduling_matrix(config.df_scheduling_matrix, horizon, S, config.df_uncertainty_scale)
    image = axes.imshow(matrix.numpy(), cmap='Purples', aspect='auto', interpolation='nearest')
    axes.figure.colorbar(image, label='noise level (index)')
    axes.set(title=f"{config.df_scheduling_matrix}, uncertainty scale {config.df_uncertainty_scale:g}: "
                   f"{len(matrix) - 1} network calls for {horizon} tokens",
             xlabel='token of the chunk', ylabel='network calls made')

def segments_of(dataset):
    """ the segments of a prepared dataset, or those that it would be prepared with; '' for plain text """
    if dataset in prepare.names() and not os.path.exists(os.path.join(prepare.data_folder(dataset), 'meta.json')):
        return getattr(prepare.load(os.path.join(prepare._DATA, dataset), 'prepare.py'), 'segments', '')
    return prepare.read_meta(dataset).get('segments', '')

def plot_mask(config, axes):
    """
    A dark cell: the row (query) sees the column (key). Of two streams the noisy copy (xt) comes first, then the clean
    one (x0). Lines separate segments.
    """
    kind, T = OBJECTIVES[objective], config.block_size
    streams = 1 + getattr(kind, 'two_streams', False)
    check((streams * T) ** 2 <= MOST, f"block_size is {T}, which is too much for a picture")
    check(config.attention in kind.attentions,
          f"{objective} works with attention {' | '.join(kind.attentions)}, not {config.attention!r}")
    total = sum(config.lengths)
    check(total in (0, T), f"segments {config.segments} add up to {total}, block_size is {T}")
    cut = config.diffusion_block_size if config.attention == 'block' or streams == 2 else None
    ids = block_ids(config.attention, T, cut, config.lengths)
    noisy = torch.arange(streams * T) < T * (streams - 1)
    question = 0 if config.causal_within_block else None
    mask = dense_mask(ids.repeat(streams), noisy, config.clean_causal, question=question)
    axes.imshow(mask.numpy(), cmap='Purples', interpolation='nearest', vmax=1.5)
    lengths = config.lengths or [T]
    names = [part.partition(':')[0] if ':' in part else '' for part in (config.segments or '').split(',')]
    names = [name or f'segment {i}' if config.lengths else 'text' for i, name in enumerate(names)]
    labels = [name + stream for stream in ((' xt', ' x0') if streams == 2 else ('',)) for name in names]
    edges = [0, *itertools.accumulate(lengths * streams)]
    for edge in edges[1:-1]:
        axes.axhline(edge - 0.5, color='tab:orange', linewidth=0.8)
        axes.axvline(edge - 0.5, color='tab:orange', linewidth=0.8)
    for name, axis in ('x', axes.secondary_xaxis('top')), ('y', axes.secondary_yaxis('right')):
        middles = [(a + b - 1) / 2 for a, b in zip(edges, edges[1:])]
        getattr(axis, f'set_{name}ticks')(middles, labels, rotation=90 if name == 'x' else 0)
        axis.tick_params(length=0)
    blocks = f", blocks of {cut}" if cut else ''
    axes.set(xlabel='Key position', ylabel='Query position')
    causal = ', causal within blocks' * config.causal_within_block
    axes.set_title(f"{objective}, attention {config.attention}{blocks}{causal}: {int(mask.sum()):,} pairs", pad=12)

PICTURES = {'mask': plot_mask, 'scheduling_matrix': plot_scheduling_matrix}

def read_settings(argv):
    """ config files and --key=value -> (GPTConfig, {'objective': ..., 'horizon': ..., 'output': ...}) """
    train, names = train_settings(), [f.name for f in fields(GPTConfig)]
    own = dict(objective=objective, dataset=dataset, skip=skip, horizon=horizon, output=output)
    # a config may say whatever train.py knows, a command line what the picture depends on
    found = configure(train | own, [os.path.expanduser(a) for a in argv if not a.startswith('-')])
    defaults = {k: v for k, v in found.items() if k in names or k in own}
    about = dict(__file__=__file__, __doc__=__doc__, __annotations__=train['__annotations__'])
    config = configure(about | defaults, [a for a in argv if a.startswith('-')])
    check(config['objective'] in OBJECTIVES,
          f"objective is {config['objective']!r}, expected one of {', '.join(OBJECTIVES)}")
    segments = config['segments'] or config['dataset'] and segments_of(config['dataset'])
    if segments and config['skip']:
        segments = prepare.segments_text(prepare.without(prepare.read_segments(segments), config['skip']))
    config['segments'] = segments or None
    config['attention'] = config['attention'] or OBJECTIVES[config['objective']].usual_attention(segments)
    config['diffusion_block_size'] = config['diffusion_block_size'] or None
    config['block_size'] = config['block_size'] or sum(GPTConfig(segments=config['segments']).lengths)
    check(config['block_size'] >= 1, f"block_size is {config['block_size']}, expected at least 1, or 0 and segments")
    return GPTConfig(**{k: v for k, v in config.items() if k in names}), {k: config[k] for k in own}

def draw(name, config):
    """ write the picture; returns its path """
    try:
        from matplotlib.figure import Figure # not pyplot: no display, no window
    except ImportError:
        fail("a picture needs matplotlib: pip install matplotlib")
    figure = Figure(figsize=(6, 7), layout='constrained')
    path, kinds = os.path.expanduser(output or f'{name}.png'), figure.canvas.get_supported_filetypes()
    path += '' if os.path.splitext(path)[1] or os.path.isdir(path) else '.png'
    ending = os.path.splitext(path)[1][1:].lower()
    check_output(path)
    check(ending in kinds, f"output is {output}, expected a name that ends in .{', .'.join(sorted(kinds))}")
    PICTURES[name](config, figure.subplots())
    with prepare.replacing(path) as (temporary,):
        figure.savefig(temporary, dpi=150, format=ending)
    return path

def main():
    print_anything()
    names = [a for a in sys.argv[1:2] if not a.startswith('-')]
    if names and names[0] not in PICTURES:
        fail(f"there is no picture {names[0]!r}, expected one of {', '.join(PICTURES)}")
    with sentences():
        config, own = read_settings(sys.argv[1 + len(names):])
        if not names:
            fail(f"name a picture: python -m tools.plot {' | '.join(PICTURES)}")
        globals().update(own)
        print(draw(names[0], config))

if __name__ == '__main__':
    as_command(main)
