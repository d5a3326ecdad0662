"""The dataset card (README.md) of a prepared folder."""

import re
from collections.abc import Mapping
from typing import Any

import jinja2
import yaml

from ccf_llm_hf.data.prepared import INTERACTIONS_FILE, ITEMS_FILE, split_file
from ccf_llm_hf.data.protocol import SPLITS

# A constant and not a file beside the package: the installed package must find it.
TEMPLATE = """\
---
{{ metadata }}---

# {{ protocol.name }}, prepared for CTR prediction

Rows for click-through-rate prediction: will this user like this item, given what they liked before?
Built by `ccf-llm prepare` (package `ccf-llm-hf`).

- **Source:** {{ protocol.source }}
- **License:** {{ protocol.license }}
- **Label:** {{ protocol.label_rule }}
- **Splits:** {{ protocol.split_rule }}
- **History:** {{ protocol.history_rule }}
{%- if protocol.row_rule %}
- **Rows:** {{ protocol.row_rule }}
{%- endif %}
{%- if protocol.item_rule %}
- **Items:** {{ protocol.item_rule }}
{%- endif %}
{% if permission %}
> **Do not pass this on.** Whoever uploaded it stated to have the permission that the license of the
> ratings asks for. It does not extend to you: anyone can build the same data with
> `ccf-llm prepare`.
{% elif not protocol.redistributable %}
> **Do not upload this folder.** The license of the ratings does not allow redistribution; anyone
> can build the same folder with `ccf-llm prepare`.
{% endif %}
## Limits

- A label says that a user liked an item that they had chosen to rate. It is no click and no sale.
- Items that many rate are over-represented, and so is the taste of those who rate much.
- Ids of users are those of the source, and what they rated may tell who they are.

| split | rows | users | items | positive rate | rows of users unseen in train | of items unseen |
| --- | ---: | ---: | ---: | ---: | ---: | ---: |
{% for name, s in protocol.splits.items() -%}
| {{ name }} | {{ "{:,}".format(s.rows) }} | {{ "{:,}".format(s.users) }} | {{
 "{:,}".format(s["items"]) }} | {{ "%.4f" % s.positive_rate }} | {{
 "%.1f" % (100 * s.unseen_user_rate) }} % | {{
 "%.1f" % (100 * s.unseen_item_rate) }} % |
{% endfor %}
## Use

```bash
pip install "datasets>=4"
```

```python
from datasets import load_dataset

path = "{{ repo_id or "path/to/this/folder" }}"
rows = load_dataset(path)                      # train, validation, test
items = load_dataset(path, "items")["train"]   # the catalog
log = load_dataset(path, "interactions")["train"]
print({name: len(part) for name, part in rows.items()}, len(items), len(log))
```

```text
{ {%- for name, s in protocol.splits.items() -%}
'{{ name }}': {{ s.rows }}{{ ", " if not loop.last }}{%- endfor -%}
} {{ protocol.catalog_items }} {{ protocol.accepted_rows }}
```

## Columns

- Default config: `user_id`, `item_id` (strings), `label` (0/1), `timestamp` ({{
 protocol.timestamp_rule or "Unix seconds" }}),
  `history` (item ids, see above), `split_position` (position of the row among
  its user's rows of the split, from 0), `not_cold` (user and item both occur in train).
- `items`: `item_id`, `title`{% for c in protocol.item_columns %}, `{{ c }}`{% endfor %}; \
{{ "{:,}".format(protocol.catalog_items) }} items.{% if protocol.item_fields %} \
Fields that describe an item: {% for c in protocol.item_fields %}`{{ c }}`{{
 ", " if not loop.last }}{% endfor %}.{% endif %}
- `interactions`: every accepted interaction in order of `timestamp`, with `rating` (null if the
  data has labels only), `label` and `split` ("" if in none);
  {{ "{:,}".format(protocol.accepted_rows) }} rows.

## Rejected rows
{% for reason, entry in protocol.rejected.items() %}
- `{{ reason }}`: {{ entry.count }}. {{ entry.policy[0]|upper }}{{ entry.policy[1:] }}.\
 Places: {{ entry.examples|join(", ") }}.
{%- else %}
None.
{%- endfor %}
{% if protocol.citation %}
## Citation

{{ protocol.citation }}
{% endif %}"""


def render_dataset_card(
    protocol: dict,
    *,
    repo_id: str = "",
    dataset_info: Any = None,
    permission: bool = False,
) -> str:
    """The card's text, with the YAML `configs` that make `load_dataset(folder)` work.

    Args:
        protocol: protocol.json of the folder.
        repo_id: Hub repository that the usage code loads; default a placeholder for the folder.
        dataset_info: features and splits of every config, as the Hub's metadata holds them.
        permission: the uploader states to be allowed to share data whose license forbids it.
    """
    configs = [
        {
            "config_name": "default",
            "data_files": [{"split": name, "path": split_file(name)} for name in SPLITS],
            "default": True,
        },
        {"config_name": "items", "data_files": ITEMS_FILE},
        {"config_name": "interactions", "data_files": INTERACTIONS_FILE},
    ]
    metadata = {
        "pretty_name": f"{protocol['name']} for CTR prediction",
        "task_categories": ["tabular-classification", "text-classification"],
        "tags": ["recommendation", "ctr-prediction", "ccf-llm"],
        "language": protocol.get("language"),
        **_license_fields(protocol),
        "size_categories": [_size_category(sum(s["rows"] for s in protocol["splits"].values()))],
        "configs": configs,
        "dataset_info": dataset_info,
    }
    known = {key: value for key, value in metadata.items() if value is not None}
    environment = jinja2.Environment(trim_blocks=False, keep_trailing_newline=True)
    return environment.from_string(TEMPLATE).render(
        protocol=protocol,
        repo_id=repo_id,
        permission=permission,
        metadata=yaml.safe_dump(known, sort_keys=False),
    )


def _license_fields(protocol: Mapping[str, Any]) -> dict[str, str]:
    """The license as the Hub lists it: an id such as cc-by-4.0, or `other`; none if unknown."""
    if protocol["redistributable"]:
        named = re.fullmatch(r"[a-z0-9]+(?:[.-][a-z0-9]+)*", protocol["license"])
        return {"license": protocol["license"]} if named else {}
    link = re.search(r"https://[^\s)]+", protocol["license"])
    name = re.sub(r"[^a-z0-9.-]+", "-", f"{protocol['name']}-terms".lower())
    return {"license": "other", "license_name": name} | ({"license_link": link[0]} if link else {})


def _size_category(rows: int) -> str:
    """The Hub's class of sizes: n<1K, 1K<n<10K, up to 100M<n<1B."""
    steps = ["1K", "10K", "100K", "1M", "10M", "100M", "1B"]
    place = next((place for place in range(len(steps)) if rows < 10 ** (place + 3)), 6)
    return f"n<{steps[0]}" if place == 0 else f"{steps[place - 1]}<n<{steps[place]}"
