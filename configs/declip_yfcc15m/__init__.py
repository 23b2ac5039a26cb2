"""The benchmark of DeCLIP's authors on YFCC15M."""
