"""Finding titles as visitors type them: words in any order, their beginnings, one typing error."""

import re
import unicodedata
from bisect import bisect_left
from collections.abc import Sequence

from rapidfuzz import process
from rapidfuzz.distance import OSA

YEAR = re.compile(r" \(\d{4}\)$")
SHORTEST_MISTYPED = 4  # letters: shorter words are near too many others


def plain(text: str) -> str:
    """A title as it is compared: letters without case and accents, and digits."""
    letters = unicodedata.normalize("NFKD", text.casefold())
    kept = "".join(letter for letter in letters if not unicodedata.combining(letter))
    return " ".join(re.findall(r"\w+", kept.replace("'", "").replace("\u2019", "")))


class TitleSearch:
    """Titles by the words in them.

    Args:
        titles: best known first, which is the order of what is found.
        names: of each the shorter name that may stand for it, such as without the author.
    """

    def __init__(self, titles: Sequence[str], names: Sequence[str]) -> None:
        self.titles = titles
        self._exact: dict[str, int] = {}
        places: dict[str, list[int]] = {}
        for place, title in enumerate(titles):
            words = plain(title)
            self._exact.setdefault(words, place)
            for word in dict.fromkeys(words.split()):
                places.setdefault(word, []).append(place)
        for place, name in enumerate(names):
            for short in (name, YEAR.sub("", name)):
                self._exact.setdefault(plain(short), place)
        self._places = places
        self._words = sorted(places)

    def same(self, text: str) -> str | None:
        """The title that a text spells, but for case, accents and punctuation; of a name that
        several have, the best known."""
        place = self._exact.get(plain(text))
        return None if place is None else self.titles[place]

    def find(self, text: str, limit: int = 8) -> list[str]:
        """Titles that hold every word of a text, or a word that begins so; first one of just these
        words. Where there is none, a word may differ by one letter, or two that changed places."""
        words = plain(text).split()
        if not words:
            return []
        starting = [self._starting(word) for word in words]
        found = self._holding(starting)
        if not found:
            found = self._holding(
                [
                    known | self._starting_with_any(self._near(word))
                    for word, known in zip(words, starting, strict=True)
                ]
            )
        first = self._exact.get(" ".join(words))
        order = sorted(found, key=lambda place: (place != first, place))
        return [self.titles[place] for place in order[:limit]]

    def _starting(self, beginning: str) -> set[int]:
        found: set[int] = set()
        for word in self._words[bisect_left(self._words, beginning) :]:
            if not word.startswith(beginning):
                break
            found.update(self._places[word])
        return found

    def _starting_with_any(self, words: Sequence[str]) -> set[int]:
        return set().union(*(self._places[word] for word in words))

    def _near(self, word: str) -> list[str]:
        if len(word) < SHORTEST_MISTYPED:
            return []
        hits = process.extract(
            word, self._words, scorer=OSA.distance, processor=None, score_cutoff=1, limit=None
        )
        return [hit[0] for hit in hits]

    @staticmethod
    def _holding(places: Sequence[set[int]]) -> set[int]:
        return set.intersection(*places)
