"""The families of models: what is known of each, loaded and asked, behind one contract."""
