"""A directory of segments and bundles: written once, spliced into downloads, pruned by plan."""
