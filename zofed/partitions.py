from collections import Counter


def counts(documents):
    return dict(Counter(d.source for d in documents))
