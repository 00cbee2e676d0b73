"""Videos: download, analyse, judge, cut and caption them, as plain functions and small classes, each usable alone in a notebook."""
