"""The definition of the encoding, the longest token at each position, in twenty lines of Python."""


class LongestMatch:
    """The definition: `tokens` maps bytes to ids."""

    def __init__(self, tokens):
        self.tokens = tokens
        self.prefixes = {token[:length] for token in tokens for length in range(1, len(token) + 1)}

    def encode(self, data):
        ids, start = [], 0
        while start < len(data):
            end = best = start + 1
            while end <= len(data) and data[start:end] in self.prefixes:
                if data[start:end] in self.tokens:
                    best = end
                end += 1
            ids.append(self.tokens[data[start:best]])
            start = best
        return ids
