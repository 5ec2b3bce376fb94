"""Training of the interventions on an encoder-decoder's encoder."""
