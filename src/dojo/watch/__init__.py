"""A page to watch runs by: curves, pictures, phases and logs while they come, and three buttons.

    python -m dojo.watch outputs/

It reads what runs write into their folders and touches nothing but `stop`, `save` and `sample`
there, so it may be started and ended at any time, on any machine that sees the folder.
"""
