"""
Pictures from settings or a config alone; no checkpoint, no training.
$ python -m tools.plot scheduling_matrix config/df_published.py
$ python -m tools.plot mask config/train_arithmetic.py
$ python -m tools.plot mask --objective=bd3lm --attention=hierarchical --segments=question:4,plan:8,check:4,execution:16 --block_size=32 --diffusion_block_size=4
$ python -m tools.plot scheduling_matrix --df_scheduling_matrix=trapezoid --df_uncertainty_scale=2 --horizon=12 --output=trapezoid.png
"""
import itertools
import os
import sys
from dataclasses import fields

import torch

import prepare
from configurator import configure, fail, run_config
from model import OBJECTIVES, GPTConfig, UserError, block_ids, check, dense_mask, scheduling_matrix
from tools.bench import train_settings

# what can be set: whatever of train.py is a field of GPTConfig (`--help` lists them), and
objective = 'ar' # mask: a row of OBJECTIVES
dataset = '' # mask: where segments come from, prepared or not, if not from --segments
skip = '' # mask: segments of the dataset to do without
horizon = 16 # scheduling_matrix: tokens in the chunk
output = '' # file to write, its ending decides the format; '': the picture's name.png

def plot_scheduling_matrix(config, axes):
    """ rows: network calls, downwards; columns: tokens of a chunk; dark is noise """
    matrix = scheduling_matrix(config.df_scheduling_matrix, horizon, config.df_sampling_timesteps, config.df_uncertainty_scale)
    image = axes.imshow(matrix.numpy(), cmap='Purples', aspect='auto', interpolation='nearest')
    axes.figure.colorbar(image, label='noise level (index)')
    axes.set(title=f"{config.df_scheduling_matrix}, uncertainty scale {config.df_uncertainty_scale:g}: {len(matrix) - 1} network calls for {horizon} tokens",
             xlabel='token of the chunk', ylabel='network calls made')

def segments_of(dataset):
    """ the segments of a prepared dataset, or those that it would be prepared with; '' for plain text """
    if os.path.exists(os.path.join(prepare.data_folder(dataset), 'meta.json')):
        return prepare.read_meta(dataset).get('segments', '')
    return getattr(prepare.load(os.path.join(prepare._DATA, dataset), 'prepare.py'), 'segments', '') if dataset in prepare.names() else ''

def plot_mask(config, axes):
    """ rows look at columns where it is dark; of two streams the noisy copy (xt) comes first, then the clean one (x0); lines between segments """
    kind, T = OBJECTIVES[objective], config.block_size
    streams = 1 + getattr(kind, 'two_streams', False)
    cut = config.diffusion_block_size if config.attention == 'block' or streams == 2 else None
    ids = block_ids(config.attention, T, cut, config.lengths)
    mask = dense_mask(ids.repeat(streams), torch.arange(streams * T) < T * (streams - 1), config.clean_causal, question=0 if config.causal_within_block else None)
    axes.imshow(mask.numpy(), cmap='Purples', interpolation='nearest', vmax=1.5)
    lengths = config.lengths or [T]
    names = [part.partition(':')[0] if ':' in part else '' for part in (config.segments or '').split(',')]
    labels = [f"{name or f'segment {i}' if config.lengths else 'text'}{stream}" for stream in ((' xt', ' x0') if streams == 2 else ('',)) for i, name in enumerate(names)]
    edges = [0, *itertools.accumulate(lengths * streams)]
    for edge in edges[1:-1]:
        axes.axhline(edge - 0.5, color='tab:orange', linewidth=0.8)
        axes.axvline(edge - 0.5, color='tab:orange', linewidth=0.8)
    for name, axis in ('x', axes.secondary_xaxis('top')), ('y', axes.secondary_yaxis('right')):
        getattr(axis, f'set_{name}ticks')([(a + b - 1) / 2 for a, b in zip(edges, edges[1:])], labels, rotation=90 if name == 'x' else 0)
        axis.tick_params(length=0)
    blocks = f", blocks of {cut}" if cut else ''
    axes.set(xlabel='Key position', ylabel='Query position')
    axes.set_title(f"{objective}, attention {config.attention}{blocks}{', causal within blocks' * config.causal_within_block}: {int(mask.sum()):,} pairs", pad=12)

PICTURES = {'mask': plot_mask, 'scheduling_matrix': plot_scheduling_matrix}

def read_settings(argv):
    """ config files (what they set for the model) and --key=value -> (GPTConfig, {'objective': ..., 'horizon': ..., 'output': ...}) """
    names = [f.name for f in fields(GPTConfig)]
    own = dict(objective=objective, dataset=dataset, skip=skip, horizon=horizon, output=output)
    defaults = {k: v for k, v in train_settings().items() if k in names} | own
    for path in (a for a in argv if not a.startswith('-')):
        defaults |= {k: v for k, v in run_config(path, defaults).items() if k in defaults}
    config = configure(dict(__file__=__file__, __doc__=__doc__) | defaults, [a for a in argv if a.startswith('-')])
    check(config['objective'] in OBJECTIVES, f"objective is {config['objective']!r}, expected one of {', '.join(OBJECTIVES)}")
    config['segments'] = config['segments'] or segments_of(config['dataset']) if config['dataset'] or config['segments'] else None
    if config['segments'] and config['skip']:
        config['segments'] = prepare.segments_text(prepare.without(prepare.read_segments(config['segments']), config['skip']))
    config['attention'] = config['attention'] or OBJECTIVES[config['objective']].usual_attention(config['segments'])
    config['diffusion_block_size'] = config['diffusion_block_size'] or None
    shape = GPTConfig(**{k: v for k, v in config.items() if k in names})
    shape.block_size = shape.block_size or sum(shape.lengths)
    return shape, {k: config[k] for k in own}

def main():
    names = [a for a in sys.argv[1:2] if not a.startswith('-')]
    if names and names[0] not in PICTURES:
        fail(f"there is no picture {names[0]!r}, expected one of {', '.join(PICTURES)}")
    try:
        config, own = read_settings(sys.argv[1 + len(names):])
        if not names:
            fail(f"name a picture: python -m tools.plot {' | '.join(PICTURES)}")
        globals().update(own)
        try:
            from matplotlib.figure import Figure # not pyplot: no display, no window
        except ImportError:
            fail("a picture needs matplotlib: pip install matplotlib")
        figure = Figure(figsize=(6, 7), layout='constrained')
        PICTURES[names[0]](config, figure.subplots())
        path = output or f'{names[0]}.png'
        figure.savefig(path, dpi=150)
        print(path)
    except (UserError, prepare.PrepareError) as e:
        fail(str(e))

if __name__ == '__main__':
    main()
