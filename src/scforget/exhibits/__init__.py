"""Figures and tables of the theory page and of the paper's pictures, drawn from plain results."""
