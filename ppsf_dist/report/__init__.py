"""``ppsf-dist report``: runs side by side, from the files that a monitor or launch/train.py has written."""
