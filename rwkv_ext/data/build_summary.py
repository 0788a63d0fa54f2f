"""Summary: what a build of shards wrote, and how it is printed."""

from dataclasses import dataclass, field

from rwkv_ext.data.sampler import magic_prime

CONTEXT_LENGTHS = (512, 1024, 2048, 4096)


@dataclass
class Summary:
    """What `build` wrote."""

    documents: int = 0
    tokens: int = 0  # with the end-of-document tokens
    end_of_documents: int = 0
    text_bytes: int = 0
    skipped: int = 0  # documents left out because they were not UTF-8
    repaired: int = 0  # documents with U+FFFD in the place of what was not UTF-8
    empty: int = 0  # documents of white space alone that were dropped
    duplicates: int = 0  # documents equal to an earlier one that were dropped
    shards: list[str] = field(default_factory=list)  # their names, without .bin and .idx
    seconds: float = 0.0  # of this run and of those that it went on from

    def lines(self) -> list[str]:
        """Return the summary as printed."""
        text_tokens = self.tokens - self.end_of_documents
        ratio = f"{self.text_bytes / text_tokens:.3f} bytes a token" if text_tokens else "no text"
        faults = {"left out": self.skipped, "repaired with U+FFFD": self.repaired}
        dropped = {"empty": self.empty, "duplicate": self.duplicates}
        speed = f", {self.text_bytes / 1e6 / self.seconds:,.1f} MB/s" if self.seconds else ""
        return [
            f"documents        {self.documents:,}",
            *(f"not UTF-8        {count:,} documents, {what}" for what, count in faults.items() if count),
            *(f"dropped          {count:,} {what} documents" for what, count in dropped.items() if count),
            f"tokens           {self.tokens:,} ({self.end_of_documents:,} of them end a document)",
            f"text             {self.text_bytes:,} bytes, {ratio}",
            f"time             {self.seconds:,.1f} s{speed}",
            *prime_lines(self.tokens),
        ]


def prime_lines(n_tokens: int) -> list[str]:
    """Return a line for each usual context length: RWKV-LM's magic_prime, or what the data lacks for one."""
    lines = []
    for ctx_len in CONTEXT_LENGTHS:
        try:
            lines.append(f"magic_prime      {magic_prime(n_tokens, ctx_len):,} for ctx_len {ctx_len}")
        except ValueError:
            lines.append(f"magic_prime      none for ctx_len {ctx_len}: that takes {3 * ctx_len:,} tokens")
    return lines
