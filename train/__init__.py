"""Pretraining of Eagle and Finch: read pretrain.py first, it runs from top to bottom."""
