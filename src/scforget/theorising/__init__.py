"""The stages of the theory pipeline: why methods that move parameters fail, measured on models of one's own data."""
