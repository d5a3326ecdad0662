"""What the service is asked and what it answers, as pydantic models.

What can be asked depends on the checkpoint: the fields that items have, whether histories hold
dislikes or ratings, whether a list can be varied. The models of a request are therefore made for a
processor, so that the schema promises what the model takes.
"""

import json
import math
from collections.abc import Hashable, Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    PlainValidator,
    Tag,
    WithJsonSchema,
    create_model,
)
from pydantic_core import PydanticCustomError
from typing_extensions import TypedDict

from ccf_llm_hf.inference.explanation import Explanation
from ccf_llm_hf.inference.ranker import CTRRanker
from ccf_llm_hf.modeling.processing_ccf_llm import CCFLLMProcessor
from ccf_llm_hf.modeling.prompt_ccf_llm import PIECE
from ccf_llm_hf.modeling.ranking_ccf_llm import RankedItem

MAX_ITEMS = 1000  # of a history, of candidates, of pairs
MAX_TEXT = 500  # characters
MAX_VALUES = 50  # of an item's field
MAX_SHOWN = 80  # characters of what was refused
LARGEST = 2**53 - 1  # of numbers that every JSON reader takes for what they are
TAGS = ("<text>", "<number>", "<object>")  # of the kinds of ids and items
# A character that is no space and no control, written out since engines differ about \S.
NOT_BLANK = r"[^\u0000-\u0020\u007f-\u00a0\u1680\u2000-\u200f\u2028\u2029\u202f\u205f\u3000\ufeff]"
ADVICE = {  # by pydantic's types of errors, where its own words would not do
    "list_type": "give a list",
    "model_attributes_type": "give an object",
    "model_type": "give an object",
    "string_pattern_mismatch": "give text that is not blank",
    "string_too_long": "give at most {max_length} characters",
    "too_long": "give at most {max_length}",
    "too_short": "give at least {min_length}",
}


def _refuse(advice: str) -> PydanticCustomError:
    return PydanticCustomError("advice", advice)


def _whole(value: Any) -> Any:
    """12.0 is 12, as in JSON Schema, and as ids are read everywhere; True is no number."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int):
        raise _refuse("give a whole number")
    return value


def _field_value(value: Any) -> Any:
    values = value if isinstance(value, list) else [value]
    if len(values) > MAX_VALUES:
        raise _refuse(f"give at most {MAX_VALUES} values")
    for one in values:
        if isinstance(one, str) and len(one) <= MAX_TEXT:
            continue
        if isinstance(one, bool) or not isinstance(one, int | float) or not math.isfinite(one):
            raise _refuse(f"give text of at most {MAX_TEXT} characters, a number, or a list")
    return value


def _kind(value: Any) -> str | None:
    """The tag of an id or an item."""
    text, number, thing = TAGS
    return {str: text, int: number, float: number, dict: thing}.get(type(value))


def _one_of(advice: str) -> Discriminator:
    return Discriminator(_kind, custom_error_type="advice", custom_error_message=advice)


def _check_liked(value: Any) -> Any:
    if value is not True:
        raise _refuse("this model reads likes only, leave the item out")
    return value


Text = Annotated[str, Field(max_length=MAX_TEXT)]
FullText = Annotated[str, Field(max_length=MAX_TEXT, pattern=NOT_BLANK)]
Number = Annotated[int, Field(ge=-LARGEST, le=LARGEST), BeforeValidator(_whole), Tag("<number>")]
ItemId = Annotated[Annotated[FullText, Tag("<text>")] | Number, _one_of("give text or an integer")]
UserId = Annotated[Annotated[Text, Tag("<text>")] | Number, _one_of("give text or an integer")]
Count = Annotated[int, Field(ge=1, le=MAX_ITEMS), BeforeValidator(_whole)]
CountFrom0 = Annotated[int, Field(ge=0, le=MAX_ITEMS), BeforeValidator(_whole)]
Rating = Annotated[float, Field(strict=True, allow_inf_nan=False)]
Liked = Annotated[bool, Field(strict=True)]
OnlyLiked = Annotated[Any, PlainValidator(_check_liked), WithJsonSchema({"const": True})]
_VALUE = [{"type": "string", "maxLength": MAX_TEXT}, {"type": "number"}]
FieldValue = Annotated[
    Any,
    PlainValidator(_field_value),
    WithJsonSchema(
        {"anyOf": [*_VALUE, {"type": "array", "items": {"anyOf": _VALUE}, "maxItems": MAX_VALUES}]}
    ),
]


class Ranking(BaseModel):
    """The best candidates, best first."""

    model_config = ConfigDict(
        json_schema_extra={
            "example": {
                "items": [
                    {
                        "item_id": "7",
                        "title": "The Green Mile",
                        "probability": 0.71,
                        "logit": 0.9,
                        "text_share": 0.4,
                        "cf_share": 0.6,
                        "known": True,
                    }
                ],
                "unknown_users": [],
            }
        }
    )
    items: list[RankedItem]
    unknown_users: list[str] = Field(description="The user, where the model does not know it.")


class Prediction(BaseModel):
    """The probability of each pair, in their order."""

    model_config = ConfigDict(
        json_schema_extra={
            "example": {"probabilities": [0.71], "unknown_users": ["42"], "unknown_items": []}
        }
    )
    probabilities: list[float]
    unknown_users: list[str] = Field(description="Those that the model does not know.")
    unknown_items: list[Any] = Field(description="Items outside the catalog, as they were given.")


class Health(BaseModel):
    """That the service takes requests."""

    status: Literal["ok"]
    version: str = Field(examples=["0.2.0"])


class Problem(BaseModel):
    """Why there is no answer."""

    detail: str = Field(examples=["top_k is 0: it should be greater than or equal to 1"])


class Body(BaseModel):
    """A request. Bodies of equal keys can be answered together; one without a key is alone."""

    model_config = ConfigDict(extra="forbid")

    @property
    def key(self) -> Hashable:
        """See `Batcher`."""
        return None

    @classmethod
    def answer(cls, ranker: CTRRanker, bodies: Sequence[Any]) -> list[Any]:
        """The answers to bodies of one key, in one call of the model."""
        raise NotImplementedError


class RankBody(Body):
    """Rank candidates, or items of the catalog, for one user."""

    user: UserId | None = None
    history: list[Any] = []
    candidates: list[Any] | None = None
    top_k: Count = 10
    preselect: Count = 100

    @property
    def key(self) -> Hashable:
        return ("rank", *self._options().items())

    def _options(self) -> dict[str, Any]:
        return self.model_dump(exclude={"user", "history", "candidates"})

    @classmethod
    def answer(cls, ranker: CTRRanker, bodies: Sequence["RankBody"]) -> list[Ranking]:
        candidates: Any = [body.candidates for body in bodies]
        ranked = ranker.rank_many(
            [body.user for body in bodies],
            [body.history for body in bodies],
            candidates,
            **bodies[0]._options(),
        )
        return [
            Ranking(items=items, unknown_users=ranker.unknown([body.user], [])[0])
            for body, items in zip(bodies, ranked, strict=True)
        ]


class Pair(BaseModel):
    """A user, by id or by history, and an item."""

    model_config = ConfigDict(extra="forbid")
    user: UserId | None = None
    history: list[Any] = []
    item: Any


class PredictBody(Body):
    """The probability that the user likes the item, for each pair."""

    pairs: list[Any]

    @property
    def key(self) -> Hashable:
        return "predict"

    @classmethod
    def answer(cls, ranker: CTRRanker, bodies: Sequence["PredictBody"]) -> list[Prediction]:
        pairs = [[dict(pair) for pair in body.pairs] for body in bodies]
        probabilities = iter(ranker.predict([one for some in pairs for one in some]).tolist())
        answers = []
        for some in pairs:
            unknown = ranker.unknown([one["user"] for one in some], [one["item"] for one in some])
            answers.append(
                Prediction(
                    probabilities=[next(probabilities) for _ in some],
                    unknown_users=unknown[0],
                    unknown_items=unknown[1],
                )
            )
        return answers


class ExplainBody(Body):
    """Why an item has its probability: what that is made of, and which lines moved it."""

    user: UserId | None = None
    history: list[Any] = []
    item: Any
    max_lines: CountFrom0 = 16

    @classmethod
    def answer(cls, ranker: CTRRanker, bodies: Sequence["ExplainBody"]) -> list[Explanation]:
        return [
            ranker.explain(body.user, body.history, item=body.item, max_lines=body.max_lines)
            for body in bodies
        ]


def make_bodies(processor: CCFLLMProcessor) -> tuple[type[Body], type[Body], type[Body]]:
    """Models of the bodies of `/rank`, `/predict` and `/explain`, of what this processor reads."""
    fields = dict.fromkeys(item_fields(processor), FieldValue)
    marks: dict[str, Any] = {"liked": Liked if processor.histories == "signed" else OnlyLiked}
    if processor.rating_scale is not None:
        marks["rating"] = Rating
    item = _item("Item", fields)
    history: Any = (_list_of(_item("HistoryItem", fields | marks)), [])
    candidates: Any = (_list_of(item, 1) | None, None)
    varied: Any = {"max_per_topic": (Count | None, None)} if processor.evidence_fields else {}
    pair = create_model("Pair", __base__=Pair, history=history, item=(item, ...))
    rank = {"history": history, "candidates": candidates, **varied}
    explain = {"history": history, "item": (item, ...)}
    return (
        create_model("RankBody", __base__=RankBody, __doc__=RankBody.__doc__, **rank),
        create_model(
            "PredictBody",
            __base__=PredictBody,
            __doc__=PredictBody.__doc__,
            pairs=(_list_of(pair, 1), ...),
        ),
        create_model("ExplainBody", __base__=ExplainBody, __doc__=ExplainBody.__doc__, **explain),
    )


def item_fields(processor: CCFLLMProcessor) -> list[str]:
    """Names of what items have besides id and title: in the catalog, the prompt or the CF table."""
    names = {name for fields in processor.item_fields for name in fields}
    names |= {name for _, name in PIECE.findall(processor.item_template)}
    return sorted(names.union(processor.cf_fields) - {"id", "title", "liked", "rating"})


def _item(name: str, fields: Mapping[str, Any]) -> Any:
    """An id, a title, or an object with either."""
    make: Any = TypedDict  # a type checker wants the fields written out
    item = make(name, {"id": ItemId, "title": FullText, **fields}, total=False)
    item.__pydantic_config__ = ConfigDict(
        extra="forbid",
        json_schema_extra={"anyOf": [{"required": ["id"]}, {"required": ["title"]}]},
    )
    return Annotated[
        Annotated[FullText, Tag("<text>")]
        | Number
        | Annotated[item, AfterValidator(_check_named), Tag("<object>")],
        _one_of("give an id, a title, or an object with either"),
    ]


def _check_named(item: dict[str, Any]) -> dict[str, Any]:
    if "id" not in item and "title" not in item:
        raise _refuse("give an id, a title, or an object with either")
    return item


def _list_of(kind: Any, least: int = 0) -> Any:
    return Annotated[list[kind], Field(min_length=least, max_length=MAX_ITEMS)]


def make_examples(processor: CCFLLMProcessor) -> tuple[dict[str, Any], ...]:
    """Bodies of `/rank`, `/predict` and `/explain` by name, of items of this catalog and one that
    is new to it."""
    titles = [title for title in processor.item_titles if title.strip()][:3] or ["Carrie", "It"]
    user = next(iter(processor.user_ids), None)
    new = {"title": "A new title"}
    for name in processor.cf_fields:
        new[name] = next(value for field, value in processor.field_values if field == name)
    liked, other = titles[:2], titles[-1]
    both = {"user": user, "history": liked}
    return (
        {
            "candidates": {"history": liked, "candidates": [other, new], "top_k": 2},
            "catalog": {"user": user, "history": liked[:1], "top_k": 3},
        },
        {"pairs": {"pairs": [both | {"item": other}, {"history": liked, "item": new}]}},
        {"item": both | {"item": other}},
    )


def write_sentence(errors: Sequence[Mapping[str, Any]]) -> str:
    """What is wrong with a body, in one sentence: pydantic's first error."""
    error = errors[0]
    place = ""
    for part in error["loc"][1:]:  # the first says that it is the body
        if isinstance(part, int):
            place += f"[{part}]"
        elif part not in TAGS:
            place += f".{part}" if place else part
    kind, context = error["type"], error.get("ctx", {})
    if kind == "json_invalid":
        return f"the body is no JSON: {context['error']}"
    if kind == "missing":
        return f"{place or 'the body'} is missing: give it"
    if kind == "extra_forbidden":
        return f"{_shorten(place)} is nothing that this model reads: leave it out"
    if not place:
        return "the body is no object: send one as application/json"
    advice = error["msg"].replace("Input", "it")
    if kind in ADVICE:
        advice = ADVICE[kind].format(**context)
    return f"{place} is {_shorten(json.dumps(error['input']))}: {advice}"


def _shorten(text: str) -> str:
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}..."
