"""What a prediction is made of: the prompt as the model reads it, and shares of text and CF."""

from dataclasses import dataclass

from ccf_llm_hf.modeling.processing_ccf_llm import CCFLLMProcessor, Request
from ccf_llm_hf.modeling.ranking_ccf_llm import ItemShare


@dataclass
class Explanation:
    """One prediction: `probability = sigmoid(logit / temperature)`. `cf_logit` is the CF model's
    own view of the pair, not a part of `logit`."""

    prompt: str
    user: str | None
    user_known: bool
    item: ItemShare
    history: list[ItemShare]
    cf_logit: float
    logit: float
    probability: float
    temperature: float = 1.0

    def as_text(self) -> str:
        """The explanation for a terminal."""
        user = self.user if self.user is not None else "(none given)"
        scale = "" if self.temperature == 1 else f"temperature {self.temperature:.3g}   "
        lines = [
            f"probability {self.probability:.3f}   logit {self.logit:+.3f}   {scale}"
            f"CF model alone {self.cf_logit:+.3f}",
            f"user        {user}{'' if self.user_known else '   not in the CF model'}",
            "",
            "text   CF    item",
        ]
        for share, role in [(self.item, "candidate"), *((past, "") for past in self.history)]:
            notes = [role] * bool(role) + ["not in the CF model"] * (not share.known)
            note = f"   ({', '.join(notes)})" if notes else ""
            lines.append(f"{share.text_share:4.0%}  {share.cf_share:4.0%}   {share.title}{note}")
        return "\n".join([*lines, "", "prompt", self.prompt])


def render_prompt(processor: CCFLLMProcessor, request: Request) -> str:
    """The hybrid prompt of one candidate; slots read `[item: title]`, `[user: id]`."""
    request = processor.cut(request)
    batch = processor.pack([request])
    titles = list(processor.item_titles)
    read = [processor.item_text(item) for item in [*request.history, *request.candidates]]
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
