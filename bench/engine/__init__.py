"""What training, the Fisher information, private steps and ensembles cost, against plain torch, scvi-tools and Opacus.

`python -m bench.engine --help` tells how to run it.
"""
