"""Makes the backbone that comes with Graft, `graft_small`, from images that follow from formulas and a seed alone."""
