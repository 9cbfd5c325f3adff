"""The real WikiText-2 and GPT-2's tokenizer, for tests that run only where the environment names their folders."""

import os

import pytest

WIKITEXT2 = os.environ.get("WIKITEXT2_DIR", "")
WIKITEXT2_RAW = os.environ.get("WIKITEXT2_RAW_DIR", "")
GPT2_TOKENIZER = os.environ.get("GPT2_TOKENIZER_DIR", "")

needs_wikitext2 = pytest.mark.skipif(not WIKITEXT2, reason="WIKITEXT2_DIR: a folder with WikiText-2")
needs_raw = pytest.mark.skipif(not WIKITEXT2_RAW, reason="WIKITEXT2_RAW_DIR: a folder with test.txt of WikiText-2 raw")
needs_tokenizer = pytest.mark.skipif(not GPT2_TOKENIZER, reason="GPT2_TOKENIZER_DIR: a folder with GPT-2's tokenizer")

DIGESTS = {
    "train": "9e9fa1ad55b1c2c95b08e37dd8e653f638fac2c6de904b79e813611eefbc985f",
    "validation": "f0737ed31fc1329026e95cb8b98e19c2a182c39c240ab909dc31abf2f8af58e8",
    "test": "d790b833ef8cf03a90db7bf1271b7520b83c45ce07ba3c1a9699df81e239eca0",
}
RAW_TEST_DIGEST = "173c87a53759e0201f33e0ccf978e510c2042d7f2cb78229d9a50d79b9e7dd08"
ARTICLES = {"train": 600, "validation": 60, "test": 60}
GPT2_TOKENS = {"train": 2_448_382, "validation": 258_659, "test": 295_877}
