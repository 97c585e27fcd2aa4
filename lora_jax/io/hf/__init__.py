"""Whole Hugging Face checkpoints on disk, tensor by tensor: no model class, and never the whole model in memory.

```
tensors.py   safetensors files as named ranges of bytes, read and written in pieces
folder.py    a checkpoint directory: its shards, its config, its other files
changes.py   what an adapter does to one tensor
plan.py      what adapters do to a checkpoint: names, tied tables, weights
ties.py      tables that are look-up and output head at once
merge.py     merge_checkpoint
extract.py   extract_checkpoint
```
"""
