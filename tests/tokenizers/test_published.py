import diffusers
import pytest

from mom_tokenizers.errors import UserError
from mom_tokenizers.published import load_published


def test_a_class_that_the_installed_library_lacks_is_named_with_its_version(tmp_path):
    with pytest.raises(
        UserError, match=f"the installed diffusers {diffusers.__version__} has no class AutoencoderOfTomorrow"
    ):
        load_published(tmp_path, "diffusers", "AutoencoderOfTomorrow")
