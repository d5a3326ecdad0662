"""A toy checkpoint for the Space: a random tiny language model over sixty well-known titles.

python tests/hub/space_checkpoint.py FOLDER
"""

import sys
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

from ccf_llm_hf import CCFLLMForCTR, CCFLLMProcessor
from ccf_llm_hf.cf.vectors import CFVectors

TITLES = (
    """
2001: A Space Odyssey (1968)|Airplane! (1980)|Alien (1979)|Amadeus (1984)|Amélie (2001)
Apocalypse Now (1979)|Back to the Future (1985)|Beauty and the Beast (1991)|Blade Runner (1982)
Casablanca (1942)|Chinatown (1974)|Citizen Kane (1941)|Dead Poets Society (1989)|Die Hard (1988)
E.T. the Extra-Terrestrial (1982)|Fargo (1996)|Fight Club (1999)|Finding Nemo (2003)
Forrest Gump (1994)|Ghostbusters (1984)|Gladiator (2000)|Goodfellas (1990)|Groundhog Day (1993)
Heat (1995)|Jaws (1975)|Jurassic Park (1993)|L.A. Confidential (1997)|Lawrence of Arabia (1962)
Léon (1994)|Mary Poppins (1964)|Memento (2000)|Metropolis (1927)|Modern Times (1936)
My Neighbor Totoro (1988)|North by Northwest (1959)|Notting Hill (1999)|Psycho (1960)
Pulp Fiction (1994)|Raiders of the Lost Ark (1981)|Rear Window (1954)|Seven Samurai (1954)
Singin' in the Rain (1952)|Some Like It Hot (1959)|Spirited Away (2001)|Star Wars (1977)
Taxi Driver (1976)|Terminator 2: Judgment Day (1991)|The Apartment (1960)|The Big Lebowski (1998)
The Godfather (1972)|The Lion King (1994)|The Matrix (1999)|The Princess Bride (1987)
The Shining (1980)|The Silence of the Lambs (1991)|The Sting (1973)|The Third Man (1949)
Titanic (1997)|Toy Story (1995)|Vertigo (1958)
""".strip()
    .replace("\n", "|")
    .split("|")
)
UNRATED = ("Metropolis (1927)", "My Neighbor Totoro (1988)")
DIM = 8


def titles_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level tokenizer learned from the titles."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=900,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([*TITLES, "Answer Yes or No. Liked: Yes No Yes No"] * 9, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|endoftext|>", pad_token="<|endoftext|>"
    )


def titles_table() -> CFVectors:
    """Random vectors whose last dimension is item bias; the titles of `UNRATED` are unknown."""
    generator = torch.Generator().manual_seed(4)
    items = torch.randn(1, len(TITLES), DIM, generator=generator)
    new_user = torch.zeros(1, DIM)
    new_user[:, -1] = 1.0
    return CFVectors(
        user_ids=["1"],
        item_ids=[f"t{row}" for row in range(len(TITLES))],
        item_titles=list(TITLES),
        user_vectors=torch.randn(1, 1, DIM, generator=generator),
        item_vectors=items,
        user_known=torch.ones(1, 1, dtype=torch.bool),
        item_known=torch.tensor([[title not in UNRATED for title in TITLES]]),
        default_user=new_user,
        default_item=torch.zeros(1, DIM),
        offset=torch.zeros(1),
        snapshot_times=torch.tensor([0]),
        model_name="mf",
    )


def build_space_checkpoint(folder: Path, *, text_only: bool = False) -> Path:
    """Save a full checkpoint whose gate has been stirred, so that there is something to see."""
    tokenizer = titles_tokenizer()
    torch.manual_seed(7)
    backbone = AutoModelForCausalLM.from_config(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=96,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=512,
        )
    )
    backbone.save_pretrained(folder / "backbone")
    table = None if text_only else titles_table()
    form = "title" if text_only else "slot"
    processor = CCFLLMProcessor(
        tokenizer,
        [f"t{row}" for row in range(len(TITLES))],
        list(TITLES),
        [] if table is None else table.user_ids,
        history_format=form,
        candidate_format=form,
        history_window=(20, 16),
    )
    model = CCFLLMForCTR.from_backbone(
        str(folder / "backbone"),
        processor,
        backbone_name="toy",
        cf=table,
    )
    _stir(model)
    checkpoint = folder / "checkpoint"
    model.save_pretrained(checkpoint, form="full")
    processor.save_pretrained(checkpoint)
    return checkpoint


@torch.no_grad()
def _stir(model: CCFLLMForCTR) -> None:
    for _, weight in model.model.gate.named_parameters():
        weight.normal_(std=0.09)
        weight.add_(0.1 * torch.randn(weight.shape[-1]) * (weight.ndim == 2))
    model.answer_weight.normal_(std=0.5)
    model.answer_scale.fill_(0.12)


if __name__ == "__main__":
    print(build_space_checkpoint(Path(sys.argv[1])))
