"""DeCLIP's paper: its ablation on CC3M and its comparison on YFCC15M."""
