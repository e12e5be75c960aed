"""A look at the training pictures before anything is trained: `python -m dojo.look`.

A page with every picture as training will cut it, its captions below, and what may be wrong with
the data: pictures that are there twice, or nearly so, broken files, captions that are missing or
longer than CLIP reads, pictures that have to be blown up.
"""
