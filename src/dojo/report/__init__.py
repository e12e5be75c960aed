"""What became of a run, on one page: `report.html`, made from the files in its folder alone.

The page needs nothing else: the pictures are in it, the curves are SVG, there is no script in it.

    python -m dojo.report outputs/quickstart
"""

from dojo.report.page import write

__all__ = ["write"]
