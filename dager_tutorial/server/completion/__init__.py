"""What the rest of the gradient says once texts are known: labels, counts, last tokens, proof (chapter `09_completion`)."""
