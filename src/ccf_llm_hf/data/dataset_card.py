"""The dataset card (README.md) of a prepared folder."""

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
{% if not protocol.redistributable %}
> **Do not upload this folder.** The license of the ratings does not allow redistribution; anyone
> can build the same folder with `ccf-llm prepare`.
{% endif %}
| split | rows | users | items | positive rate | rows of users unseen in train | of items unseen |
| --- | ---: | ---: | ---: | ---: | ---: | ---: |
{% for name, s in protocol.splits.items() -%}
| {{ name }} | {{ "{:,}".format(s.rows) }} | {{ "{:,}".format(s.users) }} | {{
 "{:,}".format(s["items"]) }} | {{ "%.4f" % s.positive_rate }} | {{
 "%.1f" % (100 * s.unseen_user_rate) }} % | {{
 "%.1f" % (100 * s.unseen_item_rate) }} % |
{% endfor %}
## Use

```python
from datasets import load_dataset

rows = load_dataset("path/to/this/folder")                      # train, validation, test
items = load_dataset("path/to/this/folder", "items")["train"]   # the catalog
log = load_dataset("path/to/this/folder", "interactions")["train"]
```

## Columns

- Default config: `user_id`, `item_id` (strings), `label` (0/1), `timestamp` (Unix seconds),
  `history` (ids of items liked earlier, oldest first), `split_position` (position of the row among
  its user's rows of the split, from 0), `not_cold` (user and item both occur in train).
- `items`: `item_id`, `title`{% for c in protocol.item_columns %}, `{{ c }}`{% endfor %}; \
{{ "{:,}".format(protocol.catalog_items) }} items.
- `interactions`: every accepted interaction in order of time, with `rating` (null if the data has
  labels only), `label` and `split` ("" if in none);
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


def render_dataset_card(protocol: dict) -> str:
    """The card's text, with the YAML `configs` that make `load_dataset(folder)` work."""
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
        "configs": configs,
    }
    if not protocol["redistributable"]:
        metadata["license"] = "other"
    environment = jinja2.Environment(trim_blocks=False, keep_trailing_newline=True)
    text = yaml.safe_dump(metadata, sort_keys=False)
    return environment.from_string(TEMPLATE).render(protocol=protocol, metadata=text)
