"""Why an item has its logit: what that is made of, which lines moved it, and the prompt."""

from dataclasses import dataclass

from ccf_llm_hf.modeling.processing_ccf_llm import CCFLLMProcessor, Request
from ccf_llm_hf.modeling.ranking_ccf_llm import Reasons


@dataclass
class Explanation(Reasons):
    """The [`Reasons`] of one prediction, `probability = sigmoid(logit / temperature)`, and the
    prompt that it was read from. `cf_logit` is the CF model's own view of the pair, None where the
    model has no CF vectors."""

    prompt: str
    user: str | None
    user_known: bool
    item_id: str | None
    title: str
    known: bool
    cf_logit: float | None
    probability: float
    temperature: float = 1.0

    def as_text(self) -> str:
        """The explanation for a terminal."""
        user = self.user if self.user is not None else "(none given)"
        scale = "" if self.temperature == 1 else f"   temperature {self.temperature:.3g}"
        alone, outside = "", ""
        if self.cf_logit is not None:
            alone, outside = f"   CF model alone {self.cf_logit:+.3f}", "   not in the CF model"
        parts = [
            (self.start, "any title that nobody has rated, for this user"),
            (self.words, "the words of this one"),
            (self.behavior, "the behavior of users, in its slot"),
            (self.cf, "the CF model's logit"),
        ]
        lines = [
            f"probability {self.probability:.3f}   logit {self.logit:+.3f}{scale}{alone}",
            f"item        {self.title}{'' if self.known else outside}",
            f"user        {user}{'' if self.user_known else outside}",
            "",
            "The logit is the sum of",
            *(f"{value:+.3f}  {name}" for value, name in parts if value),
            "",
            f"The history added {self.history:+.3f}; of it, what would be missing without",
            *(
                f"{line.effect:+.3f}  {'liked   ' if line.liked else 'disliked'}  {line.title}"
                for line in self.lines
            ),
            *(
                f"{topic.effect:+.3f}  {topic.lines} lines of {topic.field} {topic.value!r}"
                for topic in self.topics
            ),
        ]
        return "\n".join([*lines, "", "Prompt", self.prompt])


def render_prompt(processor: CCFLLMProcessor, request: Request) -> str:
    """The hybrid prompt of one candidate; slots read `[item: title]`, `[user: id]`."""
    request = processor.cut(request)
    batch = processor.pack([request])
    titles = list(processor.item_titles)
    evidence = [line for lines in request.evidence or [] for line in lines]
    read = map(processor.item_text, [*request.history, *evidence, *request.candidates])
    # Slots of new titles count on past the catalog, in order of first mention.
    titles += dict.fromkeys(text for row, text in read if row is None)
    pieces: list[str] = []
    words: list[int] = []
    columns = (batch[name][0].tolist() for name in ("input_ids", "item_slots", "user_slots"))
    for token, item, user in zip(*columns, strict=True):
        if item < 0 and user < 0:
            words.append(token)
            continue
        name = f"item: {titles[item]}" if item >= 0 else f"user: {request.user or 'new'}"
        pieces += [processor.tokenizer.decode(words), f"[{name}]"]
        words = []
    return "".join([*pieces, processor.tokenizer.decode(words)])
