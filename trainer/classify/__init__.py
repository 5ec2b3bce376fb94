"""Training of an encoder's interventions together with a head."""
