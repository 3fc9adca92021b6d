"""Building blocks that know nothing of models or objectives."""
