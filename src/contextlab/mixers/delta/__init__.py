"""The delta rule: each token corrects what the matrix answers to its key."""
