"""`llava-fast make-data`: training data from captions, boxes, words and models. See docs/data.md."""
