"""Targets: captioned images to prune on. The embedded `emoji`, COCO, CC3M, a folder of one's own;
how they lie on disk, and how they are fetched (`python -m targets coco --download --data-dir D`).
May import `common`.
"""
