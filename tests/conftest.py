"""Settings of all tests: offline, one thread, and a pool of processes that each keep to whole files."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before huggingface_hub is imported: no test waits for a network
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # the many programs that tests start would compile all of kshot each


def pytest_configure(config):
    """The process of a pool that only hands out files need not load torch for fixtures."""
    if config.option.dist == "no":
        config.pluginmanager.import_plugin("shared")


def pytest_xdist_auto_num_workers(config):
    """A pool of processes pays for many files; one or a few start at once without it."""
    files = [name for name in config.args if ".py" in name]
    return 0 if 0 < len(files) <= 3 else None


LONG = (
    *("test_export", "test_warm", "test_benchmarks", "test_store_runs", "test_adapters", "test_cli"),
    *("test_classifiers", "test_run", "test_searching", "test_cli_configs", "test_adapter_state", "test_layouts"),
    *("test_studies_sweep", "test_alone", "test_data_catalogue_runs", "test_kept_tokens", "test_ends"),
    *("test_several_devices", "test_docs", "test_studies_worker", "test_data_command", "test_text_parts"),
    *("test_predicting", "test_auto", "test_preprocessing", "test_protocols", "test_data_loading", "test_api"),
    *("test_callbacks", "test_data_datamodule", "test_data_hostile", "test_cli_refusals", "test_tokens"),
    *("test_text_tower", "test_parser", "test_imports", "test_backbone_recipes", "test_backbones", "test_sharing"),
    *("test_mistakes", "test_wise_ft"),
)


def pytest_collection_modifyitems(items):
    """A file is one process's, so that what it shares is made once; long ones come first, lest one be waited for."""
    items.sort(key=lambda item: LONG.index(item.path.stem) if item.path.stem in LONG else len(LONG))
