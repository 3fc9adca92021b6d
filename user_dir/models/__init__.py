"""Models that fairseq registers by name."""
