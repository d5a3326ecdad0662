"""Items blanked for the measure of the gate."""

from types import SimpleNamespace

import torch
from gate import blank

from ccf_llm_hf.modeling.configuration_ccf_llm import CCFLLMConfig
from ccf_llm_hf.modeling.modeling_ccf_llm import CFTable


def blanked(share):
    settings = {"cf_dim": 3, "num_items": 40, "num_field_values": 2, "num_item_values": 1}
    table = CFTable(CCFLLMConfig(**settings))
    table.item_known.fill_(True)
    table.item_vectors.fill_(1.0)
    table.item_values.zero_()
    blank(SimpleNamespace(model=SimpleNamespace(cf=table)), share)
    return table


def test_blanked_items_have_neither_vector_nor_tastes():
    table, rows = blanked(0.5), torch.arange(40)
    away = ~table.item_known
    assert 0 < away.sum() < 40
    assert torch.equal(table.lookup("item", rows)[0].sum(-1) == 0, away)
    assert torch.equal(table.values_of(rows)[:, 0] == -1, away)
    assert torch.equal(blanked(0.5).item_known, table.item_known)
    assert blanked(0.0).item_known.all()
