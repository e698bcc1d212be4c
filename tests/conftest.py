"""For all tests: the longest files come first, so that no worker is left alone with one of them at the end."""

# minutes each, most first; a file that is not named comes after them, as it was collected
LONGEST = (
    "faults/test_campaign.py",
    "data/test_tokenize_shards.py",
    "demo/test_demo.py",
    "demo/test_tutorial.py",
    "paper/test_paper_mini.py",
    "launch/test_launch.py",
    "train/test_failures.py",
    "train/test_survival.py",
    "model/test_describe_model.py",
    "train/test_settings.py",
    "train/test_run.py",
    "shards/test_online.py",
    "ops/test_triton.py",
    "model/test_score_samples.py",
    "bench/test_bench.py",
)


def pytest_collection_modifyitems(items):
    place = {name: k for k, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get("/".join(item.path.parts[-2:]), len(LONGEST)))
