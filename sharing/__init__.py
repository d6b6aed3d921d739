"""What a finished run becomes: a folder that diffusers loads without this repository, and a page to
try it on. May import everything; nothing imports it.

`pipeline.py`, `prompt_router.py` and `pruned_unet.py` are copied into that folder, so each of them
imports nothing of this repository, and no other of them.
"""
