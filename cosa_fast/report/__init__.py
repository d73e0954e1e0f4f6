"""One self-contained page of a run, or of several side by side.

reading: what a run's folder holds, as data
drawing: matplotlib's figures as SVG, in one look
curves: figures of what changes with the iterations
distributions: figures of one evaluation: confidences, thresholds, perplexity, classes, confusions
page: figures, tables and galleries in one HTML file, after page.html
card: the model card of an exported network, after card.md
__main__: the door, python -m cosa_fast.report RUN [RUN ...]
"""
