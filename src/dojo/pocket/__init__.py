"""The pocket world: scenes, their verifier, and the small models trained on them."""
