"""The ablation on CC3M and the comparison on YFCC15M of DeCLIP's paper."""
