"""The report of evaluations: what methods score, which differences are supported, and pictures of both."""
