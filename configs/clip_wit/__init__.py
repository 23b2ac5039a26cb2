"""CLIP's nine models by its own recipe."""
