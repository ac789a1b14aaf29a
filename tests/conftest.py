import pytest, torch
@pytest.fixture
def rng(request):
    import random
    s=random.randrange(2**31); print("seed",s)
    g=torch.Generator(); g.manual_seed(s); return g
