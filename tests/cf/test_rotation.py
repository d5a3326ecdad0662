import torch

from ccf_llm_hf.cf.rotation import rotate_onto


def test_a_rotated_model_is_turned_back_and_scores_the_same() -> None:
    generator = torch.Generator().manual_seed(0)
    users, items = torch.randn(7, 4, generator=generator), torch.randn(9, 4, generator=generator)
    rotation = torch.linalg.qr(torch.randn(4, 4, generator=generator)).Q
    rotation[:, 0] *= -1  # mirrored, too
    back = rotate_onto((users @ rotation, items @ rotation), (users, items))
    torch.testing.assert_close(back, [users, items])
    other = torch.randn(7, 4, generator=generator), torch.randn(9, 4, generator=generator)
    anywhere = rotate_onto((users, items), other)
    torch.testing.assert_close(anywhere[0] @ anywhere[1].T, users @ items.T)
    assert not torch.allclose(anywhere[0], users, atol=0.1)


def test_nothing_to_turn_stays_nothing() -> None:
    nothing = [torch.zeros(3, 2), torch.zeros(4, 2)]
    assert all(not table.any() for table in rotate_onto(nothing, nothing))
