"""SigLIP and the contrastive stage of SigLIP 2; see `recipe`."""
