"""The command line: what `timm-cascade` and `python -m timm_cascade` run."""
