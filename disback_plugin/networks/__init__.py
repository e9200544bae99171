"""One network's weights: names, layouts, shards, fingerprints."""
