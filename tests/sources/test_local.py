"""What a folder with a model says of itself."""

import pytest

from gpt2lora.sources import local

CARD = "---\nlicense: {}\ntags: [a]\n---\n# A model\n"


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, {}),
        ({"README.md": CARD.format("mit")}, {"license": {"license": "mit"}}),
        ({"README.md": CARD.format("mit").replace("\n", "\r\n")}, {"license": {"license": "mit"}}),
        (
            {"README.md": CARD.format("other\nlicense_name: mine")},
            {"license": {"license": "other", "license_name": "mine"}},
        ),
        (
            {"README.md": "# no metadata", "config.json": '{"license": "apache-2.0"}'},
            {"license": {"license": "apache-2.0"}},
        ),
        ({"README.md": CARD.format("[mit, gpl-3.0]")}, {}),
        ({"README.md": "---\n{: :\n---\n", "config.json": "[1"}, {}),
    ],
)
def test_the_license_is_the_one_that_the_model_names(tmp_path, files, expected):
    for name, text in files.items():
        (tmp_path / name).write_text(text, newline="")
    assert local.read_license(tmp_path) == expected
