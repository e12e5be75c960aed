"""What of a model is trained, adapters or every weight, and how it is saved."""
