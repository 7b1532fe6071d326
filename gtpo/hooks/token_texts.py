"""The text of each token, so that the texts of a completion put together are the completion."""


class TokenTexts:
    """`texts(ids)`: one text per id, special tokens included; a character of several tokens stands
    with the last of them.
    """

    def __init__(self, tokenizer):
        self._tokenizer = tokenizer
        self._alone: dict[int, str] = {}  # each id is decoded once

    def __call__(self, ids: list[int]) -> list[str]:
        for token in set(ids) - self._alone.keys():
            self._alone[token] = self._decode([token])
        texts = [self._alone[token] for token in ids]
        # A token alone may read otherwise than among others: a part of a character, or a space that
        # SentencePiece drops.
        return texts if "".join(texts) == self._decode(ids) else self._one_after_another(ids)

    def _one_after_another(self, ids: list[int]) -> list[str]:
        # tokens before `done` have their text; the window begins a little earlier
        texts, start, done = [], 0, 0
        for end in range(1, len(ids) + 1):
            known, longer = self._decode(ids[start:done]), self._decode(ids[start:end])
            unfinished = longer.endswith("\N{REPLACEMENT CHARACTER}") and end < len(ids)
            texts.append("" if unfinished else longer[len(known) :])
            if not unfinished:
                start, done = done, end
        return texts

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(
            ids, skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
