"""Tasks that fairseq registers by name."""
